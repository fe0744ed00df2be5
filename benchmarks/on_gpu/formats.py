"""The sweep of ViT-B/16 over all 144 heads: autocast or everything in bfloat16, at several row budgets.

Cases take turns, several passes each, as in a run. `waiting` is what was before 2026-11-27: each layer chose its masks
by number, and the host waited for the GPU there. `waits` counts how often a pass makes the host wait now.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import TINY
from benchmarks.gpu_check import masks_of, model_of, noise, normalised
from benchmarks.gpu_speed import PROJECTED, flops, matrix_peak, timed
from benchmarks.on_gpu.part import parser_of, publish
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.passes import ForwardPasses

ROWS = (2048, 4096, 8192)
ROUNDS = 2
OF_PASSES = ("flops_per_image", "peak_gb", "waits")
IMAGES = 112
"""Of a timed run, at least."""


@dataclass(frozen=True)
class Case:
    """A way to run the sweep.

    Attributes:
        name: What is computed in which format.
        passes: Runs the sweep of a model in that format.
        autocast: Whether autocast chooses the format of each operation.
        rows: Row budget.
        waiting: Whether the host waits at every layer.
    """

    name: str
    passes: ForwardPasses
    autocast: bool
    rows: int
    waiting: bool = False

    @property
    def title(self) -> str:
        """Name, rows and whether the host waits."""
        return f"{self.name}, {self.rows} rows" + (", waiting" if self.waiting else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all cases in turns, and return 1 if logits of both formats differ by more than their rounding."""
    options = parser_of("formats", __doc__, folder=False).parse_args(arguments)
    device = torch.device(options.device)
    single, layout = model_of("vit_base_patch16_224", TINY if options.tiny else {}, device)
    halves = deepcopy(single).to(torch.bfloat16)
    peak = matrix_peak(256 if options.tiny else 8192, device, 3)
    rows = (16, 32) if options.tiny else ROWS
    mixed, true = passes_of(single, layout, device), passes_of(halves, layout, device)
    formats = (("autocast", mixed, True), ("all in bfloat16", true, False))
    cases = [Case(*one, budget, waiting) for one in formats for budget in rows for waiting in (False, True)]
    numbers: dict[str, Any] = {"peak_tflops": peak / 1e12}
    with torch.inference_mode():
        numbers |= difference(mixed, true, device)
        for case in timed_cases(cases, device, 4 if options.tiny else IMAGES, peak, numbers):
            publish(numbers, options.json)
            print(case)
    # 144 masks of a model with random weights: bfloat16 has 8 bits
    return int(numbers["differ_by"] > 0.1)


def passes_of(backbone: nn.Module, layout: HeadLayout, device: torch.device) -> ForwardPasses:
    """Return the sweep of all single heads of a model, in its own format."""
    dtype = next(backbone.parameters()).dtype

    def ready(images: Tensor) -> Tensor:
        return normalised(images).to(dtype)

    return ForwardPasses(backbone, layout, masks_of(layout, device), ready, IMAGES, max(ROWS))


def difference(mixed: ForwardPasses, true: ForwardPasses, device: torch.device) -> dict[str, float]:
    """Return by how much logits of a few images differ between both formats, as a part of the largest."""
    images = noise(mixed.growing.layout, 2, device)
    with torch.autocast(device.type, torch.bfloat16):
        expected = mixed.outputs(images).float()
    found = true.outputs(images).float()
    return {"differ_by": float((found - expected).abs().max() / expected.abs().max())}


def timed_cases(
    cases: Sequence[Case], device: torch.device, least: int, peak: float, numbers: dict[str, Any]
) -> Iterator[str]:
    """Time the cases round by round, keep the best of each in `numbers`, and yield a line for each round of each."""
    for turn in range(ROUNDS):
        for case in cases:
            run, count = run_of(case, device, least)
            with torch.autocast(device.type, torch.bfloat16) if case.autocast else nullcontext():
                if turn == 0:  # the same passes with a waiting host come next
                    own = numbers.get(replace(case, waiting=False).title) or first_of(case, run, count, device)
                    numbers[case.title] = {name: own[name] for name in own.keys() & {*OF_PASSES}}
                with waiting_at(case) if case.waiting else nullcontext():
                    speed = count / timed(run, device, 1)[0]
            own = numbers[case.title]
            own["images_per_second"] = max(speed, own.get("images_per_second", 0.0))
            own["of_peak"] = own["flops_per_image"] * own["images_per_second"] / peak
            own["seconds_for_50000"] = PROJECTED / own["images_per_second"]
            yield f"{case.title}: {speed:.1f} images/s"


def run_of(case: Case, device: torch.device, least: int) -> tuple[Callable[[], Tensor], int]:
    """Return a run of whole passes within the case's row budget, and its images."""
    growing = case.passes.growing
    case.passes.plan = growing.plan(max(least, case.rows), case.rows)
    each = case.passes.plan.images
    images = noise(growing.layout, each * -(-least // each), device)
    return partial(case.passes.outputs, images), len(images)


def first_of(case: Case, run: Callable[[], Tensor], count: int, device: torch.device) -> dict[str, Any]:
    """Run a case for the first time and return its FLOPs, its memory and how often the host waits in a pass."""
    if device.type != "cuda":
        return {"flops_per_image": flops(run) / count}
    run()
    torch.cuda.reset_peak_memory_stats(device)
    passes = count // case.passes.plan.images
    found = {"waits": waits(run) / passes, "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    return {"flops_per_image": flops(run) / count, **found}


def waits(run: Callable[[], Tensor]) -> int:
    """Return how often the host waits for the GPU in a run."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(one.message) for one in said)


@contextmanager
def waiting_at(case: Case) -> Iterator[None]:
    """Choose masks by number at every layer's point while the context is open, as was done before."""
    growing = case.passes.growing
    chosen = list(range(len(growing.keep)))

    def choose(number: int, *_: object) -> None:
        growing.keep[chosen, number]

    with ExitStack() as stack:
        for number, layer in enumerate(growing.layout.layers):
            point = growing.backbone.get_submodule(layer.point)
            stack.callback(point.register_forward_pre_hook(partial(choose, number)).remove)
        yield


if __name__ == "__main__":
    sys.exit(main())
