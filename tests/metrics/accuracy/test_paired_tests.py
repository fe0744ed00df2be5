"""The oracles are published worked examples, scipy, statsmodels, numerical maximum likelihood and simulation."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.paired_tests import (
    bh_q,
    drop_interval_pp,
    drop_pp,
    mcnemar_p,
    mean_interval,
    smallest_resolvable_drop,
)

Z = float(stats.norm.ppf(0.975))


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, int, int]:
    """Right to wrong, wrong to right, images."""
    images = draw(st.integers(1, 60_000))
    lost = draw(st.integers(0, images))
    return lost, draw(st.integers(0, images - lost)), images


def every_table(images: int) -> NDArray[np.int64]:
    return np.array([(lost, won) for lost in range(images + 1) for won in range(images + 1 - lost)])


def score_statistic(lost: int, won: int, images: int, drop: float) -> float:
    """Tango's statistic at a drop (a fraction), its null rate found by maximising the multinomial likelihood."""
    stay = images - lost - won

    def minus_log_likelihood(rate: float) -> float:
        cells = [rate + drop, rate, 1 - 2 * rate - drop]
        return -float(
            sum(count * np.log(max(cell, 1e-300)) for count, cell in zip((lost, won, stay), cells, strict=True))
        )

    bounds = max(0.0, -drop), (1 - drop) / 2
    rate = optimize.minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return float((lost - won - images * drop) / np.sqrt(images * (2 * rate + drop * (1 - drop))))


@pytest.mark.parametrize(
    ("lost", "won", "images", "confidence", "low", "high", "digits"),
    [
        (9, 3, 32, 0.95, -2.7, 39.0, 1),  # Tango 1998
        (0, 1, 44, 0.90, -9.6, 3.7, 1),  # Tango 1998
        (16, 8, 86, 0.95, -2.0, 20.7, 1),  # Agresti and Min 2005
        (1, 7, 21, 0.95, -51.7, -2.6, 1),  # Fagerland, Lydersen and Laake 2014, table II
        (6, 16, 161, 0.95, -12.40, -0.54, 2),  # the same, the tests of their R package contingencytables
        (3, 1, 14, 0.95, -16.70, 43.27, 2),  # Tang, Ling, Ling and Tian 2010
        (25, 2, 102, 0.95, 13.9, 32.1, 1),  # Chang 2024
    ],
)
def test_drop_interval_is_the_published_one(
    lost: int, won: int, images: int, confidence: float, low: float, high: float, digits: int
) -> None:
    limits = np.round(drop_interval_pp(lost, won, images, confidence), digits)
    assert limits.tolist() == [low, high]


@pytest.mark.parametrize(
    ("lost", "won", "images"), [(7, 2, 40), (1, 9, 33), (30, 11, 1000), (2, 0, 9), (410, 377, 50_000)]
)
def test_drop_interval_ends_where_the_score_test_rejects(lost: int, won: int, images: int) -> None:
    low, high = (float(limit) / 100 for limit in drop_interval_pp(lost, won, images))
    assert score_statistic(lost, won, images, low) == pytest.approx(Z, abs=1e-4)
    assert score_statistic(lost, won, images, high) == pytest.approx(-Z, abs=1e-4)


@pytest.mark.parametrize(("lost", "won", "images"), [(3, 1, 12), (0, 2, 8), (5, 0, 6)])
def test_drop_interval_holds_every_drop_that_the_score_test_accepts(lost: int, won: int, images: int) -> None:
    grid = np.linspace(-0.995, 0.995, 399)
    accepted = np.array([abs(score_statistic(lost, won, images, drop)) <= Z for drop in grid])
    low, high = drop_interval_pp(lost, won, images)
    assert np.array_equal(accepted, (100 * grid >= low) & (100 * grid <= high))


@pytest.mark.parametrize("images", [1, 2, 3, 7, 20])
def test_drop_interval_exists_and_holds_the_drop_for_every_table(images: int) -> None:
    lost, won = every_table(images).T
    low, high = drop_interval_pp(lost, won, images)
    drop = drop_pp(lost, won, images)
    assert np.all((low >= -100) & (low <= drop) & (drop <= high) & (high <= 100) & (low < high))


