"""Do two ways to measure masks put them into the same order? Rank correlations with intervals over images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from headprobe.metrics.accuracy.jackknife import jackknife_error, jackknife_interval, leave_one_out, welch_degrees
from headprobe.metrics.arrays import FloatArray, IntArray

FEWEST_ORDERED = 3
"""Fewer masks have no order worth a number."""

FEWEST_WITH_INTERVAL = 8
"""With fewer masks a group that is left out often changes no rank, and the interval is too narrow (covers 0.82).

Within blocks as many pairs are asked for as eight masks have: 28.
"""

HALVINGS = 100
"""How many random halves of the image groups a reliability is the mean of."""


class RankAgreement(NamedTuple):
    """How far two orders of the same masks agree, with 95% intervals over images."""

    spearman: float  #: Spearman's rank correlation; NaN where all masks of one side are equal
    spearman_low: float  #: NaN with fewer than 8 masks, or where no group of images changes a rank
    spearman_high: float
    kendall: float  #: Kendall's tau-b
    kendall_low: float
    kendall_high: float


class Reliability(NamedTuple):
    """How far a quantity orders masks in the same way on other images of the same kind."""

    split_half: float  #: mean Spearman correlation of the two halves of the images, over `HALVINGS` random halves
    reliability: float  #: of all images (Spearman-Brown): what as many other images would agree with these
    ceiling: float  #: its root: what a score that knows the true order would reach; NaN where halves do not agree


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
    blocks = _one_block(first)
    one, other = (_orders(_with_replicates(sums, images), blocks) for sums in (first, second))
    return _agreement(one, other, blocks)


def rank_agreement_of_samples(
    first: FloatArray, first_images: IntArray, second: FloatArray, second_images: IntArray
) -> RankAgreement:
    """Compare the order of masks by two quantities that were each measured on images of its own.

    As `rank_agreement`, but a group is left out of one sample while the other stays whole: the variances of z over both
    samples add up, with Welch and Satterthwaite's degrees of freedom.

    Args:
        first: Sums over the images of each group, `[masks, groups]`.
        first_images: Images of each group, `[groups]`.
        second: Sums of the other quantity, `[masks, other groups]`.
        second_images: Images of each of its groups.

    Source: Arvesen, 1969, Annals of Mathematical Statistics 40, 2076-2100 (jackknifing several samples).
    """
    blocks = _one_block(first)
    one, other = (
        _orders(_with_replicates(sums, images), blocks)
        for sums, images in ((first, first_images), (second, second_images))
    )
    found: list[float] = []
    for correlation, nearest in zip((_spearman, _kendall), _nearest(blocks), strict=True):
        of_first, of_second = correlation(one, _whole(other)), correlation(_whole(one), other)
        limits = _interval_of_samples(of_first, of_second, nearest) if _enough(blocks) else (np.nan, np.nan)
        found += [float(of_first[0]), *limits]
    return RankAgreement(*found)


def score_agreements(
    scores: FloatArray, sums: FloatArray, images: IntArray, blocks: IntArray | None = None
) -> list[RankAgreement]:
    """Compare the order of heads by each of several scores with that by a quantity that was measured on images.

    As `rank_agreement`, but scores are fixed: only the quantity moves with the images.

    With `blocks` heads are compared with heads of their own block alone. Spearman's correlation is then Pearson's of
    all heads' ranks, each taken within its block and counted from the block's middle; Kendall's tau-b is of the pairs
    within blocks. A block of one head adds nothing to either.

    Args:
        scores: `[scores, heads]`, finite.
        sums: Sums of the quantity over the images of each group, `[heads, groups]`.
        images: Images of each group, `[groups]`.
        blocks: The block of each head, such as its layer, `[heads]`; without it all heads are one.
    """
    blocks = _one_block(sums) if blocks is None else blocks
    measured = _orders(_with_replicates(sums, images), blocks)
    return [_agreement(_orders(score[None], blocks), measured, blocks) for score in scores]


def reliability(sums: FloatArray, images: IntArray, blocks: IntArray | None = None, seed: int = 0) -> Reliability:
    """Return how far halves of the images agree on the order of heads, and what follows for all images.

    Args:
        sums: Sums of a quantity over the images of each group, `[heads, groups]`.
        images: Images of each group, `[groups]`.
        blocks: As in `score_agreements`.
        seed: Of the random halves.

    Source: Spearman, 1910, and Brown, 1910, British Journal of Psychology 3, 271-295 and 296-322.
    """
    sums = sums[:, images > 0]
    groups = sums.shape[1]
    if groups < 2:
        return Reliability(*[float("nan")] * 3)
    blocks = _one_block(sums) if blocks is None else blocks
    places = np.random.default_rng(seed).permuted(np.tile(np.arange(groups), (HALVINGS, 1)), axis=1)
    one, other = (
        # No product of matrices, whose last bits depend on the BLAS and its threads: [halvings, heads].
        _orders(np.where(chosen[:, None], sums, 0.0).sum(axis=-1), blocks)
        for chosen in (places < groups // 2, places >= groups // 2)
    )
    found = _spearman(one, other)
    ordered = found[np.isfinite(found)]  # a half in which all heads are equal has no order
    half = float(ordered.mean()) if len(ordered) else float("nan")
    whole = 2 * half / (1 + half) if half > -1 else float("nan")
    return Reliability(half, whole, float(np.sqrt(whole)) if whole > 0 else float("nan"))


class _Orders(NamedTuple):
    """Several orders of the same masks."""

    signs: NDArray[np.int8]  #: of the difference of two masks of one block, else 0, `[orders, masks, masks]`
    ranks: FloatArray  #: within blocks, counted from the block's middle, `[orders, masks]`
    finite: NDArray[np.bool_]  #: whether all values are, `[orders]`


def _orders(values: FloatArray, blocks: IntArray) -> _Orders:
    """Return the orders by values `[orders, masks]`; ties share their mean rank."""
    one, other = values[:, :, None], values[:, None, :]
    # A byte each: a thousand heads make a million pairs, in each of 65 orders.
    signs = ((one > other).astype(np.int8) - (one < other).astype(np.int8)) * (blocks[:, None] == blocks)
    finite = np.asarray(np.isfinite(values).all(axis=-1))
    return _Orders(signs, signs.sum(axis=-1, dtype=np.int64) / 2, finite)


def _one_block(sums: FloatArray) -> IntArray:
    return np.zeros(len(sums), dtype=np.int64)


def _with_replicates(sums: FloatArray, images: IntArray) -> FloatArray:
    """Return sums over all images, then means over all but each group's, `[1 + groups, masks]`."""
    return np.concatenate([sums.sum(axis=-1)[None], leave_one_out(sums, images)])


