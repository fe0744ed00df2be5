"""An exact upper limit of the drop of top-1: the drop lies below it in 95 of 100 data sets or more, of any size.

Limits of a score test hold for many changed answers. Where a few decide, as they do when a mask costs hardly anything,
an exact one is counted out: no normal distribution stands in for that of the counts.
"""

import numpy as np
from scipy import optimize, special, stats

from headprobe.metrics.accuracy.paired_tests import drop_interval_pp, null_variance
from headprobe.metrics.arrays import FloatArray, IntArray

OUTSIDE = 1e-5
"""Chance that the rate of gains lies outside of those that are tried; it is taken off the chance to err."""

RATES = 61
"""Rates of gains that are tried, a seventh of a standard deviation of their estimate apart."""

TAIL = 1e-9
"""Chance of numbers of gains, at each end, that are not counted out; taken off the chance to err too."""

ROUNDING = 1e-9


def exact_drop_limit_pp(lost: int, won: int, images: int, confidence: float = 0.95) -> float:
    """Return the exact upper one-sided limit of the drop of top-1, percentage points; NaN without images.

    Data sets are put in the order of their score limits (Tango). The limit is the largest drop under which one that is
    as good as this, or better, has a chance above 1 minus the confidence, whatever the rate of gains: Buehler's limit,
    the smallest that holds for every drop and keeps the order. Rates that the number of gains rules out are left alone
    (Berger and Boos). Without a changed answer it is `1 - (1 - confidence)^(1/n)` of n images, where they are 20 or
    more: that of Clopper and Pearson for 0 of n.

    Args:
        lost: Images that only the whole model has right.
        won: Images that only the masked model has right.
        images: All images.
        confidence: Share of data sets, at least, whose limit lies above the true drop.

    Source: Lloyd and Moldovan, 2007, Statistics in Medicine 26, 3369-3384; Sidik, 2003, Statistics in Medicine 22,
    265-278; Berger and Boos, 1994, Journal of the American Statistical Association 89, 1012-1016.
    """
    if images == 0:
        return float("nan")
    if lost == images:
        return 100.0
    rates = _rates_of_gains(won, images)  # [rates]
    ends = stats.binom.ppf(TAIL, images, rates[0]), stats.binom.isf(TAIL, images, rates[-1])
    gains = np.arange(int(min(*ends, won)), int(max(*ends, won)) + 1)  # [gains]
    chances = stats.binom.pmf(gains, images, rates[:, None])  # [rates, gains]
    score = float(drop_interval_pp(lost, won, images, 2 * confidence - 1)[1]) / 100
    most = _most_losses(lost, won, images, gains, score, confidence)  # [gains]
    level = 1 - confidence - OUTSIDE - 2 * TAIL

    def chance(drop: float, rates: FloatArray, chances: FloatArray) -> float:
        """Return the chance of such data, or better, at the rate of gains that makes it largest."""
        share = np.clip((rates + drop) / np.maximum(1 - rates, ROUNDING), 0, 1)  # of images without a gain
        fewer = special.bdtr(np.maximum(most, 0), images - gains, share[:, None]) * (most >= 0)  # [rates, gains]
        possible = 2 * rates + drop <= 1 + ROUNDING
        return float(np.max((chances * fewer).sum(axis=1) * possible))

    def excess(drop: float) -> float:
        """Return by how much that is too large; beside the rates stands the largest that leaves room for the drop."""
        edge = np.clip([(1 - drop) / 2], rates[0], rates[-1])
        at_edge = chance(drop, edge, stats.binom.pmf(gains, images, edge[:, None]))
        return max(at_edge, chance(drop, rates, chances)) - level

    step = (score - (lost - won) / images) / 4
    low = high = score  # the limit is near it
    while low > -1 and excess(low) <= 0:
        low = max(low - step, -1.0)
    while high < 1 and excess(high) > 0:
        high = min(high + step, 1.0)
    return 100 * float(optimize.brentq(excess, low, high, xtol=1e-9))


def _rates_of_gains(won: int, images: int) -> FloatArray:
    """Return the rates that a number of gains does not rule out, by Clopper and Pearson, from the least to the most."""
    low = stats.beta.ppf(OUTSIDE / 2, won, images - won + 1) if won else 0.0
    high = stats.beta.isf(OUTSIDE / 2, won + 1, images - won) if won < images else 1.0
    angles = np.linspace(np.arcsin(np.sqrt(low)), np.arcsin(np.sqrt(high)), RATES)
    return np.asarray(np.sin(angles) ** 2)


def _most_losses(lost: int, won: int, images: int, gains: IntArray, limit: float, confidence: float) -> IntArray:
    """Return for each number of gains the most losses whose score limit is no higher than this one, of the data.

    Returns:
        `[gains]`; -1 where not even 0 losses are few enough.
    """
    z_square = float(stats.norm.isf(1 - confidence)) ** 2 * (1 - ROUNDING)
    low, high = np.full(len(gains), -1), images - gains + 1
    for _ in range(images.bit_length() + 1):
        middle = (low + high) // 2
        losses = np.clip(middle, 0, images - gains)
        away = (losses - gains) / images - limit
        variance = null_variance(losses / images, gains / images, np.asarray(limit))
        good = (away <= 0) & (images * away**2 >= z_square * variance)
        good |= middle < 0
        good &= middle <= images - gains
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return np.where(gains == won, np.maximum(low, lost), low)
