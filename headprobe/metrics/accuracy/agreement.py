"""Do two ways to measure masks put them into the same order? Rank correlations with intervals over images."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from headprobe.metrics.accuracy.jackknife import jackknife_interval, leave_one_out
from headprobe.metrics.arrays import FloatArray, IntArray

FEWEST_ORDERED = 3
"""Fewer masks have no order worth a number."""

FEWEST_WITH_INTERVAL = 8
"""With fewer masks a group that is left out often changes no rank, and the interval is too narrow (covers 0.82)."""


class RankAgreement(NamedTuple):
    """How far two orders of the same masks agree, with 95% intervals over images."""

    spearman: float  #: Spearman's rank correlation; NaN where all masks of one side are equal
    spearman_low: float  #: NaN with fewer than 8 masks, or where no group of images changes a rank
    spearman_high: float
    kendall: float  #: Kendall's tau-b
    kendall_low: float
    kendall_high: float


def rank_agreement(first: FloatArray, second: FloatArray, images: IntArray) -> RankAgreement:
    """Compare the order of masks by two quantities that were measured on the same images.

    The masks are fixed and the images are sampled: the intervals are for the correlation of the quantities over all
    images that these stand for. They come from a delete-a-group jackknife on Fisher's z. A correlation counts as at
    most half a swap of neighbours away from 1, so that z is finite.

    Noise moves a rank correlation: towards 0 where the noise of the two sides is independent, towards 1 where both
    share it. No interval around the estimate corrects that (docs/results.md has its coverage).

    Args:
        first: Sums over the images of each group, `[masks, groups]`.
        second: Sums of the other quantity.
        images: Images of each group, `[groups]`.

    Source: Fieller, Hartley and Pearson, 1957, Biometrika 44, 470-481 (z of rank correlations).
    """
    masks = len(first)
    whole = first.sum(axis=-1), second.sum(axis=-1)  # each [masks]
    without = leave_one_out(first, images), leave_one_out(second, images)  # each [groups, masks]
    found: list[float] = []
    for correlation, nearest in ((_spearman, 1 - 6 / (masks**3 - masks)), (_kendall, 1 - 2 / (masks**2 - masks))):
        estimate = float(correlation(*(values[None] for values in whole))[0])
        found += [estimate, *_interval(estimate, correlation(*without), nearest, masks)]
    return RankAgreement(*found)


def _interval(estimate: float, replicates: FloatArray, nearest: float, masks: int) -> tuple[float, float]:
    """Return the interval of a correlation on Fisher's z, cut at `nearest`, the largest that z is taken of."""
    undefined = float("nan"), float("nan")
    if masks < FEWEST_WITH_INTERVAL or not np.ptp(replicates) > 0:
        return undefined
    z = np.arctanh(np.clip([estimate, *replicates], -nearest, nearest))
    low, high = jackknife_interval(float(z[0]), z[1:])
    return float(np.tanh(low)), float(np.tanh(high))


def _spearman(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return Spearman's rank correlation of each row of `[rows, masks]`, NaN where one side does not vary."""
    ranks = [stats.rankdata(values, axis=-1) for values in (first, second)]
    one, other = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    size = np.sqrt(np.square(one).sum(axis=-1) * np.square(other).sum(axis=-1))
    product = (one * other).sum(axis=-1)
    known = (size > 0) & np.isfinite(first).all(axis=-1) & np.isfinite(second).all(axis=-1)
    return np.where(known, product / np.where(size > 0, size, 1), np.nan)


def _kendall(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return Kendall's tau-b of each row of `[rows, masks]`, NaN where one side does not vary."""
    values = [
        stats.kendalltau(one, other).statistic if np.isfinite([one, other]).all() else np.nan
        for one, other in zip(first, second, strict=True)
    ]
    return np.asarray(values, dtype=np.float64)


def mean_of_sums(sums: FloatArray, images: IntArray) -> tuple[float, float, float]:
    """Return the mean over images of a sum by group, `[groups]`, with its interval."""
    total = int(images.sum())
    estimate = float(sums.sum() / total) if total else float("nan")
    return estimate, *jackknife_interval(estimate, leave_one_out(sums, images))
