"""What reading images costs beside Pillow and timm's transform alone: ``python -m benchmarks.streaming --data PATH``.

Both take turns, batch by batch, on the same bytes in one process, and CPU time is counted, so that what else the
machine does meets both alike.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from benchmarks.report import markdown, publish, ratios, refuse_below_one
from headprobe.data.decode import ImageReader, image_bytes
from headprobe.data.sources.source import Request, open_source
from headprobe.errors import RunError, UsageError

BATCH = 16  # images that one case takes before it is the other's turn
PLAIN, OURS = "Pillow and timm's transform", "headprobe"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    torch.set_num_threads(1)
    config = resolve_model_data_config(timm.create_model(options.model, pretrained=False))
    contents = image_files(options)
    rows = compare(take_turns(cases(config), contents, options.repeats), len(contents))
    setting = {
        "data": Path(options.data).name,
        "images": len(contents),
        "mean KB": round(sum(map(len, contents)) / len(contents) / 1000),
        "model": options.model,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    publish(table(setting, rows), setting, rows, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--data", default="digits", help="as --data.path of headprobe; by default the bundled digits")
    parser.add_argument("--split", default="", help="as --data.split of headprobe")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm model whose transform is applied")
    parser.add_argument("--images", type=int, default=500, help="at most this many of the first images")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, each of them one pass of both cases")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "images", "repeats")
    return options


def image_files(options: argparse.Namespace) -> list[bytes]:
    """Return the first images of a dataset as the bytes of their files."""
    try:
        source = open_source(Request(options.data, split=options.split))
        contents: list[bytes] = []
        for unit in range(source.units):
            for chunk in source.chunks(unit, BATCH):
                contents += [image_bytes(cell) for cell in chunk.images]
                if len(contents) >= options.images:
                    return contents[: options.images]
    except (UsageError, RunError, ValueError) as error:
        raise SystemExit(str(error)) from None
    return contents


def cases(config: dict[str, Any]) -> dict[str, Callable[[bytes], Tensor]]:
    """Return both ways from the bytes of a file to the pixels that the model sees."""
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    reader = ImageReader(config)

    def plain(content: bytes) -> Tensor:
        return torch.as_tensor(transform(Image.open(io.BytesIO(content)).convert(reader.mode)))

    return {PLAIN: plain, OURS: reader}


def take_turns(
    ways: dict[str, Callable[[bytes], Tensor]], contents: Sequence[bytes], repeats: int
) -> dict[str, list[float]]:
    """Return CPU seconds of each case and round, after one round to warm up; who begins changes with every batch."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for round_ in range(-1, repeats):
        spent = dict.fromkeys(ways, 0.0)
        for first in range(0, len(contents), BATCH):
            order.reverse()
            for name in order:
                start = time.process_time()
                for content in contents[first : first + BATCH]:
                    ways[name](content)
                spent[name] += time.process_time() - start
        if round_ >= 0:
            for name, one in spent.items():
                seconds[name].append(one)
    return seconds


def compare(seconds: dict[str, list[float]], images: int) -> list[dict[str, Any]]:
    """Return for each case its cost relative to the plain one: of the minima, and median over rounds."""
    plain = seconds[PLAIN]
    return [
        {
            "case": name,
            "milliseconds": 1000 * min(times) / images,
            **ratios(times, plain),
        }
        for name, times in seconds.items()
    ]


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    lines = [
        (row["case"], *(f"{row[name]:.3f}" for name in ("milliseconds", "ratio_of_minima", "median_ratio")))
        for row in rows
    ]
    return markdown(setting, ("case", "CPU ms per image", "ratio of minima", "median ratio"), lines)


if __name__ == "__main__":
    main()
