"""Finds the batch size at which plain forward passes take the least time per image."""

import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import build, read

SIZES = (8, 16, 32, 64)
TRIES = 3


def main(file: str) -> None:
    """Print milliseconds per image by batch size and the fastest size, as one JSON line."""
    setting = read(file)
    model = build(setting)
    noise = torch.randn(max(SIZES), *setting.config["input_size"], generator=torch.Generator().manual_seed(0))
    milliseconds = fastest(model, noise)
    best = min(milliseconds, key=lambda size: milliseconds[size])
    print(json.dumps({"batch": best, "milliseconds": milliseconds}))


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
