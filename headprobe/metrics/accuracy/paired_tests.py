"""Statistics of two answers to the same images, baseline and masked. Pure functions, numpy in and numpy out."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray

BISECTIONS = 64  # halves an interval of length 2 to 1e-19, below the rounding of a fraction


def drop_pp(right_to_wrong: ArrayLike, wrong_to_right: ArrayLike, images: ArrayLike) -> FloatArray:
    """Baseline top-1 minus masked top-1 on the same images, percentage points; NaN without images.

    Raises:
        ValueError: A count is negative, or more images flipped than there are.
    """
    lost, won, total = _flips(right_to_wrong, wrong_to_right, images)
    return 100 * (lost - won) / total


def drop_interval_pp(
    right_to_wrong: ArrayLike, wrong_to_right: ArrayLike, images: ArrayLike, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Interval of `drop_pp` from Tango's score test, percentage points: all drops that the test does not reject.

    The limits solve `n (d - D)^2 = z^2 v(D)`, v(D) being the variance at the flip rates most likely under a drop D.
    In this squared form both limits exist for every table with an image, so no second method is needed: without a
    flip they are `-+z^2 / (n + z^2)` (Wilson's limits for 0 of n), and where every image flips one of them is 100.
    At 95% it leaves out 0 exactly where McNemar's asymptotic test has p < 0.05; the exact p may be slightly larger.

    Returns:
        The lower and the upper limit, NaN without images.

    Raises:
        ValueError: A count is negative, or more images flipped than there are.

    Source: Tango, 1998, Statistics in Medicine 17, 891-908.
    """
    lost, won, total = _flips(right_to_wrong, wrong_to_right, images)
    z_square = float(stats.norm.isf((1 - confidence) / 2)) ** 2
    high = _tango_upper(lost / total, won / total, total, z_square)
    low = -_tango_upper(won / total, lost / total, total, z_square)
    return 100 * low, 100 * high


def mcnemar_p(right_to_wrong: ArrayLike, wrong_to_right: ArrayLike) -> FloatArray:
    """Two-sided p of McNemar's exact test: are flips equally likely in both directions? 1 where nothing flips.

    Source: McNemar, 1947, Psychometrika 12, 153-157; exact form: binomial with probability 1/2, given the flips.
    """
    lost, won = np.broadcast_arrays(np.asarray(right_to_wrong), np.asarray(wrong_to_right))
    tail = stats.binom.cdf(np.minimum(lost, won), lost + won, 0.5)
    return np.minimum(1.0, 2 * np.asarray(tail, dtype=np.float64))


def bh_q(p_values: ArrayLike, test_families: Sequence[str]) -> FloatArray:
    """Benjamini-Hochberg q: the share of false discoveries accepted by calling this p and all smaller ones real.

    Args:
        p_values: p of each mask, `[masks]`; NaN means that there was no test, and stays NaN.
        test_families: The test family of each mask, `[masks]`. p-values are corrected within it only. The empty text
            stands for none, and q is NaN: baselines, nulls and repeats belong to no test family.

    Raises:
        ValueError: The lengths differ, or a p lies outside 0 to 1.

    Source: Benjamini and Hochberg, 1995, Journal of the Royal Statistical Society B 57, 289-300.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.shape != (len(test_families),):
        found = f"{p.shape} and {len(test_families)}"
        raise ValueError(f"p_values and test_families must have one entry per mask, got {found}")
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"a p value must lie between 0 and 1, got {p[(p < 0) | (p > 1)][0]}")
    q = np.full_like(p, np.nan)
    labels = np.asarray(test_families, dtype=np.str_)
    for test_family in set(test_families) - {""}:
        tested = (labels == test_family) & ~np.isnan(p)
        if tested.any():
            q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q


def mean_interval(
    total: ArrayLike, square_total: ArrayLike, images: ArrayLike, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Interval of the mean of paired differences, from their sum and their sum of squares: Student's t, n - 1 degrees.

    Returns:
        The lower and the upper limit in the unit of the differences, NaN with fewer than two images.

    Source: Student, 1908, Biometrika 6, 1-25.
    """
    sums, squares, count = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (total, square_total, images))
    )
    count = np.where(count >= 2, count, np.nan)
    mean = sums / count
    variance = np.maximum(squares - sums * mean, 0) / (count - 1)  # rounding may leave -1e-20 where nothing changed
    half = np.asarray(stats.t.isf((1 - confidence) / 2, count - 1)) * np.sqrt(variance / count)
    return mean - half, mean + half


