"""Out of memory for real: DeiT-Ti under 36 masks with far too many rows, on a GPU of which the process may use little.

Both commands run in this process. The first has room; the second begins with all rows of a batch, must say that it
halved them, and must count the same images: a batch that counted twice would add its own. Passes of another shape round
differently, so that a count may differ by one; TF32 is off, with which more would.
"""

import os
import sys
from collections.abc import Sequence

import torch

from benchmarks.on_gpu import difference
from benchmarks.on_gpu.images import write
from benchmarks.on_gpu.part import SMALL, on, once, parser_of, publish, run_in
from headprobe.data.sources.folder import IMAGES_PER_UNIT as UNIT

ROOM = 3 * 2**30
"""Bytes that torch may hold: 4,736 rows need 5.7 GB in and behind the widest layer alone, and half of them 2.9 GB."""
MODEL = ("--model.name", "deit_tiny_patch16_224", "--model.pretrained", "false", "--mask-spec", "each:head")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both commands; return 1 if the second did not halve its rows or counted otherwise."""
    options = parser_of("memory", __doc__).parse_args(arguments)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when torch first uses the GPU
    folder = options.folder / "images_of_memory"
    write(folder, 16 if options.tiny else 4 * UNIT, 1)
    words = (*MODEL, *(SMALL if options.tiny else ()), *on(options.device), "--data.path", str(folder))
    words = (*words, "--data.batch_size", str(UNIT), "--data.num_workers", "0")
    numbers = {"with room": once((*words, "--model.row_budget", "592"), options.folder / "room")}
    publish(numbers, options.json)
    limit(options.device)
    whole = str(37 * UNIT)  # all images of a batch, with a baseline and 36 masks each
    numbers["short of memory"] = short = once((*words, "--model.row_budget", whole), options.folder / "short")
    publish(numbers, options.json)
    if any(one["code"] != 0 for one in numbers.values()):
        return 1
    short["differs"] = apart = difference.runs(run_in(options.folder / "short"), run_in(options.folder / "room"))
    publish(numbers, options.json)
    halved = any("out of memory with" in line for line in short["said"])
    wanted = torch.device(options.device).type == "cuda"
    return int(apart["largest_count_difference"] > 1 or halved != wanted)


def limit(device: str) -> None:
    """Leave this process little memory; on a CPU there is no such limit."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(ROOM / torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    sys.exit(main())
