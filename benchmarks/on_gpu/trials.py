"""What a pass of ViT-B/16 is spent on, and what could be had: `profile` and `compile`.

- `profile`: the kernels of one sweep pass over all 144 heads in bfloat16 autocast, by their share of the device's time;
  with `--all-bfloat16` without autocast.
- `compile`: images/s with everything in bfloat16 instead of autocast, and with each block through `torch.compile`.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import TINY
from benchmarks.gpu_check import masks_of, model_of, noise, normalised
from benchmarks.gpu_speed import matrix_peak, timed
from benchmarks.on_gpu.part import parser_of, publish
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.passes import ForwardPasses

MOST_KERNELS = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one of the two trials."""
    parser = parser_of("trials", __doc__, folder=False)
    parser.add_argument("what", choices=("profile", "compile"))
    parser.add_argument("--rows", type=int, default=2048, help="row budget of the sweep")
    parser.add_argument("--batch", type=int, default=256, help="images of the plain pass")
    parser.add_argument("--all-bfloat16", action="store_true", help="profile the sweep of weights in bfloat16")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rows, options.batch = 16, 4
    device = torch.device(options.device)
    backbone, layout = model_of("vit_base_patch16_224", TINY if options.tiny else {}, device)
    if options.what == "profile":
        dtype = torch.bfloat16 if options.all_bfloat16 else torch.float32
        publish(profiled(backbone.to(dtype), layout, device, options.rows), options.json)
        return 0
    numbers: dict[str, Any] = {"batch": options.batch, "rows": options.rows}
    for name, found in compiled(backbone, layout, device, options):
        numbers[name] = found
        publish(numbers, options.json)
    return 0


def sweep_of(
    backbone: nn.Module, layout: HeadLayout, device: torch.device, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], Tensor], int]:
    """Return one sweep pass over all single heads within a row budget, and its images."""
    keep = masks_of(layout, device)

    def ready(images: Tensor) -> Tensor:
        return normalised(images).to(dtype)

    passes = ForwardPasses(backbone, layout, keep, ready, max(1, rows // (1 + len(keep))), rows)
    images = noise(layout, passes.plan.images, device)
    return partial(passes.outputs, images), len(images)


def profiled(backbone: nn.Module, layout: HeadLayout, device: torch.device, rows: int) -> dict[str, Any]:
    """Return the kernels of one sweep pass that take most of the device's time, in shares of all of it."""
    cuda = device.type == "cuda"
    dtype = next(backbone.parameters()).dtype
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
        run, images = sweep_of(backbone, layout, device, rows, dtype)
        run()
        seconds = min(timed(run, device, 3))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as found:
            timed(run, device, 1)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in found.key_averages():
        if cuda and event.device_type != DeviceType.CUDA:  # an operator: its kernels have entries of their own
            continue
        spent[event.key] += event.self_device_time_total if cuda else event.self_cpu_time_total
        calls[event.key] += event.count
    whole = sum(spent.values())
    largest = sorted(spent, key=lambda name: -spent[name])[:MOST_KERNELS]
    table = [{"kernel": name[:110], "percent": 100 * spent[name] / whole, "calls": calls[name]} for name in largest]
    for row in table:
        print(f"{row['percent']:5.1f}% {row['calls']:5d} {row['kernel']}")
    # below 100 where the device waits for the host
    busy = 100 * whole / 1e6 / seconds
    return {"images": images, "rows": rows, "seconds": seconds, "busy_percent": busy, "kernels": table}


def compiled(backbone: nn.Module, layout: HeadLayout, device: torch.device, options: Any) -> Any:
    """Yield the name and images/s of each way to run the plain pass and the sweep."""
    peak = matrix_peak(256 if options.tiny else 8192, device, 3)
    yield "peak_tflops", peak / 1e12
    images = normalised(noise(layout, options.batch, device))

    def speed(run: Callable[[], object], count: int) -> float:
        for _ in range(2):
            run()
        return count / min(timed(run, device, 5))

    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    with torch.inference_mode():
        with autocast():
            yield "plain, autocast", speed(lambda: backbone(images), options.batch)
            run, count = sweep_of(backbone, layout, device, options.rows)
            yield "sweep, autocast", speed(run, count)
        halves = backbone.to(torch.bfloat16)
        low = images.to(torch.bfloat16)
        yield "plain, all in bfloat16", speed(lambda: halves(low), options.batch)
        run, count = sweep_of(halves, layout, device, options.rows, torch.bfloat16)
        yield "sweep, all in bfloat16", speed(run, count)
        backbone.float()
    for block in backbone.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False, backend="eager" if options.tiny else "inductor")  # no C++ compiler for a try
    with torch.no_grad():
        with autocast():
            yield "plain, autocast, compiled blocks", speed(lambda: backbone(images), options.batch)
        halves = backbone.to(torch.bfloat16)
        yield "plain, all in bfloat16, compiled blocks", speed(lambda: halves(low), options.batch)


if __name__ == "__main__":
    sys.exit(main())
