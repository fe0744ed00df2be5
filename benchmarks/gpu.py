"""Correctness and speed of a sweep on one GPU, with synthetic images: ``bash benchmarks/gpu.sh``.

1. DeiT-Ti, all 36 single heads, float32 (no TF32): the growing pass against one forward pass per mask.
2. ViT-B/16, all 144 single heads, bfloat16 autocast: images/s of the plain forward pass, masks x images/s of the sweep
   at several row budgets, the share of the measured bfloat16 matrix peak, memory, and the time of 50,000 images.

Weights are random and perturbed, images are noise made on the device: nothing is read, decoded or written. FLOPs are
counted, not assumed: see `benchmarks.gpu_speed`.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.gpu_check import correctness, model_of, without_tf32
from benchmarks.gpu_speed import PROJECTED, speed
from benchmarks.report import markdown, refuse_below_one

MOST_DIFFERENT = 1e-4
"""Of the largest logit."""
TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print a table and one JSON line; return 1 if the check fails."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: error: torch sees no GPU; give --device cpu --tiny to try the script", file=sys.stderr)
        return 2
    without_tf32()
    about = describe(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    small, large = (TINY, TINY) if options.tiny else ({}, {})
    check = model_of("deit_tiny_patch16_224", small, device)
    difference = correctness(check, options.check_images)
    right = difference <= MOST_DIFFERENT
    print(
        f"one float32 pass for each single head of {check[1].model}: logits differ by {difference:.2g} of the largest"
    )
    numbers: dict[str, Any] = {**about, "tiny": options.tiny, "difference": difference, "right": right}
    if right:
        numbers |= speed(model_of("vit_base_patch16_224", large, device), options)
        print(f"\n{table(numbers)}\n")
    else:
        print(f"benchmarks.gpu: error: at most {MOST_DIFFERENT} is allowed; nothing is timed", file=sys.stderr)
    print(json.dumps(numbers))
    if options.json is not None:
        options.json.write_text(json.dumps(numbers) + "\n")
    return int(not right)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of 3 layers and 32 x 32 pixels, to try the script")
    parser.add_argument("--check-images", type=int, default=8, help="images of the check")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="of the plain pass")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="row budgets of the sweep")
    parser.add_argument("--images", type=int, default=128, help="images of one timed sweep, at least")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="rows and columns of the product that is the peak")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "images", "repeats", "matrix")
    if min([*options.batch, *options.rows, options.check_images]) < 1:
        parser.error(f"--batch, --rows and --check-images must be at least 1, got {options.batch}, {options.rows}")
    if options.tiny:
        options.batch, options.rows, options.images, options.matrix = [4, 8], [8, 16], 4, 256
        options.check_images = 3
    return options


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the numbers are measured on."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "images": "synthetic",
    }


def table(numbers: dict[str, Any]) -> str:
    """Return the measured speeds as a table in Markdown, and the projection."""
    lines = []
    for one in [*numbers["plain"], *numbers["sweeps"]]:
        sweeping = "rows" in one
        lines.append(
            (
                f"sweep, {one['rows']} rows, {one['waves']} waves" if sweeping else f"plain, batch {one['batch']}",
                f"{one['images_per_second']:.1f}",
                f"{one['masks_images_per_second']:.0f}" if sweeping else "",
                f"{one['flops_per_image'] / 1e9:.1f}",
                f"{100 * one['of_peak']:.1f}%",
                "" if one["peak_gb"] is None else f"{one['peak_gb']:.1f}",
            )
        )
    setting = {
        "masks": numbers["masks"],
        "measured bfloat16 peak in TFLOP/s": f"{numbers['peak_tflops']:.1f}",
        "images": "synthetic",
    }
    columns = ("case", "images/s", "masks x images/s", "GFLOP an image", "of the peak", "GPU memory, GB")
    projected = (
        f"all {numbers['masks']} masks over {PROJECTED:,} images: {numbers['seconds_for_50000']:.0f} s projected"
    )
    return f"{markdown(setting, columns, lines)}\n\n{projected}"


if __name__ == "__main__":
    sys.exit(main())
