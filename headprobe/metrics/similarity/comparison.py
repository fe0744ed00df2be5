"""The comparison of a block's heads: their similarities, noise floors and intervals, and how a mask changes them.

Everything follows from the moments: the intervals from moments with one group of images left out at a time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.head_moments import HeadMoments
from headprobe.metrics.similarity.measures import MEASURES, VARIANCE, Measure, Similarities, similarities
from headprobe.metrics.similarity.moments import Moments


class Spread(NamedTuple):
    """Spread of an estimate, in the shape of the estimate; NaN below two groups or where a group has no value."""

    error: FloatArray  #: standard error
    low: FloatArray  #: lower limit of the 95% interval
    high: FloatArray  #: upper limit


class Comparison(NamedTuple):
    """The heads of one block compared with each other; every matrix is `[heads, heads]`."""

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
        UsageError: `variance` is outside its range, or a measure is unknown.
        RunError: A unit is incomplete.
    """
    sizes = tuple(int(images) for images in moments.images.tolist() if images)
    for number, block in enumerate(moments.compute()):
        found = similarities(block, variance, measures)
        floor = similarities(block, variance, measures, noise_floor=True).values if block.shifted else {}
        others = [similarities(other, variance, measures).values for other in moments.left_out(number)]

        spread: dict[Measure, Spread] = {}
        for measure in measures if others else ():
            left_out = [other[measure] for other in others]
            spread[measure] = _honest(measure, jackknife(found.values[measure], left_out, sizes))
        yield Comparison(block, found, floor, spread, others, sizes if others else ())


class Change(NamedTuple):
    """How much one model's heads are more alike than another's on the same images, `[heads, heads]`."""

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


def above_floor(
    estimate: ArrayLike, floor: ArrayLike, error: ArrayLike, groups: int, confidence: float = 0.95
) -> NDArray[np.bool_]:
    """Return where an estimate exceeds its noise floor by more than chance; False where one of them is NaN.

    The floor is a single draw of what unrelated heads score, so for an unrelated pair it spreads as much as the
    estimate: one-sided t test of their difference with the standard error `sqrt(2) * error`, G - 1 degrees.

    Args:
        estimate: Similarities, any shape.
        floor: Their noise floors, in the shape of the estimate.
        error: Standard errors of the estimate, in its shape.
        groups: Groups of images behind the standard errors, G.
        confidence: One minus the level of the test.
    """
    limit = np.sqrt(2) * float(stats.t.isf(1 - confidence, max(groups - 1, 1))) * np.asarray(error, dtype=np.float64)
    return np.asarray(np.asarray(estimate) - np.asarray(floor) > limit)


def jackknife(
    estimate: ArrayLike,
    left_out: Sequence[ArrayLike],
    sizes: Sequence[int] | None = None,
    confidence: float = 0.95,
    largest: float = 1.0,
) -> Spread:
    """Delete-a-group jackknife: the spread of an estimate among estimates with one group of images left out.

    With `h_j` = images over the images of group j, pseudo-values `h_j estimate - (h_j - 1) left_out_j` and their
    centre `c = G estimate - sum_j (1 - 1 / h_j) left_out_j`, the variance is the mean over groups of
    `(pseudo-value_j - c)^2 / (h_j - 1)`; for equal groups that is `(G - 1) / G` times the sum of squares of the
    left-out estimates about their mean.

    The interval is Student's t with G - 1 degrees about the estimate of all images, which it therefore always holds,
    and is cut off at `largest`. Few samples per dim inflate all measures but unbiased CKA. Towards the value that
    infinitely many samples would have the interval therefore reaches farther, by twice the jackknife's bias
    `estimate - c`. Twice, because the bias of canonical correlations of unrelated directions falls with the square root
    of the samples, and the jackknife finds half of such a bias.

    Args:
        estimate: The estimate of all images, any shape.
        left_out: One estimate per group, each in the shape of `estimate`.
        sizes: Images of each group; equal if not given.
        confidence: Coverage of the interval.
        largest: The largest value that there is: 1 for similarities, infinity for differences.

    Source: Busing, Meijer & van der Leeden, 1999, Statistics and Computing 9, 3-8 (unequal groups); Kott, 2001, Journal
    of Official Statistics 17, 521-526; the bias is Quenouille's, 1956, Biometrika 43.
    """
    value, groups = np.asarray(estimate, dtype=np.float64), len(left_out)
    if groups < 2:
        return Spread(*(np.full_like(value, np.nan) for _ in range(3)))

    others = np.asarray(left_out, dtype=np.float64)  # [groups, *shape of the estimate]
    images = np.ones(groups) if sizes is None else np.asarray(sizes, dtype=np.float64)
    times = (images.sum() / images).reshape(-1, *[1] * value.ndim)  # h_j, broadcast over the estimate
    centre = groups * value - ((1 - 1 / times) * others).sum(axis=0)
    pseudo = times * value - (times - 1) * others
    error = np.sqrt((np.square(pseudo - centre) / (times - 1)).mean(axis=0))

    reach = float(stats.t.isf((1 - confidence) / 2, groups - 1)) * error
    bias = 2 * (value - centre)
    low, high = value - reach - np.maximum(bias, 0), value + reach - np.minimum(bias, 0)
    return Spread(error, low, np.maximum(np.minimum(high, largest), value))
