"""Images of files through the whole command: does reading and decoding keep a GPU waiting? ViT-B/16, random weights.

Files are synthetic JPEGs of 500 x 375 pixels, as large as ImageNet's, in class folders. `each:head` has 144 masks and
should wait for the GPU; `layer:3` has one and asks for many images a second. All commands run in this process, one
after the other. `sustained` is images/s from the end of the batch in the middle to the end of the last one: workers
start and read ahead in the first half.
"""

import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from benchmarks.on_gpu.clock import Clock
from benchmarks.on_gpu.part import SMALL, on, once, parser_of, publish
from headprobe.data.sources.folder import IMAGES_PER_UNIT as UNIT

SIDES = (500, 375)
CLASSES = 8
CLOCK = ("--trainer.callbacks", "benchmarks.on_gpu.clock.Clock")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write images, run the commands and return 1 if one fails."""
    options = parser_of("images", __doc__).parse_args(arguments)
    few, many = options.folder / "images", options.folder / "more_images"
    distinct = 16 if options.tiny else 1024
    numbers: dict[str, Any] = {"bytes_of_an_image": write(few, distinct, 1 if options.tiny else 2)}
    if not options.tiny:
        write(many, distinct, 16)
    name = ("vit_tiny_patch16_224", *SMALL) if options.tiny else ("vit_base_patch16_224",)
    given = ("--model.name", *name, "--model.pretrained", "false", *on(options.device), *CLOCK)
    for case, (folder, words) in cases(options.tiny, few, many).items():
        own = options.folder / "of_images" / case.replace(" ", "_")
        numbers[case] = once((*given, "--data.path", str(folder), *words), own) | {"sustained": Clock.sustained()}
        publish(numbers, options.json)
    return int(any(one["code"] != 0 for one in numbers.values() if isinstance(one, dict)))


def cases(tiny: bool, few: Path, many: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return the images and options of each command by name."""
    heads, mixed, true = ("--mask-spec", "each:head"), "bf16-mixed", "bf16-true"
    if tiny:
        one = (*heads, "--data.num_workers", "1", "--data.batch_size", "4", "--trainer.precision")
        return {"heads, bf16-mixed": (few, (*one, mixed)), "heads, bf16-true": (few, (*one, true))}
    # 32 images with a baseline and 144 masks each: four passes a batch
    rows = (*heads, "--model.row_budget", "4640", "--data.batch_size", str(UNIT), "--trainer.precision")
    layer = ("--mask-spec", "layer:3", "--data.batch_size", str(UNIT), "--trainer.precision", mixed)
    workers = str(max(1, (os.cpu_count() or 2) - 1))
    return {
        "heads, bf16-mixed": (few, (*rows, mixed)),
        "heads, bf16-true": (few, (*rows, true)),
        f"layer 3, {workers} workers": (many, (*layer, "--data.num_workers", workers)),
        "layer 3, default workers": (many, layer),
    }


def write(folder: Path, distinct: int, copies: int) -> float:
    """Write JPEGs into class folders, each with further names, and return their mean size in bytes."""
    labels = ImageNetInfo().label_names()[:CLASSES]
    for label in labels:
        (folder / label).mkdir(parents=True)

    def one(number: int) -> int:
        content = jpeg(number)
        first = folder / labels[number % CLASSES] / f"{number:05d}_0.jpg"
        first.write_bytes(content)
        for copy in range(1, copies):
            first.with_name(f"{number:05d}_{copy}.jpg").hardlink_to(first)
        return len(content)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return float(np.mean([*pool.map(one, range(distinct))]))


def jpeg(number: int) -> bytes:
    """Return a JPEG of blurred and of fine noise: about 100 kB, as a photograph of this size has."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(SIDES, Image.Resampling.BICUBIC)
    fine = draw.integers(-16, 17, (SIDES[1], SIDES[0], 1))
    pixels = np.clip(np.asarray(coarse, dtype=np.int16) + fine, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