@given(tables())
@settings(deadline=None)
def test_exchanging_the_flips_mirrors_the_drop_interval(table: tuple[int, int, int]) -> None:
    lost, won, images = table
    low, high = drop_interval_pp(lost, won, images)
    assert drop_interval_pp(won, lost, images) == (-high, -low)


@given(tables())
@settings(deadline=None)
def test_drop_interval_leaves_out_zero_where_asymptotic_mcnemar_is_significant(table: tuple[int, int, int]) -> None:
    lost, won, images = table
    assume(lost + won > 0)
    p = mcnemar([[images - lost - won, lost], [won, 0]], exact=False, correction=False).pvalue
    assume(abs(p - 0.05) > 1e-9)
    low, high = drop_interval_pp(lost, won, images)
    assert (p < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("images", [1, 10, 50_000])
def test_without_flips_the_drop_interval_is_wilsons_for_none(images: int) -> None:
    _, wilson = proportion_confint(0, images, method="wilson")
    assert drop_interval_pp(0, 0, images) == pytest.approx((-100 * wilson, 100 * wilson), rel=1e-12)


def test_without_images_the_drop_and_its_interval_are_undefined() -> None:
    assert np.isnan([drop_pp(0, 0, 0), *drop_interval_pp(0, 0, 0)]).all()


@pytest.mark.parametrize(
    ("images", "lost", "won"),
    [(50, 0.1, 0.05), (200, 0.05, 0.03), (1000, 0.02, 0.005), (1000, 0.01, 0.01), (50_000, 0.012, 0.010)],
)
def test_drop_interval_covers_the_true_drop_about_95_times_in_100(images: int, lost: float, won: float) -> None:
    draws = np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], size=20_000)
    low, high = drop_interval_pp(draws[:, 0], draws[:, 1], images)
    covered = np.mean((low <= 100 * (lost - won)) & (100 * (lost - won) <= high))
    assert abs(covered - 0.95) < 0.005 + 4 * np.sqrt(0.95 * 0.05 / 20_000)


@pytest.mark.parametrize(("images", "lost", "won"), [(20, 0.1, 0.05), (2000, 0.001, 0.001), (1000, 0.0, 0.0)])
def test_with_a_handful_of_flips_the_drop_interval_errs_on_the_wide_side(images: int, lost: float, won: float) -> None:
    draws = np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], size=20_000)
    low, high = drop_interval_pp(draws[:, 0], draws[:, 1], images)
    assert np.mean((low <= 100 * (lost - won)) & (100 * (lost - won) <= high)) > 0.95


@pytest.mark.parametrize(("lost", "won", "images"), [(-1, 0, 5), (3, 3, 5)])
def test_error_on_impossible_flips(lost: int, won: int, images: int) -> None:
    with pytest.raises(ValueError, match=r"got \(.*\) \(lost, won, images\)$"):
        drop_pp(lost, won, images)


@given(st.integers(0, 3000), st.integers(0, 3000))
@settings(deadline=None)
def test_mcnemar_p_is_that_of_statsmodels(lost: int, won: int) -> None:
    assume(lost + won > 0)
    assert mcnemar_p(lost, won) == pytest.approx(mcnemar([[0, lost], [won, 0]], exact=True).pvalue, rel=1e-9)


def test_mcnemar_p_is_the_published_one() -> None:
    assert round(float(mcnemar_p(6, 16)), 6) == 0.052479  # Fagerland, Lydersen and Laake 2014


def test_mcnemar_p_is_1_where_nothing_flips() -> None:
    assert mcnemar_p([0, 0], [0, 3]).tolist() == [1.0, 0.25]


@pytest.mark.parametrize(("images", "flips"), [(200, 0.05), (1000, 0.2), (50_000, 0.01)])
def test_mcnemar_finds_a_null_mask_significant_at_most_5_times_in_100(images: int, flips: float) -> None:
    draws = np.random.default_rng(1).multinomial(images, [flips / 2, flips / 2, 1 - flips], size=20_000)
    found = np.mean(mcnemar_p(draws[:, 0], draws[:, 1]) < 0.05)
    assert found < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)


def test_bh_q_is_that_of_statsmodels_within_each_test_family() -> None:
    rng = np.random.default_rng(2)
    p = rng.uniform(size=60) ** 3
    test_families = rng.choice(["each:head", "each:layer", ""], size=60)
    q = bh_q(p, test_families.tolist())
    for test_family in ("each:head", "each:layer"):
        expected = multipletests(p[test_families == test_family], method="fdr_bh")[1]
        np.testing.assert_allclose(q[test_families == test_family], expected, rtol=1e-12)


