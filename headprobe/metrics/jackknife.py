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


def jackknife(estimate: ArrayLike, left_out: Sequence[ArrayLike], confidence: float = 0.95) -> Spread:
    """Delete-a-group jackknife: the spread of an estimate among those with one group of images left out.

    The variance is ``(G - 1) / G`` times the sum of squares of the G left-out estimates about their mean. The interval
    is Student's t with G - 1 degrees about the estimate of all images, which it therefore always holds, and is cut off
    at 1, the largest similarity. Few samples per dim inflate all measures but unbiased CKA; towards the value that
    infinitely many samples would have the interval therefore reaches farther, by twice the jackknife's bias
    ``(G - 1) (mean of the left-out - estimate)``. Twice, because the bias of canonical correlations of unrelated
    directions falls with the square root of the samples, and the jackknife sees half of such a bias.

    Args:
        estimate: Of all images, any shape.
        left_out: One per group, each in the shape of the estimate.
        confidence: Coverage of the interval.

    Source: Kott, 2001, Journal of Official Statistics 17, 521-526; the bias is Quenouille's, 1956, Biometrika 43.
    """
    value, groups = np.asarray(estimate, dtype=np.float64), len(left_out)
    if groups < 2:
        return Spread(*(np.full_like(value, np.nan) for _ in range(3)))
    others = np.asarray(left_out, dtype=np.float64)
    error = np.sqrt((groups - 1) / groups * np.square(others - others.mean(axis=0)).sum(axis=0))
    reach = float(stats.t.isf((1 - confidence) / 2, groups - 1)) * error
    bias = 2 * (groups - 1) * (others.mean(axis=0) - value)
    low, high = value - reach - np.maximum(bias, 0), value + reach - np.minimum(bias, 0)
    return Spread(error, low, np.maximum(np.minimum(high, 1.0), value))


def above_floor(
    estimate: ArrayLike, floor: ArrayLike, error: ArrayLike, groups: int, confidence: float = 0.95
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Tell where an estimate exceeds its noise floor by more than chance; False where one of them is NaN.

    The floor is a single draw of what unrelated heads score, so for an unrelated pair it spreads as much as the
    estimate: one-sided t test of their difference with the standard error ``sqrt(2) * error``, G - 1 degrees.
    """
    limit = np.sqrt(2) * float(stats.t.isf(1 - confidence, max(groups - 1, 1))) * np.asarray(error, dtype=np.float64)
    return np.asarray(np.asarray(estimate) - np.asarray(floor) > limit)
