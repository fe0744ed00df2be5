"""All that is said about the similarity of a block's heads: values, noise floors and intervals, from the moments."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    groups: int  #: groups of images behind the spread


def compare(
    moments: Moments, variance: float = VARIANCE, measures: Sequence[Measure] = MEASURES
) -> Iterator[Comparison]:
    """Yield the comparison of each block (see `similarities`).

    Raises:
        UsageError: `variance` outside its range or an unknown measure.
        RunError: A unit is open.
    """
    for number, block in enumerate(moments.compute()):
        found = similarities(block, variance, measures)
        floor = similarities(block, variance, measures, noise_floor=True).values if block.shifted else {}
        others = [similarities(other, variance, measures).values for other in moments.left_out(number)]
        spread = {
            measure: jackknife(found.values[measure], [other[measure] for other in others])
            for measure in measures
            if others
        }
        yield Comparison(block, found, floor, spread, len(others))
