"""All that is said about the similarity of a block's heads: values, noise floors and intervals, from the moments."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from headprobe.metrics.head_moments import FloatArray, HeadMoments
from headprobe.metrics.jackknife import Spread, jackknife
from headprobe.metrics.moments import Moments
from headprobe.metrics.similarity import MEASURES, VARIANCE, Measure, Similarities, similarities


class Comparison(NamedTuple):
    """The heads of one block compared with each other; every matrix is ``[heads, heads]``."""

    moments: HeadMoments  #: axes (layer, head), what a sample is, numbers of images and samples
    found: Similarities  #: values by measure, ranks and kept dims
    floor: dict[Measure, FloatArray]  #: what unrelated images score; empty where no noise floor was summed
    spread: dict[Measure, Spread]  #: standard error and 95% interval; empty below two groups of images
    left_out: list[dict[Measure, FloatArray]]  #: values without one group of images, one entry per group
    sizes: tuple[int, ...]  #: images of each group

    @property
    def groups(self) -> int:
        """Groups of images behind the spread."""
        return len(self.left_out)


def compare(
    moments: Moments, variance: float = VARIANCE, measures: Sequence[Measure] = MEASURES
) -> Iterator[Comparison]:
    """Yield the comparison of each block (see `similarities`).

    Raises:
        UsageError: `variance` outside its range or an unknown measure.
        RunError: A unit is open.
    """
    filled = tuple(int(images) for images in moments.images.tolist() if images)
    for number, block in enumerate(moments.compute()):
        found = similarities(block, variance, measures)
        floor = similarities(block, variance, measures, noise_floor=True).values if block.shifted else {}
        others = [similarities(other, variance, measures).values for other in moments.left_out(number)]
        spread = {
            measure: _honest(measure, jackknife(found.values[measure], [other[measure] for other in others], filled))
            for measure in measures
            if others
        }
        yield Comparison(block, found, floor, spread, others, filled if others else ())


class Change(NamedTuple):
    """How much one model's heads are more alike than another's on the same images, ``[heads, heads]``."""

    value: FloatArray
    spread: Spread | None  #: None without groups of images


def changes(baseline: Comparison, masked: Comparison) -> dict[Measure, Change]:
    """Return masked minus baseline, its spread from leaving out the same images in both (paired)."""
    found: dict[Measure, Change] = {}
    for measure, value in masked.found.values.items():
        pairs = zip(masked.left_out, baseline.left_out, strict=True)
        others = [np.asarray(one[measure] - other[measure]) for one, other in pairs]
        difference = value - baseline.found.values[measure]
        spread = jackknife(difference, others, masked.sizes, largest=np.inf) if others else None
        found[measure] = Change(difference, None if spread is None else _honest(measure, spread))
    return found


def _honest(measure: Measure, spread: Spread) -> Spread:
    """Leave out the limits of PWCCA: its value depends on the sample, and simulated intervals covered 69 to 79%."""
    nothing = np.full_like(spread.error, np.nan)
    return spread._replace(low=nothing, high=nothing) if measure == "pwcca" else spread
