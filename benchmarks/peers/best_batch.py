"""Finds the batch size at which plain forward passes take the least time per image, and what decoding takes."""

import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import Images, build, read

SIZES = (8, 16, 32, 64)
TRIES = 3
DECODED = 32


def main(file: str) -> None:
    """Print milliseconds per image by batch size, the fastest size and seconds of decoding, as one JSON line."""
    setting = read(file)
    model = build(setting)
    noise = torch.randn(max(SIZES), *setting.config["input_size"], generator=torch.Generator().manual_seed(0))
    milliseconds = fastest(model, noise)
    best = min(milliseconds, key=lambda size: milliseconds[size])
    print(json.dumps({"batch": best, "milliseconds": milliseconds, "decoding": decoding(Images(setting))}))


def decoding(images: Images) -> float:
    """Return the seconds that one image takes to be read and decoded."""
    images[0]
    began = time.perf_counter()
    some = range(min(DECODED, len(images)))
    for number in some:
        images[number]
    return (time.perf_counter() - began) / len(some)


def fastest(model: Any, images: Tensor) -> dict[int, float]:
    """Return the least milliseconds per image of some passes at each batch size, all sizes taking turns."""
    least = dict.fromkeys(SIZES, math.inf)
    with torch.inference_mode():
        model(images[: min(SIZES)])
        for _ in range(TRIES):
            for size in SIZES:
                began = time.perf_counter()
                model(images[:size])
                least[size] = min(least[size], 1000 * (time.perf_counter() - began) / size)
    return least


if __name__ == "__main__":
    main(sys.argv[1])
