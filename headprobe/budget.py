"""How many rows a forward pass should have on this machine: tried out on the run's own model and masks.

Few rows leave the cores of a processor or GPU without work, many fall out of a processor's cache, and its memory is
taken anew from the system for each large tensor. Where the best lies depends on the model, so it is measured.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.numerics import is_out_of_memory
from headprobe.passes import ForwardPasses

PAYS_FROM = 60.0
"""Seconds that a run must take for trials to pay."""
SHARE, LEAST, MOST = 0.01, 2.0, 60.0
"""Part of the run's seconds that trials may take, what they may take in any case, and what at most: others wait."""
FASTER = 0.97
"""More rows are better if an image takes this part of the time of the best so far; less is noise."""
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
ROWS_ON_CPU, ROWS_ELSEWHERE = (16, 128, 1024), (128, 4096, 16384)
"""The fewest rows to try, those up to which all masks share a pass, and the most."""

Arithmetic = Callable[[], AbstractContextManager[object]]
"""Gives the context that batches are computed in, as of mixed precision."""


@dataclass(frozen=True)
class Trial:
    """What a row budget was found to cost.

    Attributes:
        plan: The forward passes.
        seconds: For one image under all masks.
    """

    plan: RowPlan
    seconds: float


class BudgetTrials:
    """Tries row budgets on noise.

    Args:
        passes: The planned forward passes; their plan is left as it is.
        device: Where they run.
        arithmetic: The context that batches are computed in.
    """

    def __init__(self, passes: ForwardPasses, device: torch.device, arithmetic: Arithmetic = nullcontext) -> None:
        self.passes, self.device, self.arithmetic = passes, device, arithmetic
        self.trials: list[Trial] = []
        self._image = 0.0  # seconds of one, as estimated

    def estimate(self, images: int) -> float:
        """Return about how many seconds so many images take under all masks: from one image and one chunk of masks.

        The first pass of a process is slow; where it alone would make trials pay, a second one is asked. 0 where memory
        ends with that: the run itself finds what fits.
        """
        plan = self.passes.plan
        one = replace(plan, images=1, chunks=plan.chunks[:1])
        self._image = (self._seconds_if_it_fits(one) or 0.0) * len(plan.chunks)
        if self._image * images >= PAYS_FROM:
            self._image = min(self._image, (self._seconds_if_it_fits(one) or 0.0) * len(plan.chunks))
        return self._image * images

    def fastest(self, seconds: float) -> Trial | None:
        """Return the fastest budget that could be found in about so many seconds, None where two could not be tried.

        From few rows upwards, until two in a row gain nothing, memory ends, or half of the time would; then all of
        them once more, downwards: a machine that others slow down for a while is unfair to all alike.
        """
        self._upwards(time.perf_counter() + seconds / 2)
        if len(self.trials) < 2:
            return None
        again = [Trial(one.plan, min(one.seconds, self._image_seconds(one.plan))) for one in reversed(self.trials)]
        self.trials = again[::-1]
        best = self.trials[0]
        for trial in self.trials[1:]:
            best = trial if trial.seconds < FASTER * best.seconds else best
        return best

    def _upwards(self, ends: float) -> None:
        """Try each plan once, while that pays and memory lasts."""
        best, in_vain = self._image, 0
        for plan in self._plans():
            if in_vain == 2 or time.perf_counter() + best * plan.images > ends:
                return
            seconds = self._seconds_if_it_fits(plan)
            if seconds is None:
                return
            self.trials.append(Trial(plan, seconds / plan.images))
            gained = len(self.trials) == 1 or seconds / plan.images < FASTER * best
            best, in_vain = (seconds / plan.images, 0) if gained else (best, in_vain + 1)

    def _image_seconds(self, plan: RowPlan) -> float:
        seconds = self._seconds_if_it_fits(plan)
        return math.inf if seconds is None else seconds / plan.images

    def _plans(self) -> list[RowPlan]:
        """Return plans by their rows: more and more images under all masks, where masks are many also under some."""
        fewest, enough, most = ROWS_ON_CPU if self.device.type == "cpu" else ROWS_ELSEWHERE
        growing, batch = self.passes.growing, self.passes.plan.batch_size
        widest = 1 + sum(place is not None for place in growing.join_places)
        budgets = [widest * step for step in STEPS] + [step for step in STEPS if enough < widest > step]
        plans = (growing.plan(batch, budget) for budget in sorted(budgets) if fewest <= budget <= most)
        by_shape: dict[tuple[int, int], RowPlan] = {}
        for plan in plans:  # a larger budget may give the same passes
            by_shape.setdefault((plan.images, len(plan.chunks)), plan)
        return sorted(by_shape.values(), key=lambda plan: plan.most_rows)

    def _seconds_if_it_fits(self, plan: RowPlan) -> float | None:
        try:
            return self._seconds(plan)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return None

    def _seconds(self, plan: RowPlan) -> float:
        """Return what one forward pass per chunk takes."""
        growing = self.passes.growing
        shape = (plan.images, *growing.layout.input_size)
        generator = torch.Generator().manual_seed(0)  # torch's own stream of random numbers stays where it is
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(self.device)
        began = time.perf_counter()
        with torch.inference_mode(), self.arithmetic(), growing:
            growing.logits(self.passes.normalised(noise), plan).cpu()  # a GPU is done when its result is here
        return time.perf_counter() - began
