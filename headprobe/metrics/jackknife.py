"""How certain a similarity is: intervals from leaving out one group of images at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from headprobe.metrics.head_moments import FloatArray


class Spread(NamedTuple):
    """Spread of an estimate, in the shape of the estimate; NaN below two groups or where a group has no value."""

    error: FloatArray  #: standard error
    low: FloatArray  #: lower limit of the 95% interval
    high: FloatArray  #: upper limit


def jackknife(
    estimate: ArrayLike,
    left_out: Sequence[ArrayLike],
    sizes: Sequence[int] | None = None,
    confidence: float = 0.95,
    largest: float = 1.0,
) -> Spread:
    """Delete-a-group jackknife: the spread of an estimate among those with one group of images left out.

    With ``h_j`` = images over the images of group j, pseudo-values ``h_j estimate - (h_j - 1) left_out_j`` and their
    centre ``c = G estimate - sum_j (1 - 1 / h_j) left_out_j``, the variance is the mean over groups of
    ``(pseudo-value_j - c)^2 / (h_j - 1)``; for equal groups that is ``(G - 1) / G`` times the sum of squares of the
    left-out estimates about their mean. The interval is Student's t with G - 1 degrees about the estimate of all
    images, which it therefore always holds, and is cut off at `largest`. Few samples per dim inflate all measures but
    unbiased CKA; towards the value that infinitely many samples would have the interval therefore reaches farther, by
    twice the jackknife's bias ``estimate - c``. Twice, because the bias of canonical correlations of unrelated
    directions falls with the square root of the samples, and the jackknife sees half of such a bias.

    Args:
        estimate: Of all images, any shape.
        left_out: One per group, each in the shape of the estimate.
        sizes: Images of each group; equal if not given.
        confidence: Coverage of the interval.
        largest: The largest value that there is: 1 for similarities, infinity for differences.

    Source: Busing, Meijer & van der Leeden, 1999, Statistics and Computing 9, 3-8 (unequal groups); Kott, 2001, Journal
    of Official Statistics 17, 521-526; the bias is Quenouille's, 1956, Biometrika 43.
    """
    value, groups = np.asarray(estimate, dtype=np.float64), len(left_out)
    if groups < 2:
        return Spread(*(np.full_like(value, np.nan) for _ in range(3)))
    others = np.asarray(left_out, dtype=np.float64)
    images = np.ones(groups) if sizes is None else np.asarray(sizes, dtype=np.float64)
    times = (images.sum() / images).reshape(-1, *[1] * value.ndim)
    centre = groups * value - ((1 - 1 / times) * others).sum(axis=0)
    pseudo = times * value - (times - 1) * others
    error = np.sqrt((np.square(pseudo - centre) / (times - 1)).mean(axis=0))
    reach = float(stats.t.isf((1 - confidence) / 2, groups - 1)) * error
    bias = 2 * (value - centre)
    low, high = value - reach - np.maximum(bias, 0), value + reach - np.minimum(bias, 0)
    return Spread(error, low, np.maximum(np.minimum(high, largest), value))


def above_floor(
    estimate: ArrayLike, floor: ArrayLike, error: ArrayLike, groups: int, confidence: float = 0.95
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Tell where an estimate exceeds its noise floor by more than chance; False where one of them is NaN.

    The floor is a single draw of what unrelated heads score, so for an unrelated pair it spreads as much as the
    estimate: one-sided t test of their difference with the standard error ``sqrt(2) * error``, G - 1 degrees.
    """
    limit = np.sqrt(2) * float(stats.t.isf(1 - confidence, max(groups - 1, 1))) * np.asarray(error, dtype=np.float64)
    return np.asarray(np.asarray(estimate) - np.asarray(floor) > limit)