def test_bh_q_of_a_mask_without_test_family_is_undefined() -> None:
    assert np.isnan(bh_q([0.01, 0.02], ["", "each:layer"])).tolist() == [True, False]


def test_bh_q_counts_only_masks_that_were_tested() -> None:
    q = bh_q([np.nan, 0.01, 0.04], ["each:layer"] * 3)
    assert np.isnan(q[0])
    np.testing.assert_allclose(q[1:], multipletests([0.01, 0.04], method="fdr_bh")[1])


def test_bh_q_of_no_mask_is_empty() -> None:
    assert bh_q([], []).shape == (0,)


@pytest.mark.parametrize(
    ("p", "test_families", "culprit"),
    [([0.1], ["a", "b"], r"got \(1,\) and 2$"), ([0.1, 1.5], ["a", "a"], r"got 1\.5$")],
)
def test_error_on_p_values_that_cannot_be(p: list[float], test_families: list[str], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        bh_q(p, test_families)


def test_mean_interval_is_that_of_a_t_test() -> None:
    differences = np.random.default_rng(3).normal(0.02, 0.3, size=200)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    limits = mean_interval(differences.sum(), np.square(differences).sum(), 200)
    np.testing.assert_allclose(limits, [expected.low, expected.high], rtol=1e-10)


def test_mean_interval_of_equal_answers_has_no_width() -> None:
    low, high = mean_interval(0.0, 0.0, 100)
    assert (float(low), float(high)) == (0.0, 0.0)


def test_mean_interval_survives_rounding_of_a_constant_difference() -> None:
    low, high = mean_interval(0.1 * 7, 7 * 0.1**2 * (1 - 1e-16), 7)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_mean_interval_of_one_image_is_undefined() -> None:
    assert np.isnan(mean_interval([0.0, 0.3], [0.0, 0.09], [0, 1])).all()


def test_mean_interval_covers_the_true_mean_of_skewed_differences_about_95_times_in_100() -> None:
    differences = np.random.default_rng(4).exponential(1.0, size=(4000, 1000)) - 0.9
    low, high = mean_interval(differences.sum(axis=1), np.square(differences).sum(axis=1), 1000)
    assert abs(np.mean((low <= 0.1) & (high >= 0.1)) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)


def test_smallest_resolvable_drop_inverts_the_published_sample_size() -> None:
    # Flips of 0.45 and 0.05 need 23 images for a power of 0.8 (powerandsamplesize.com, after Connor 1987).
    assert smallest_resolvable_drop(23, flips_fraction=0.1) < 40 < smallest_resolvable_drop(22, flips_fraction=0.1)


@pytest.mark.parametrize(("images", "flips"), [(2000, 0.05), (50_000, 0.02)])
def test_smallest_resolvable_drop_is_found_about_80_times_in_100(images: int, flips: float) -> None:
    drop = smallest_resolvable_drop(images, flips_fraction=flips, power=0.8) / 100
    cells = [flips / 2 + drop, flips / 2, 1 - flips - drop]
    draws = np.random.default_rng(5).multinomial(images, cells, size=20_000)
    found = np.mean(mcnemar_p(draws[:, 0], draws[:, 1]) < 0.05)
    assert 0.77 < found < 0.82


@pytest.mark.parametrize("images", [0, 3])
def test_too_few_images_resolve_no_drop(images: int) -> None:
    assert np.isnan(smallest_resolvable_drop(images, flips_fraction=0.0))


def test_churn_hides_larger_drops() -> None:
    assert smallest_resolvable_drop(50_000, flips_fraction=0.02) < smallest_resolvable_drop(50_000, flips_fraction=0.1)


@pytest.mark.parametrize(
    ("images", "flips", "power", "culprit"),
    [(-1, 0.1, 0.8, "images.*got -1$"), (10, 1.0, 0.8, r"flips_fraction.*got 1\.0$"), (10, 0.1, 80, "power.*got 80$")],
)
def test_error_on_a_resolution_that_cannot_be(images: int, flips: float, power: float, culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        smallest_resolvable_drop(images, flips_fraction=flips, power=power)
