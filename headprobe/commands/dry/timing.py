"""How long an image takes under all masks, for `test --dry-run`: measured on noise, in no more passes than tell it.

Where a step takes seconds, single waves of it are timed, those with the least work first, and the others follow from
these: the time of a wave is a number of seconds for each layer that a row runs through, less one for each mask, whose
rows leave out a part of the layer at which they join and of the last one.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import lightning
import numpy as np
import torch
from torch import Tensor

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.data.stream import ImageBatch
from headprobe.errors import RunError
from headprobe.module import HeadProbe
from headprobe.passes import ForwardPasses

TIMED_SECONDS = 3.0
"""The trial lasts so many seconds, or as long as one step, or as two waves of a step, if that takes longer."""

LEAST_WAVES = 2
"""Waves from which the time of others follows."""

Wave = tuple[int, ...]


def seconds_per_image(trainer: lightning.Trainer, probe: HeadProbe, batch_size: int) -> float:
    """Time steps of the run on noise, as it will compute and count them.

    Args:
        trainer: Where the run would be.
        probe: The model with its passes planned, its units begun.
        batch_size: Images of a batch.
    """
    clock = _Clock(probe, batch_size)
    with trainer.precision_plugin.forward_context():
        while True:
            plan = clock.passes.plan
            seconds = _of_step(clock, plan) / min(batch_size, plan.images)
            if clock.passes.plan == plan:
                return seconds
            # an out-of-memory has halved the rows: all begins anew


def _of_step(clock: "_Clock", plan: RowPlan) -> float:
    """Return the median seconds of a step, or what a step will take by some of its waves."""
    sampled = len(plan.waves) > LEAST_WAVES and not clock.probe.statistics  # statistics observe the first wave alone
    first = clock.seconds(plan.waves[-1:] if sampled else plan.waves)  # allocates, too
    if first * len(plan.waves) ** sampled > TIMED_SECONDS:
        return _of_waves(clock, plan) if sampled else first
    times: list[float] = []
    while not times or sum(times) < min(TIMED_SECONDS, 20 * times[0]):
        times.append(clock.seconds(plan.waves))
    return sorted(times)[len(times) // 2]


def _of_waves(clock: "_Clock", plan: RowPlan) -> float:
    """Time some waves, those with the least work first, and return what all take."""
    work = {wave: clock.passes.growing.layers_run(wave) for wave in plan.waves}
    times: dict[Wave, float] = {}
    for wave in sorted(plan.waves, key=lambda wave: work[wave]):
        if len(times) >= LEAST_WAVES and sum(times.values()) > TIMED_SECONDS:
            break
        times[wave] = clock.seconds((wave,))
    return whole_step(work, times)


def whole_step(work: dict[Wave, int], times: dict[Wave, float]) -> float:
    """Return the seconds of all waves, of which some were timed.

    Args:
        work: Layers that all rows of an image run through in each wave.
        times: Seconds of the waves that were timed.
    """
    known = np.array([(work[wave], len(wave)) for wave in times], dtype=float)
    (of_layer, of_mask), *_ = np.linalg.lstsq(known, np.array(list(times.values())), rcond=None)
    # no mask leaves out more than a layer, whatever other programs did to these times
    left_out = min(max(-of_mask / of_layer, 0.0), 1.0) if of_layer > 0 else 0.0
    done, every = (sum(work[wave] - left_out * len(wave) for wave in waves) for waves in (times, work))
    return float(sum(times.values()) * every / done)


class _Clock:
    """Times steps on noise.

    Args:
        probe: The model with its passes planned, its units begun.
        batch_size: Images of a batch.
    """

    def __init__(self, probe: HeadProbe, batch_size: int) -> None:
        if probe.passes is None:
            raise RunError("the forward passes are not planned")
        self.probe, self.passes = probe, probe.passes
        size = probe.data_config["input_size"]
        self._noise = torch.randint(0, 256, (batch_size, *size), dtype=torch.uint8, device=probe.device)
        self._done = 0

    def seconds(self, waves: Sequence[Wave]) -> float:
        """Return the seconds of a step in which the masks of other waves stand for nothing."""
        images: Tensor = self._noise[: self.passes.plan.images]
        rows = torch.arange(self._done, self._done + len(images))
        self._done += len(images)
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with _only(self.passes, tuple(waves)):
            began = time.perf_counter()
            step = self.probe.test_step(ImageBatch(images, labels, 0, rows, last=False, name="noise"), 0)
            step.logits.cpu()  # a GPU has finished only when its result is here
            return time.perf_counter() - began


@contextmanager
def _only(passes: ForwardPasses, waves: tuple[Wave, ...]) -> Iterator[None]:
    """Run some waves of the plan alone; the masks of others get the baseline's logits, as masks without heads do."""
    whole = passes.plan
    others = [variant for wave in whole.waves if wave not in waves for variant in wave]
    passes.plan = part = replace(whole, waves=waves, idle=(*whole.idle, *others))
    try:
        yield
    finally:
        if passes.plan is part:  # and no smaller one, after an out-of-memory
            passes.plan = whole
