"""Images of files through the whole command: does reading and decoding keep a GPU waiting? ViT-B/16, random weights.

Files are synthetic JPEGs of 500 x 375 pixels, as large as ImageNet's, in class folders. `each:head` has 144 masks and
should wait for the GPU; `layer:3` has one and asks for many images a second.
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

from benchmarks.on_gpu.part import SMALL, on, parser_of, publish, ran

SIDES = (500, 375)
CLASSES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Write images, run the commands and return 1 if one fails."""
    options = parser_of("images", __doc__).parse_args(arguments)
    distinct, copies = (16, 1) if options.tiny else (1024, 4)
    folder = options.folder / "images"
    numbers: dict[str, Any] = {"bytes_of_an_image": write(folder, distinct, copies), "files": distinct * copies}
    model = (
        ("--model.name", "vit_tiny_patch16_224", *SMALL) if options.tiny else ("--model.name", "vit_base_patch16_224")
    )
    given = (*model, "--model.pretrained", "false", "--data.path", str(folder), *on(options.device))
    workers = str(max(1, (os.cpu_count() or 2) - 1))
    for name, words in cases(options.tiny, workers).items():
        words = (*given, *words, "--trainer.precision", "bf16-mixed")
        numbers[name] = ran(
            words, options.folder / "of_images" / name.replace(" ", "_"), limit=180 if options.tiny else 60
        )
        publish(numbers, options.json)
    return int(any(one["code"] != 0 for one in numbers.values() if isinstance(one, dict)))


def cases(tiny: bool, workers: str) -> dict[str, tuple[str, ...]]:
    """Return the options of each command by name."""
    if tiny:
        return {"heads": ("--mask-spec", "each:head", "--data.num_workers", "1")}
    heads = ("--mask-spec", "each:head", "--data.max_images", "512")
    layer = ("--mask-spec", "layer:3", "--data.batch_size", "256")
    return {
        "heads, defaults": heads,
        "heads, 4096 rows": (*heads, "--model.row_budget", "4096", "--data.batch_size", "112"),
        "layer 3, default workers": layer,
        f"layer 3, {workers} workers": (*layer, "--data.num_workers", workers),
    }


def write(folder: Path, distinct: int, copies: int) -> float:
    """Write JPEGs into class folders, each with further names, and return their mean size in bytes."""
    if folder.exists():
        return float(np.mean([file.stat().st_size for file in folder.rglob("*.jpg")]))
    labels = ImageNetInfo().label_names()[:CLASSES]
    for label in labels:
        (folder / label).mkdir(parents=True)

    def one(number: int) -> int:
        content = jpeg(number)
        first = folder / labels[number % CLASSES] / f"{number:05d}_0.jpg"
        first.write_bytes(content)
        for copy in range(1, copies):
            first.with_name(f"{number:05d}_{copy}.jpg").write_bytes(content)
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
