"""Does a mask cost more in one run than in another? Differences of means over images, with intervals and p-values.

All follows from sums over groups of images: in one run's images a mask's costs are paired by image already.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from headprobe.metrics.accuracy.jackknife import mean_with_error, welch_degrees
from headprobe.metrics.arrays import FloatArray, IntArray


class Differences(NamedTuple):
    """The second run's mean minus the first's, one entry per mask, `[masks]`."""

    b_minus_a: FloatArray
    low: FloatArray  #: lower limit of the 95% interval; it leaves out 0 exactly where p is below 0.05
    high: FloatArray  #: upper limit
    p: FloatArray  #: two-sided; 1 where the means are equal, NaN where nothing tells how far images differ


def paired_differences(first: FloatArray, second: FloatArray, images: IntArray) -> Differences:
    """Compare means over the very same images: Student's test of the image groups' differences.

    The error is the delete-a-group jackknife's, the degrees of freedom are one less than the groups with images.

    Args:
        first: Sums over the images of each group, `[masks, groups]`.
        second: The same of the other run.
        images: Images of each group, in both runs, `[groups]`.

    Source: Kott, 2001, Journal of Official Statistics 17, 521-526.
    """
    with np.errstate(invalid="ignore"):  # infinite minus infinite: a difference that is not defined
        estimates, errors = mean_with_error(second - first, images)
    degrees = np.full(estimates.shape, max(int((images > 0).sum()) - 1, 1), dtype=np.float64)
    return _tested(estimates, errors, degrees)


def two_sample_differences(
    first: FloatArray, first_images: IntArray, second: FloatArray, second_images: IntArray
) -> Differences:
    """Compare means over images that were drawn apart: Welch's test with the jackknife's errors of both means.

    Where some images are in both samples the interval is too wide rather than too narrow, as the same images cost
    more in both.

    Args:
        first: Sums over the images of each group, `[masks, groups]`.
        first_images: Images of each group, `[groups]`.
        second: The same of the other run, `[masks, other groups]`.
        second_images: Images of each of its groups.

    Source: Welch, 1947, Biometrika 34, 28-35; Satterthwaite, 1946, Biometrics Bulletin 2, 110-114.
    """
    (one, one_error), (other, other_error) = (
        mean_with_error(first, first_images),
        mean_with_error(second, second_images),
    )
    groups = [max(int((images > 0).sum()), 2) for images in (first_images, second_images)]
    with np.errstate(invalid="ignore"):
        estimates = other - one
    variances = np.stack([np.square(one_error), np.square(other_error)])  # [2, masks]
    return _tested(estimates, np.sqrt(variances.sum(axis=0)), welch_degrees(variances, groups))


def _tested(estimates: FloatArray, errors: FloatArray, degrees: FloatArray) -> Differences:
    """Return differences with Student's interval and p; without any spread only equal means can be compared."""
    equal = estimates == 0
    known = np.where(errors > 0, errors, np.nan)
    reach = stats.t.isf(0.025, degrees) * known
    p = np.where(equal, 1.0, 2 * stats.t.sf(np.abs(estimates) / known, degrees))
    # Equal means of groups without any spread, as of a run and itself, differ by 0 and nothing else.
    reach = np.where(equal & (errors == 0), 0.0, reach)
    return Differences(estimates, estimates - reach, estimates + reach, np.asarray(p, dtype=np.float64))