def _agreement(first: _Orders, second: _Orders, blocks: IntArray) -> RankAgreement:
    """Return both correlations with their intervals; order 0 is of all images, the others are of all but a group's."""
    found: list[float] = []
    for correlation, largest in zip((_spearman, _kendall), _nearest(blocks), strict=True):
        values = correlation(first, second)
        found += [float(values[0]), *(_interval(values, largest) if _enough(blocks) else (np.nan, np.nan))]
    return RankAgreement(*found)


def _pairs(blocks: IntArray) -> int:
    """Return how many pairs of masks there are within blocks."""
    sizes = np.bincount(blocks)
    return int((sizes**2 - sizes).sum()) // 2


def _nearest(blocks: IntArray) -> tuple[float, float]:
    """Return the largest Spearman and Kendall correlations below 1, half a swap of neighbours away."""
    sizes = np.bincount(blocks)
    return 1 - 6 / max(int((sizes**3 - sizes).sum()), 6), 1 - 1 / max(_pairs(blocks), 1)


def _enough(blocks: IntArray) -> bool:
    """Return whether there are enough masks for an interval."""
    return _pairs(blocks) >= FEWEST_WITH_INTERVAL * (FEWEST_WITH_INTERVAL - 1) // 2


def _whole(orders: _Orders) -> _Orders:
    """Return the order by all images alone, without those that leave out a group."""
    return _Orders(orders.signs[:1], orders.ranks[:1], orders.finite[:1])


def _interval(correlations: FloatArray, nearest: float) -> tuple[float, float]:
    """Return the interval on Fisher's z of a correlation, which its replicates follow.

    Args:
        correlations: `[1 + groups]`.
        nearest: The largest correlation that z is taken of.
    """
    if not np.ptp(correlations[1:]) > 0:
        return float("nan"), float("nan")
    z = np.arctanh(np.clip(correlations, -nearest, nearest))
    low, high = jackknife_interval(float(z[0]), z[1:])
    return float(np.tanh(low)), float(np.tanh(high))


def _interval_of_samples(first: FloatArray, second: FloatArray, nearest: float) -> tuple[float, float]:
    """Return the interval on Fisher's z of a correlation of two samples.

    Args:
        first: The correlation, then the same without each group of the first sample, `[1 + groups]`.
        second: The same without each group of the second, `[1 + other groups]`.
        nearest: The largest correlation that z is taken of.
    """
    if not (np.ptp(first[1:]) > 0 or np.ptp(second[1:]) > 0):
        return float("nan"), float("nan")
    z = [np.arctanh(np.clip(correlations, -nearest, nearest)) for correlations in (first, second)]
    variances = np.square([float(jackknife_error(own[1:])) for own in z])
    degrees = float(welch_degrees(variances, [len(own) - 1 for own in z]))
    reach = float(stats.t.isf(0.025, degrees) * np.sqrt(variances.sum()))
    return float(np.tanh(z[0][0] - reach)), float(np.tanh(z[0][0] + reach))


def _spearman(first: _Orders, second: _Orders) -> FloatArray:
    """Return the correlation of the ranks of each order, NaN where one side does not vary."""
    size = np.sqrt(np.square(first.ranks).sum(axis=-1) * np.square(second.ranks).sum(axis=-1))
    return _divided((first.ranks * second.ranks).sum(axis=-1), size, first.finite & second.finite)


def _kendall(first: _Orders, second: _Orders) -> FloatArray:
    """Return tau-b of each order, NaN where one side does not vary."""
    untied = [np.abs(signs).sum(axis=(1, 2), dtype=np.float64) for signs in (first.signs, second.signs)]
    product = (first.signs * second.signs).sum(axis=(1, 2), dtype=np.float64)
    return _divided(product, np.sqrt(untied[0] * untied[1]), first.finite & second.finite)


def _divided(product: FloatArray, size: FloatArray, finite: NDArray[np.bool_]) -> FloatArray:
    """Return the correlation of each order, NaN where it is not defined."""
    return np.where(finite & (size > 0), product / np.where(size > 0, size, 1), np.nan)


def mean_of_sums(sums: FloatArray, images: IntArray) -> tuple[float, float, float]:
    """Return the mean over images of a sum by group, `[groups]`, with its interval."""
    total = int(images.sum())
    estimate = float(sums.sum() / total) if total else float("nan")
    return estimate, *jackknife_interval(estimate, leave_one_out(sums, images))
