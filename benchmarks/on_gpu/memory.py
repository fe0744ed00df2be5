"""Out of memory for real: DeiT-Ti under 36 masks with far too many rows, on a GPU of which the process may use little.

Both commands run in this process. The first has room; the second begins with all rows of a batch, must say that it
halved them, and must end with the same counts.
"""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu import difference
from benchmarks.on_gpu.images import write
from benchmarks.on_gpu.part import SMALL, of_run, on, parser_of, publish, run_in
from headprobe.cli import main as headprobe

ROOM = 4 * 2**30
"""Bytes that torch may hold: 9,472 rows need about 12 GB for the widest layer alone."""
MODEL = ("--model.name", "deit_tiny_patch16_224", "--model.pretrained", "false", "--mask-spec", "each:head")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both commands; return 1 if the second did not halve its rows or counted otherwise."""
    options = parser_of("memory", __doc__).parse_args(arguments)
    folder = options.folder / "images"
    write(folder, 16 if options.tiny else 256, 1)
    words = (*MODEL, *(SMALL if options.tiny else ()), *on(options.device), "--data.path", str(folder))
    most = "16" if options.tiny else "256"
    words = (*words, "--data.max_images", most, "--data.batch_size", most, "--data.num_workers", "0")
    numbers = {"with room": once(options.folder / "room", (*words, "--model.row_budget", "592"))}
    publish(numbers, options.json)
    limit(options.device)
    numbers["short of memory"] = short = once(options.folder / "short", (*words, "--model.row_budget", "9472"))
    publish(numbers, options.json)
    if any(one["code"] != 0 for one in numbers.values()):
        return 1
    short["differs"] = apart = difference.runs(run_in(options.folder / "short"), run_in(options.folder / "room"))
    publish(numbers, options.json)
    halved = any("out of memory with" in line for line in short["said"])
    return int(apart["counts_differ"] > 0 or (torch.device(options.device).type == "cuda" and not halved))


def limit(device: str) -> None:
    """Leave this process little memory; on a CPU there is no such limit."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(ROOM / torch.cuda.get_device_properties(0).total_memory)


def once(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a test in this process and return its code, what it said of memory, and its numbers."""
    said = io.StringIO()
    with redirect_stderr(said):
        code = headprobe(["test", "--trainer.default_root_dir", str(folder), *words])
    lines = said.getvalue().splitlines()
    sys.stderr.write(said.getvalue())
    found: dict[str, Any] = {"code": code, "said": [line for line in lines if "memory" in line][:8]}
    if code:
        return found | {"said": lines[-8:]}
    return found | of_run(run_in(folder))


if __name__ == "__main__":
    sys.exit(main())
