"""Agreement of orders: the oracle of the estimates is scipy, of the intervals a simulation with known truth."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from headprobe.metrics.accuracy.agreement import (
    RankAgreement,
    mean_of_sums,
    rank_agreement,
    reliability,
    score_agreements,
)

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


# -- fixed scores against a measured quantity --


def planted(rng: np.random.Generator, masks: int, correlation: float) -> tuple[Array, Array]:
    """True rises of heads, and a score that is correlated with their logarithm."""
    latent = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], masks)
    return np.asarray(0.02 * np.exp(latent[:, 0])), np.asarray(latent[:, 1])


def measured(rng: np.random.Generator, truth: Array, images: int) -> tuple[Array, NDArray[np.int64]]:
    """Sums by group of rises with these true means."""
    sums, _, counts = sample(rng, np.stack([truth, truth], axis=1), images, 0.06)
    return sums, counts


def test_a_fixed_score_is_compared_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    truth, score = planted(rng, 20, 0.5)
    sums, images = measured(rng, truth, 500)
    scores = np.stack([score, np.round(score), np.ones(20)])
    good, tied, constant = score_agreements(scores, sums, images)
    for values, found in ((scores[0], good), (scores[1], tied)):
        assert found.spearman == pytest.approx(stats.spearmanr(values, sums.sum(axis=1)).statistic)
        assert found.kendall == pytest.approx(stats.kendalltau(values, sums.sum(axis=1)).statistic)
        assert found.spearman_low < found.spearman < found.spearman_high
    assert np.isnan(constant).all()


def test_one_block_of_all_heads_is_no_block() -> None:
    rng = np.random.default_rng(0)
    truth, score = planted(rng, 12, 0.5)
    sums, images = measured(rng, truth, 500)
    assert score_agreements(score[None], sums, images, np.full(12, 3)) == score_agreements(score[None], sums, images)


def test_what_lies_between_blocks_changes_nothing_within_them() -> None:
    rng = np.random.default_rng(0)
    truth, score = planted(rng, 24, 0.5)
    blocks = np.repeat(np.arange(6), 4)
    sums, images = measured(rng, truth, 500)
    (found,) = score_agreements(score[None], sums, images, blocks)
    (moved,) = score_agreements((score + 10 * blocks)[None], sums - blocks[:, None] * images, images, blocks)
    assert moved == found


def test_within_blocks_as_many_pairs_are_asked_for_as_eight_masks_have() -> None:
    rng = np.random.default_rng(0)
    for sizes, enough in (((4, 4), False), ((8,), True), ((3,) * 9, False), ((3,) * 10, True)):
        values = rng.normal(size=(1 + 64, sum(sizes)))
        blocks = np.repeat(np.arange(len(sizes)), sizes)
        (found,) = score_agreements(values[:1], values[1:].T, np.ones(64, dtype=int), blocks)
        assert without_interval(found) != enough


@pytest.mark.parametrize(("heads", "within"), [(8, False), (24, False), (24, True)])
@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_the_intervals_cover_what_as_many_other_images_give(heads: int, within: bool, correlation: float) -> None:
    rng = np.random.default_rng(4)
    blocks = np.repeat(np.arange(heads // 4), 4) if within else None
    covered: list[list[bool]] = []
    for _ in range(4):
        truth, score = planted(rng, heads, correlation)
        runs = [score_agreements(score[None], *measured(rng, truth, 250), blocks)[0] for _ in range(30)]
        spearman, kendall = np.mean([[found.spearman, found.kendall] for found in runs], axis=0)
        covered += [
            [
                found.spearman_low <= spearman <= found.spearman_high,
                found.kendall_low <= kendall <= found.kendall_high,
            ]
            for found in runs
            if not without_interval(found)
        ]
    assert len(covered) > 90
    assert np.mean(covered, axis=0).min() >= 0.93


@pytest.mark.parametrize("within", [False, True])
def test_the_intervals_cover_the_true_correlation_where_the_rises_are_reliable(within: bool) -> None:
    rng = np.random.default_rng(5)
    blocks = np.repeat(np.arange(6), 4) if within else np.zeros(24, dtype=np.int64)
    covered = []
    for _ in range(60):
        truth, score = planted(rng, 24, 0.6)
        (found,) = score_agreements(score[None], *measured(rng, truth, 2000), blocks)
        # the same definition on rises without noise; tests/run/test_importance.py holds the definition to numpy
        (true,) = score_agreements(score[None], np.repeat(truth[:, None], 2, axis=1), np.ones(2, dtype=int), blocks)
        if not without_interval(found):
            covered.append(found.spearman_low <= true.spearman <= found.spearman_high)
    assert len(covered) > 40
    assert np.mean(covered) >= 0.92


# -- reliability --


def normal_sums(rng: np.random.Generator, heads: int, true_share: float) -> tuple[Array, Array]:
    """True values of heads, and sums by 64 groups whose means have `true_share` of their variance from these."""
    truth = rng.normal(size=heads)
    noise = np.sqrt(64 * (1 / true_share - 1))
    return truth, truth[:, None] + noise * rng.normal(size=(heads, 64))


@pytest.mark.parametrize("true_share", [0.3, 0.5, 0.8, 0.95])
def test_the_reliability_is_what_as_many_other_images_agree_with(true_share: float) -> None:
    rng = np.random.default_rng(0)
    found = np.array([reliability(normal_sums(rng, 150, true_share)[1], np.ones(64, dtype=int)) for _ in range(8)])
    _, whole, ceiling = found.mean(axis=0)
    # Spearman's correlation of normal values with this Pearson correlation (Pearson, 1907).
    assert whole == pytest.approx(6 / np.pi * np.arcsin(true_share / 2), abs=0.04)
    assert ceiling == pytest.approx(6 / np.pi * np.arcsin(np.sqrt(true_share) / 2), abs=0.04)


def test_no_score_beats_the_ceiling_and_the_true_order_reaches_it() -> None:
    rng = np.random.default_rng(1)
    reached = []
    for _ in range(10):
        truth, sums = normal_sums(rng, 100, 0.6)
        (found,) = score_agreements(truth[None], sums, np.ones(64, dtype=int))
        reached.append(found.spearman - reliability(sums, np.ones(64, dtype=int)).ceiling)
    assert np.mean(reached) == pytest.approx(0, abs=0.03)


def test_heads_that_differ_by_noise_alone_have_no_reliability() -> None:
    rng = np.random.default_rng(2)
    found = [reliability(rng.normal(size=(60, 64)), np.ones(64, dtype=int)) for _ in range(20)]
    assert np.mean([one.split_half for one in found]) == pytest.approx(0, abs=0.05)
    assert all(np.isnan(one.ceiling) for one in found if one.split_half <= 0)


def test_reliability_within_blocks_ignores_what_lies_between_them() -> None:
    rng = np.random.default_rng(3)
    blocks, ones = np.repeat(np.arange(10), 6), np.ones(64, dtype=int)
    noise = rng.normal(size=(60, 64))
    between = noise + 5.0 * blocks[:, None]
    assert reliability(between, ones).reliability > 0.95
    assert reliability(between, ones, blocks).split_half == pytest.approx(0, abs=0.25)
    assert reliability(between, ones, blocks)[:2] == reliability(noise, ones, blocks)[:2]


def test_the_same_sums_have_the_same_reliability_and_empty_groups_do_not_count() -> None:
    rng = np.random.default_rng(4)
    _, sums = normal_sums(rng, 30, 0.5)
    ones = np.ones(64, dtype=int)
    padded = np.concatenate([sums, np.zeros((30, 5))], axis=1), np.concatenate([ones, np.zeros(5, dtype=int)])
    assert reliability(sums, ones) == reliability(sums, ones) == reliability(*padded)


@pytest.mark.parametrize("groups", [0, 1])
def test_one_group_of_images_has_no_halves(groups: int) -> None:
    images = np.zeros(64, dtype=int)
    images[:groups] = 3
    assert np.isnan(reliability(np.ones((5, 64)), images)).all()


def test_heads_without_any_difference_have_no_reliability() -> None:
    assert np.isnan(reliability(np.zeros((5, 64)), np.ones(64, dtype=int))).all()
