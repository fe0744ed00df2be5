"""Agreement of orders: the oracle of the estimates is scipy, of the intervals a simulation with known truth."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from headprobe.metrics.accuracy.agreement import RankAgreement, mean_of_sums, rank_agreement

Array = NDArray[np.float64]


def sample(rng: np.random.Generator, truth: Array, images: int, noise: float) -> tuple[Array, Array, NDArray[np.int64]]:
    """Sums by 64 groups `[masks, groups]` of two quantities with these true means `[masks, 2]`, and images a group.

    Differences of images have long tails, and most of their noise is shared by both quantities, as under two ablations.
    """
    masks = len(truth)
    size = np.exp(rng.normal(size=(images, 1, 1)))
    shared, own = rng.normal(size=(images, masks, 1)), rng.normal(size=(images, masks, 2))
    values = truth + noise * size * (0.8 * shared + 0.6 * own)
    groups = rng.integers(0, 64, images)
    sums = np.zeros((64, masks, 2))
    np.add.at(sums, groups, values)
    return sums[..., 0].T, sums[..., 1].T, np.bincount(groups, minlength=64)


def true_rises(rng: np.random.Generator, masks: int, correlation: float) -> Array:
    """Rises as those of heads: a few large, most small `[masks, 2]`."""
    return np.asarray(0.02 * np.exp(rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], masks)))


def test_the_estimates_are_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second, images = sample(rng, true_rises(rng, 20, 0.5), 500, 0.1)
    found = rank_agreement(first, second, images)
    totals = first.sum(axis=1), second.sum(axis=1)
    assert found.spearman == pytest.approx(stats.spearmanr(*totals).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(*totals).statistic)


def test_ties_count_as_scipys_do() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 4, (15, 64)).astype(float) for _ in range(2))
    first[:5], second[3:8] = first[0], second[3]
    found = rank_agreement(first, second, np.ones(64, dtype=np.int64))
    totals = first.sum(axis=1), second.sum(axis=1)
    assert found.spearman == pytest.approx(stats.spearmanr(*totals).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(*totals).statistic)


@pytest.mark.parametrize("masks", [8, 24])
@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_the_intervals_cover_the_agreement_of_the_true_rises(masks: int, correlation: float) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(100):
        truth = true_rises(rng, masks, correlation)
        found = rank_agreement(*sample(rng, truth, 1000, 0.06))
        spearman, kendall = stats.spearmanr(*truth.T).statistic, stats.kendalltau(*truth.T).statistic
        covered.append(
            [
                found.spearman_low <= spearman <= found.spearman_high,
                found.kendall_low <= kendall <= found.kendall_high,
            ]
        )
    assert np.mean(covered, axis=0).min() >= 0.92


def test_images_without_any_effect_give_an_interval_around_no_agreement() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(100):
        values = rng.normal(size=(2, 24, 64))
        found = rank_agreement(values[0], values[1], np.full(64, 10))
        covered.append(found.spearman_low <= 0 <= found.spearman_high)
    assert np.mean(covered) >= 0.92


def test_the_interval_holds_the_estimate_and_stays_within_1() -> None:
    rng = np.random.default_rng(0)
    found = rank_agreement(*sample(rng, true_rises(rng, 24, 0.95), 2000, 0.05))
    assert -1 <= found.spearman_low <= found.spearman <= found.spearman_high <= 1
    assert -1 <= found.kendall_low <= found.kendall <= found.kendall_high <= 1


def without_interval(found: RankAgreement) -> bool:
    return bool(np.isnan([found.spearman_low, found.spearman_high, found.kendall_low, found.kendall_high]).all())


def test_few_masks_have_an_estimate_and_no_interval() -> None:
    rng = np.random.default_rng(0)
    found = rank_agreement(*sample(rng, true_rises(rng, 7, 0.5), 500, 0.1))
    assert np.isfinite([found.spearman, found.kendall]).all()
    assert without_interval(found)


def test_an_order_that_no_group_of_images_changes_has_no_interval() -> None:
    same = np.repeat(np.arange(12.0)[:, None], 64, axis=1)
    found = rank_agreement(same, same, np.ones(64, dtype=np.int64))
    assert (found.spearman, found.kendall) == pytest.approx((1, 1))
    assert without_interval(found)


@pytest.mark.parametrize("spoilt", [0.0, np.nan])
def test_a_side_that_does_not_vary_or_holds_nan_has_no_agreement(spoilt: float) -> None:
    rng = np.random.default_rng(0)
    first, second, images = sample(rng, true_rises(rng, 12, 0.5), 500, 0.1)
    first[:] = first if np.isnan(spoilt) else spoilt
    if np.isnan(spoilt):
        first[3, 5] = np.nan
    assert np.isnan(rank_agreement(first, second, images)).all()


def test_the_interval_of_a_sum_covers_its_true_mean() -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        groups, values = rng.integers(0, 64, 800), rng.exponential(size=800)
        sums = np.bincount(groups, values, minlength=64).astype(np.float64)
        _, low, high = mean_of_sums(sums, np.bincount(groups, minlength=64))
        covered.append(low <= 1 <= high)
    assert np.mean(covered) >= 0.92