def smallest_resolvable_drop(
    images: int, flips_fraction: float = 0.02, power: float = 0.8, significance: float = 0.05
) -> float:
    """Smallest true drop, in percentage points, that McNemar's test finds with this power on so many images.

    Solves Connor's formula `n d^2 = (z_a sqrt(f) + z_b sqrt(f - d^2))^2` for the drop d. It assumes that the fraction f
    of images with flipped correctness is the drop itself plus a churn of `flips_fraction`, half of it in each
    direction. The formula is for the asymptotic test: with few flips the exact one needs a slightly larger drop.

    Args:
        images: Images in the test.
        flips_fraction: Fraction of images that flip without net effect; more churn hides larger drops.
        power: Probability of finding the drop.
        significance: Two-sided level of the test.

    Returns:
        The drop in percentage points, NaN where even the largest possible one would be missed.

    Raises:
        UsageError: An argument is outside its range.

    Source: Connor, 1987, Biometrics 43, 207-211 (after Miettinen, 1968, Biometrics 24, 339-352).
    """
    if images < 0:
        raise UsageError(f"images must be 0 or more, got {images}")
    if not 0 <= flips_fraction < 1:
        raise UsageError(f"flips_fraction must be a fraction from 0 to below 1, got {flips_fraction}")
    for name, value in (("power", power), ("significance", significance)):
        if not 0 < value < 1:
            raise UsageError(f"{name} must lie between 0 and 1, got {value}")
    z_level, z_power = float(stats.norm.isf(significance / 2)), float(stats.norm.ppf(power))

    def excess(drop: FloatArray) -> FloatArray:
        flips = flips_fraction + drop
        noise = z_level * np.sqrt(flips) + z_power * np.sqrt(np.maximum(flips - drop**2, 0))
        return np.asarray(np.sqrt(images) * drop - noise)

    largest = np.asarray(1.0 - flips_fraction)
    if excess(largest) < 0:
        return float("nan")
    return 100 * float(_bisect(excess, np.zeros(()), largest))


def _flips(lost: ArrayLike, won: ArrayLike, images: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the three counts as float64 of one shape, with NaN in place of 0 images."""
    flips = [np.asarray(value, dtype=np.float64) for value in (lost, won, images)]
    first, second, total = np.broadcast_arrays(*flips)
    wrong = (first < 0) | (second < 0) | (first + second > total)
    if wrong.any():
        culprit = first[wrong][0], second[wrong][0], total[wrong][0]
        raise ValueError(f"flips must be 0 or more and together at most the images, got {culprit} (lost, won, images)")
    return first, second, np.where(total > 0, total, np.nan)


def _tango_upper(lost: FloatArray, won: FloatArray, images: FloatArray, z_square: float) -> FloatArray:
    """Return the upper limit of Tango's interval for `lost - won`; all are fractions of the images."""
    estimate = lost - won

    def excess(drop: FloatArray) -> FloatArray:
        return images * (estimate - drop) ** 2 - z_square * _null_variance(lost, won, drop)

    return _bisect(excess, estimate, np.ones_like(estimate))


def _null_variance(lost: FloatArray, won: FloatArray, drop: FloatArray) -> FloatArray:
    """Return the variance of one image's difference at the flip rates that are most likely for a difference `drop`.

    With a drop of 0 or more the rate `won` solves a quadratic equation, with a sum of two squares as its discriminant;
    a gain is the same problem with the roles exchanged.
    """
    first, second, size = np.where(drop < 0, won, lost), np.where(drop < 0, lost, won), np.abs(drop)
    linear = (2 - first + second) * size - first - second
    rate = (np.sqrt(linear**2 + 8 * second * size * (1 - size)) - linear) / 4
    return np.asarray(2 * rate + size * (1 - size))


def _bisect(function: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray) -> FloatArray:
    """Find where the function turns from 0 or below (at `low`) to above 0, element by element; NaN stays NaN."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
