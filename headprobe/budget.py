"""How many rows a forward pass should have on this machine: tried out on the run's own model and masks.

Few rows leave the cores of a processor or GPU without work, many fall out of a processor's cache, and its memory is
taken anew from the system for each large tensor. Where the best lies depends on the model, so it is measured.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from headprobe.backbone.memory import is_out_of_memory
from headprobe.backbone.rows import RowPlan
from headprobe.passes import ForwardPasses

PAYS_FROM = 60.0
"""Seconds that a run must take for trials to pay."""
SHARE, LEAST = 0.01, 2.0
"""Part of the run's seconds that trials may take, and what they may take in any case."""
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

    def estimate(self, images: int) -> float:
        """Return about how many seconds so many images take under all masks: from one image and one chunk of masks.

        The first pass of a process is slow; where it alone would make trials pay, a second one is asked. 0 where memory
        ends with that: the run itself finds what fits.
        """
        plan = self.passes.plan
        one, many = replace(plan, images=1, chunks=plan.chunks[:1]), len(plan.chunks) * images
        first = (self._seconds_if_it_fits(one) or 0.0) * many
        return first if first < PAYS_FROM else min(first, (self._seconds_if_it_fits(one) or 0.0) * many)

    def fastest(self, seconds: float) -> Trial | None:
        """Return the fastest budget that could be found in about so many seconds, None where two could not be tried.

        From few rows upwards, until two in a row gain nothing, memory ends, or time would.
        """
        ends = time.perf_counter() + seconds
        best: Trial | None = None
        in_vain = 0
        for plan in self._plans():
            if best is not None and time.perf_counter() + 2 * best.seconds * plan.images > ends:
                break
            tried = self._tried(plan)
            if tried is None:
                break
            if best is None or tried.seconds < FASTER * best.seconds:
                best, in_vain = tried, 0
            else:
                in_vain += 1
            if in_vain == 2:
                break
        return best if len(self.trials) > 1 else None

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

    def _tried(self, plan: RowPlan) -> Trial | None:
        """Try a plan twice, None where memory ends."""
        first = self._seconds_if_it_fits(plan)
        again = None if first is None else self._seconds_if_it_fits(plan)
        if first is None or again is None:
            return None
        trial = Trial(plan, min(first, again) / plan.images)
        self.trials.append(trial)
        return trial

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
