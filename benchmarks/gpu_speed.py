"""What the plain forward pass and the sweep take on one device, in bfloat16 autocast.

FLOPs are counted: `torch.utils.flop_counter` sees the matrix products of a run as it is, 2 m n k for
`[m, k] x [k, n]` and 4 x rows x heads x tokens^2 x head_dim for attention; everything else counts as nothing. A share
of the peak is FLOPs per image x images/s over the FLOP/s of the fastest large bfloat16 product.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_check import masks_of, noise, normalised
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.passes import ForwardPasses

PROJECTED = 50_000
"""Images that the time of the sweep is projected to."""


def speed(model: tuple[nn.Module, HeadLayout], options: argparse.Namespace) -> dict[str, Any]:
    """Return what the plain forward pass and the sweep take, in bfloat16 autocast."""
    backbone, layout = model
    device = next(backbone.parameters()).device
    peak = matrix_peak(options.matrix, device, options.repeats)
    keep = masks_of(layout, device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        plain = [plain_pass(backbone, layout, batch, device, options.repeats) for batch in options.batch]
        passes = ForwardPasses(backbone, layout, keep, normalised, options.images, max(options.rows))
        sweeps = [sweep(passes, rows, options, device) for rows in options.rows]
    for one in [*plain, *sweeps]:
        one["of_peak"] = one["flops_per_image"] * one["images_per_second"] / peak
    best = max(sweeps, key=lambda one: float(one["images_per_second"]))
    return {
        "masks": len(keep),
        "peak_tflops": peak / 1e12,
        "plain": plain,
        "sweeps": sweeps,
        "best_rows": best["rows"],
        "seconds_for_50000": PROJECTED / best["images_per_second"],
    }


def plain_pass(
    backbone: nn.Module, layout: HeadLayout, batch: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Return images/s, FLOPs and memory of the unmasked model at one batch size."""
    images = normalised(noise(layout, batch, device))
    return {"batch": batch, **measured(lambda: backbone(images), batch, device, repeats)}


def sweep(passes: ForwardPasses, rows: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return images/s, masks x images/s, FLOPs and memory of the sweep within a row budget."""
    layout, masks = passes.growing.layout, len(passes.growing.keep)
    passes.plan = passes.growing.plan(max(options.images, rows), rows)
    whole = passes.plan.images  # a part of a pass would waste rows
    images = noise(layout, whole * -(-options.images // whole), device)
    found = measured(lambda: passes.outputs(images), len(images), device, options.repeats)
    return {
        "rows": passes.plan.most_rows,
        "waves": len(passes.plan.waves),
        "masks_images_per_second": masks * found["images_per_second"],
        **found,
    }


def measured(run: Callable[[], object], images: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return images/s (of the fastest run), all seconds, FLOPs per image and peak memory."""
    cuda = device.type == "cuda"
    run()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(run, device, repeats)
    return {
        "images_per_second": images / min(seconds),
        "median_images_per_second": images / median(seconds),
        "seconds": seconds,
        "flops_per_image": flops(run) / images,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
    }


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of some runs, until the device has finished."""
    seconds = []
    for _ in range(repeats):
        _finish(device)
        began = time.perf_counter()
        run()
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products and attention operators that a run calls."""

    def on_cpu(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        rows, heads, queries, size = query
        return 2 * rows * heads * queries * key[2] * (size + value[3])

    fused_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts those of GPUs only
    counter = FlopCounterMode(display=False, custom_mapping={fused_on_cpu: on_cpu})
    with counter:
        run()
    return int(counter.get_total_flops())


def matrix_peak(side: int, device: torch.device, repeats: int) -> float:
    """Return the FLOP/s of the fastest of some large bfloat16 matrix products."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, products = torch.empty_like(left), 10

    def run() -> None:
        for _ in range(products):
            torch.mm(left, right, out=out)

    run()
    return products * 2 * side**3 / min(timed(run, device, 3 * repeats))
