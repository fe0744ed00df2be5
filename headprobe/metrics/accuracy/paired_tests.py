"""Statistics of two answers to the same images, baseline and masked. Pure functions, numpy in and numpy out."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

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
    It leaves out 0 exactly where `mcnemar_p`, which is the same test at a drop of 0, is significant.

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
    """Two-sided p of McNemar's test: are flips equally likely in both directions? 1 where nothing flips.

    The test is `z = (lost - won) / sqrt(lost + won)` against the normal distribution, Tango's score test at a drop of
    0: `drop_interval_pp` leaves out 0 exactly where p is below 1 minus its confidence.

    Source: McNemar, 1947, Psychometrika 12, 153-157, without correction for continuity.
    """
    lost, won = (np.asarray(flips, dtype=np.float64) for flips in (right_to_wrong, wrong_to_right))
    z = np.abs(lost - won) / np.sqrt(np.maximum(lost + won, 1))
    return np.asarray(2 * stats.norm.sf(z), dtype=np.float64)


def bh_q(p_values: ArrayLike) -> FloatArray:
    """Benjamini-Hochberg q: the share of false discoveries accepted by calling this p and all smaller ones real.

    Args:
        p_values: p of each test of one test family, `[tests]`; NaN means that there was no test, and stays NaN.

    Raises:
        ValueError: A p lies outside 0 to 1.

    Source: Benjamini and Hochberg, 1995, Journal of the Royal Statistical Society B 57, 289-300.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"a p value must lie between 0 and 1, got {p[(p < 0) | (p > 1)][0]}")
    q = np.full_like(p, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q


def log_e_value(right_to_wrong: ArrayLike, wrong_to_right: ArrayLike) -> FloatArray:
    """Natural logarithm of an e-value: how much a bet that flips favour one direction has won so far; 0 without flips.

    `E = 2^(b + c) B(b + 1/2, c + 1/2) / B(1/2, 1/2)`: the likelihood of this order of b + c flips under a Bernoulli(p)
    with p from a Beta(1/2, 1/2), divided by that under a fair coin. Where each flip is a fair coin given those before
    it, E is a martingale that starts at 1: at most one run in twenty ever sees an E of 20 (Ville's inequality).

    Source: the mixture, Robbins, 1970, Annals of Mathematical Statistics 41, 1397-1409; Beta(1/2, 1/2), Krichevsky and
    Trofimov, 1981, IEEE Transactions on Information Theory 27, 199-207; e-values, Ramdas, Gruenwald, Vovk and Shafer,
    2023, Statistical Science 38, 576-601.
    """
    lost, won = (np.asarray(flips, dtype=np.float64) for flips in (right_to_wrong, wrong_to_right))
    bet = special.betaln(lost + 0.5, won + 0.5) - special.betaln(0.5, 0.5)
    return np.asarray((lost + won) * np.log(2) + bet, dtype=np.float64)


def p_of_e(log_e_values: ArrayLike) -> FloatArray:
    """Return 1/E, at most 1: a p-value at any stop. `bh_q` of it is e-BH: E beside p needs no independence of tests.

    Source: Wang and Ramdas, 2022, Journal of the Royal Statistical Society B 84, 822-852.
    """
    return np.asarray(np.exp(-np.maximum(log_e_values, 0)), dtype=np.float64)


def mean_interval(power_sums: ArrayLike, images: ArrayLike, confidence: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Interval of the mean of paired differences that are mostly near 0 and now and then large, from sums of powers.

    Student's interval with two corrections, which make it wider and never narrower. Its degrees of freedom are those
    of a variance estimated from differences of this kurtosis (Satterthwaite's rule), at most n - 1. On the side of the
    longer tail the limit is moved out by the skewness, to the first order of Edgeworth's expansion.

    Args:
        power_sums: Sums of the differences and of their 2nd, 3rd and 4th powers, `[4, ...]`.
        images: How many differences there are.
        confidence: Share of the samples whose interval should cover the true mean.

    Returns:
        The lower and the upper limit in the unit of the differences, NaN with fewer than two images.

    Source: Student, 1908, Biometrika 6, 1-25; Satterthwaite, 1946, Biometrics Bulletin 2, 110-114; Hall, 1983,
    Annals of Statistics 11, 569-576.
    """
    count = np.asarray(images, dtype=np.float64)
    count = np.where(count >= 2, count, np.nan)
    with np.errstate(invalid="ignore"):  # sums that hold an infinite NLL give NaN
        mean, variance, skewness, kurtosis = _moments(np.asarray(power_sums, dtype=np.float64) / count, count)
    student = np.asarray(stats.t.isf((1 - confidence) / 2, count - 1))
    freedom = np.minimum(2 / (2 / (count - 1) + (kurtosis - 3) / count), count - 1)
    wide = np.asarray(stats.t.isf((1 - confidence) / 2, freedom))
    lean = skewness * (2 * student**2 + 1) / (6 * np.sqrt(count))
    error = np.sqrt(variance / (count - 1))
    return mean - error * (wide + np.maximum(-lean, 0)), mean + error * (wide + np.maximum(lean, 0))


def smallest_resolvable_drop(
    images: int, flips_fraction: float = 0.02, power: float = 0.8, significance: float = 0.05
) -> float:
    """Smallest true drop, in percentage points, that `mcnemar_p` finds with this power on so many images.

    The fraction of images whose correctness flips is taken to be the drop itself plus a churn of `flips_fraction`, half
    of it in each direction. The power is exact: it is summed over all numbers of flips.

    Args:
        images: Images in the test.
        flips_fraction: Fraction of images that flip without net effect; more churn hides larger drops.
        power: Probability of finding the drop.
        significance: Two-sided level of the test.

    Returns:
        The drop in percentage points, NaN where even the largest possible one would be missed.

    Raises:
        UsageError: An argument is outside its range.
    """
    if images < 0:
        raise UsageError(f"images must be 0 or more, got {images}")
    if not 0 <= flips_fraction < 1:
        raise UsageError(f"flips_fraction must be a fraction from 0 to below 1, got {flips_fraction}")
    for name, value in (("power", power), ("significance", significance)):
        if not 0 < value < 1:
            raise UsageError(f"{name} must lie between 0 and 1, got {value}")

    def excess(drop: FloatArray) -> FloatArray:
        return np.asarray(_power(images, float(drop), flips_fraction, significance) - power)

    largest = np.asarray(1.0 - flips_fraction)
    if images == 0 or excess(largest) < 0:
        return float("nan")
    return 100 * float(_bisect(excess, np.zeros(()), largest, steps=30))


def _power(images: int, drop: float, churn: float, significance: float) -> float:
    """Return the probability that McNemar's test finds a drop, as a fraction, below a level of significance."""
    flips_rate, z = churn + drop, float(stats.norm.isf(significance / 2))
    if flips_rate == 0:
        return 0.0
    # Numbers of flips that are not all but impossible: ten standard deviations around the expected one.
    reach = 10 * np.sqrt(images * flips_rate) + 10
    flips = np.arange(max(0, int(images * flips_rate - reach)), min(images, int(images * flips_rate + reach)) + 1)
    needed = np.floor((flips + z * np.sqrt(flips)) / 2) + 1  # the fewest of them in one direction that are significant
    lost = churn / 2 + drop
    found = stats.binom.sf(needed - 1, flips, lost / flips_rate) + stats.binom.cdf(
        flips - needed, flips, lost / flips_rate
    )
    return float(np.sum(stats.binom.pmf(flips, images, flips_rate) * found))


def _moments(means: FloatArray, count: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return mean, variance, skewness and kurtosis from the means of powers 1 to 4; a constant is no longer skewed."""
    first, second, third, fourth = means
    variance = np.maximum(second - first**2, 0)  # rounding may leave -1e-20 where nothing changed
    spread = np.where(variance > 0, variance, 1)
    skewness = (third - 3 * first * second + 2 * first**3) / spread**1.5
    kurtosis = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / spread**2
    # No sample lies outside these bounds, and rounding does not lead out of them either.
    bound = np.sqrt(count)
    return first, variance, np.clip(skewness, -bound, bound), np.clip(kurtosis, 1, count)


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
        return images * (estimate - drop) ** 2 - z_square * null_variance(lost, won, drop)

    return _bisect(excess, estimate, np.ones_like(estimate))


def null_variance(lost: FloatArray, won: FloatArray, drop: FloatArray) -> FloatArray:
    """Return the variance of one image's difference at the flip rates that are most likely for a difference `drop`.

    With a drop of 0 or more the rate `won` solves a quadratic equation, with a sum of two squares as its discriminant;
    a gain is the same problem with the roles exchanged.
    """
    first, second, size = np.where(drop < 0, won, lost), np.where(drop < 0, lost, won), np.abs(drop)
    linear = (2 - first + second) * size - first - second
    rate = (np.sqrt(linear**2 + 8 * second * size * (1 - size)) - linear) / 4
    return np.asarray(2 * rate + size * (1 - size))


def _bisect(
    function: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray, steps: int = BISECTIONS
) -> FloatArray:
    """Find where the function turns from 0 or below (at `low`) to above 0, element by element; NaN stays NaN."""
    for _ in range(steps):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
