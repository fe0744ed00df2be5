"""Differences of two runs: against scipy, and simulated with and without a true difference."""

import numpy as np
import pytest
from scipy import stats

from headprobe.metrics.accuracy.agreement import rank_agreement, rank_agreement_of_samples
from headprobe.metrics.accuracy.two_runs import paired_differences, two_sample_differences

ONE_EACH = np.ones(40, dtype=np.int64)


def test_with_one_image_a_group_the_tests_are_students_and_welchs() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(0.1, 1, (5, 40)), random.normal(0.3, 2, (5, 40))
    paired = paired_differences(first, second, ONE_EACH)
    np.testing.assert_allclose(paired.p, stats.ttest_rel(first, second, axis=1).pvalue, rtol=1e-10)
    interval = stats.ttest_rel(second, first, axis=1).confidence_interval()
    np.testing.assert_allclose([paired.low, paired.high], [interval.low, interval.high], rtol=1e-9)

    fewer = second[:, :25]
    apart = two_sample_differences(first, ONE_EACH, fewer, ONE_EACH[:25])
    welch = stats.ttest_ind(fewer, first, axis=1, equal_var=False)
    np.testing.assert_allclose(apart.p, welch.pvalue, rtol=1e-10)
    interval = welch.confidence_interval()
    np.testing.assert_allclose([apart.low, apart.high], [interval.low, interval.high], rtol=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_a_run_and_itself_differ_by_nothing(paired: bool) -> None:
    sums = np.random.default_rng(1).normal(size=(3, 40))
    sums[0] = 0.0  # a mask without any effect
    found = (
        paired_differences(sums, sums, ONE_EACH) if paired else two_sample_differences(sums, ONE_EACH, sums, ONE_EACH)
    )
    assert found.b_minus_a.tolist() == [0, 0, 0]
    assert found.p.tolist() == [1, 1, 1]
    assert (found.low <= 0).all()
    assert (found.high >= 0).all()


def test_where_groups_do_not_differ_at_all_no_difference_is_called_sure() -> None:
    found = paired_differences(np.zeros((1, 40)), np.ones((1, 40)), ONE_EACH)
    assert found.b_minus_a.tolist() == [1]
    assert np.isnan([found.p, found.low, found.high]).all()


def test_a_mask_with_an_infinite_nll_has_no_test_and_leaves_the_others_theirs() -> None:
    random = np.random.default_rng(2)
    first, second = random.normal(size=(2, 3, 40))
    second[1, 7] = np.nan
    found = paired_differences(first, second, ONE_EACH)
    assert np.isnan(found.p).tolist() == [False, True, False]


@pytest.mark.parametrize("paired", [True, False])
def test_false_alarms_and_coverage_of_rare_flips_in_groups_of_unequal_size(paired: bool) -> None:
    # 2,000 masks that cost 2 points in either run: images flip in 3% to wrong and 1% to right
    random = np.random.default_rng(3)
    masks, images = 2000, 600
    groups = random.integers(0, 64, images)
    members = np.eye(64, dtype=np.int64)[groups]
    flips = [random.choice([1, 0, -1], p=[0.03, 0.96, 0.01], size=(masks, images)) for _ in "ab"]
    drops = [np.asarray(own @ members, dtype=np.float64) for own in flips]
    count = members.sum(axis=0)
    if paired:
        found = paired_differences(drops[0], drops[1], count)
    else:
        found = two_sample_differences(drops[0], count, drops[1], count)
    assert 0.035 < (found.p < 0.05).mean() < 0.065
    assert ((found.p < 0.05) == ((found.low > 0) | (found.high < 0)))[found.b_minus_a != 0].all()
    shifted = 0.02 * images  # and every difference is found at its place where one is put in
    planted = paired_differences(drops[0], drops[1] + shifted * count / images, count)
    assert 0.93 < ((planted.low < 0.02) & (planted.high > 0.02)).mean() < 0.97


# -- ranks of two samples ----------------------------------------------------------------------------------------------


def test_ranks_of_two_samples_are_scipys_and_their_interval_is_the_two_sample_jackknifes() -> None:
    random = np.random.default_rng(4)
    true = np.linspace(0, 1, 12)[:, None]
    first, second = true + random.normal(0, 2, (12, 40)), true + random.normal(0, 2, (12, 25))
    found = rank_agreement_of_samples(first, ONE_EACH, second, ONE_EACH[:25])
    one, other = first.sum(axis=1), second.sum(axis=1)
    assert found.spearman == pytest.approx(stats.spearmanr(one, other).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(one, other).statistic)

    z_first = [np.arctanh(stats.spearmanr(one - first[:, group], other).statistic) for group in range(40)]
    z_second = [np.arctanh(stats.spearmanr(one, other - second[:, group]).statistic) for group in range(25)]
    parts = [(len(z) - 1) / len(z) * np.square(z - np.mean(z)).sum() for z in (z_first, z_second)]
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 39 + parts[1] ** 2 / 24)
    reach = stats.t.isf(0.025, degrees) * np.sqrt(sum(parts))
    middle = np.arctanh(found.spearman)
    assert (found.spearman_low, found.spearman_high) == pytest.approx(
        (np.tanh(middle - reach), np.tanh(middle + reach))
    )


def test_a_second_sample_without_noise_leaves_the_first_ones_interval() -> None:
    random = np.random.default_rng(5)
    first = np.linspace(0, 1, 12)[:, None] + random.normal(0, 2, (12, 40))
    fixed = np.tile(np.arange(12.0)[:, None], 40)
    apart, paired = rank_agreement_of_samples(first, ONE_EACH, fixed, ONE_EACH), rank_agreement(first, fixed, ONE_EACH)
    assert apart == pytest.approx(paired)
