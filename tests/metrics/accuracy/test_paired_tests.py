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
def test_drop_interval_leaves_out_zero_where_p_is_significant(table: tuple[int, int, int]) -> None:
    lost, won, images = table
    low, high = drop_interval_pp(lost, won, images)
    assert (mcnemar_p(lost, won) < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("images", [*range(1, 31), 100, 500])
def test_interval_and_p_never_contradict_each_other_in_any_table(images: int) -> None:
    lost, won = every_table(images).T
    low, high = drop_interval_pp(lost, won, images)
    assert np.array_equal(mcnemar_p(lost, won) < 0.05, (low > 0) | (high < 0))


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


def test_drop_interval_covers_at_least_93_5_times_in_100_whatever_the_flips() -> None:
    images = 300
    lost, won = every_table(images).T
    low, high = drop_interval_pp(lost, won, images)
    tables = np.stack([lost, won, images - lost - won], axis=-1)
    covers = []
    for gain in (0.002, 0.005, 0.02, 0.1, 0.2):
        for drop in (0.0, 0.005, 0.01, 0.05, 0.3):
            chances = stats.multinomial.pmf(tables, images, [gain + drop, gain, 1 - 2 * gain - drop])
            covers.append(chances[(low <= 100 * drop + 1e-9) & (100 * drop - 1e-9 <= high)].sum())
    assert min(covers) > 0.935
    assert abs(float(np.median(covers)) - 0.95) < 0.003


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
    expected = mcnemar([[0, lost], [won, 0]], exact=False, correction=False).pvalue
    assert mcnemar_p(lost, won) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_p_is_the_published_one() -> None:
    assert round(float(mcnemar_p(6, 16)), 4) == 0.0330  # Fagerland, Lydersen and Laake 2014


def test_mcnemar_p_is_1_where_nothing_flips() -> None:
    assert mcnemar_p([0, 3], [0, 3]).tolist() == [1.0, 1.0]


def size_by_flips(most: int) -> NDArray[np.float64]:
    """Probability that a null mask is called significant, given its number of flips: 0, 1, ... `most`."""
    sizes = []
    for flips in range(most + 1):
        lost = np.arange(flips + 1)
        found = mcnemar_p(lost, flips - lost) < 0.05
        sizes.append(float(stats.binom.pmf(lost, flips, 0.5)[found].sum()))
    return np.array(sizes)


@pytest.mark.parametrize("images", [20, 100, 1000, 50_000])
def test_mcnemar_finds_a_null_mask_significant_at_most_5_4_times_in_100(images: int) -> None:
    sizes = size_by_flips(400)
    expected_flips = np.arange(0.5, min(0.5 * images, 200), 0.5)  # [cases]
    chances = stats.binom.pmf(np.arange(401), images, expected_flips[:, None] / images)  # [cases, flips]
    assert np.all(chances @ sizes < 0.0541)


def test_given_the_flips_mcnemar_is_liberal_with_4_of_them_only_as_documented() -> None:
    sizes = size_by_flips(400)
    assert sizes[:4].max() == 0
    assert sizes[4] == pytest.approx(2 / 2**4)  # all four in one direction, which an exact test accepts
    assert sizes[5:].max() == pytest.approx(0.0784, abs=5e-4)  # of 21


def test_bh_q_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(2).uniform(size=60) ** 3
    np.testing.assert_allclose(bh_q(p), multipletests(p, method="fdr_bh")[1], rtol=1e-12)


def test_bh_q_counts_only_masks_that_were_tested() -> None:
    q = bh_q([np.nan, 0.01, 0.04])
    assert np.isnan(q[0])
    np.testing.assert_allclose(q[1:], multipletests([0.01, 0.04], method="fdr_bh")[1])


def test_bh_q_of_no_mask_is_empty() -> None:
    assert bh_q([]).shape == (0,)


def test_error_on_p_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"got 1\.5$"):
        bh_q([0.1, 1.5])


def powers(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of powers 1 to 4 over the last axis, `[4, ...]`."""
    return np.stack([(differences**power).sum(axis=-1) for power in (1, 2, 3, 4)])


def student(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    interval = stats.ttest_1samp(differences, 0, axis=-1).confidence_interval(0.95)
    return interval.low, interval.high


def test_mean_interval_is_students_for_differences_of_light_tails() -> None:
    differences = np.tile([-1.0, 1.0, 3.0, 5.0], 50)  # kurtosis 1.64, no skewness
    np.testing.assert_allclose(mean_interval(powers(differences), 200), student(differences), rtol=1e-10)


def test_mean_interval_of_normal_differences_is_almost_students() -> None:
    differences = np.random.default_rng(3).normal(0.02, 0.3, size=(100, 500))
    low, high = mean_interval(powers(differences), 500)
    student_low, student_high = student(differences)
    assert np.all((high - low) / (student_high - student_low) < 1.02)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=60))
@settings(deadline=None)
def test_mean_interval_is_never_narrower_than_students(values: list[float]) -> None:
    differences = np.array(values)
    assume(np.ptp(differences) > 1e-3)
    low, high = mean_interval(powers(differences), len(differences))
    student_low, student_high = student(differences)
    slack = 1e-6 * (student_high - student_low)
    assert low <= student_low + slack
    assert high >= student_high - slack


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=60), st.floats(0.1, 10))
@settings(deadline=None)
def test_mean_interval_follows_the_unit_and_the_sign_of_the_differences(values: list[float], unit: float) -> None:
    differences = np.array(values)
    assume(np.ptp(differences) > 1e-3)
    low, high = mean_interval(powers(differences), len(differences))
    np.testing.assert_allclose(
        mean_interval(powers(-unit * differences), len(differences)), [-unit * high, -unit * low], rtol=1e-4, atol=1e-4
    )


def near_perfect(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.float64], float]:
    """NLL differences like those of a model that is nearly always right, and their true mean.

    Nine images in ten hardly change; the last one's NLL changes by a tenth of a nat or a nat, up more than down.
    """
    changed = rng.uniform(size=size) < 0.1
    tail = rng.lognormal(-1.5, 1.0, size=size) * np.where(rng.uniform(size=size) < 0.85, 1, -1)
    return np.where(changed, tail, rng.normal(0, 0.01, size=size)), 0.1 * 0.7 * float(np.exp(-1.0))


@pytest.mark.parametrize(("images", "least", "students"), [(100, 0.925, 0.90), (200, 0.935, 0.92), (1000, 0.94, 0.945)])
def test_mean_interval_covers_the_mean_of_near_perfect_models_where_students_does_not(
    images: int, least: float, students: float
) -> None:
    differences, true = near_perfect(np.random.default_rng(4), (10_000, images))
    low, high = mean_interval(powers(differences), images)
    assert least < np.mean((low <= true) & (true <= high)) < 0.97
    student_low, student_high = student(differences)
    assert np.mean((student_low <= true) & (true <= student_high)) < students + 0.01


def test_mean_interval_finds_a_mask_without_effect_harmful_at_most_25_times_in_1000() -> None:
    rng = np.random.default_rng(5)
    for images in (50, 200, 1000):
        tail = rng.lognormal(-1.5, 1.0, size=(10_000, images)) * rng.choice([-1, 1], size=(10_000, images))
        differences = np.where(rng.uniform(size=tail.shape) < 0.1, tail, 0.0)
        low, high = mean_interval(powers(differences), images)
        assert max(np.mean(low > 0), np.mean(high < 0)) < 0.025 + 3 * np.sqrt(0.025 * 0.975 / 10_000)


def test_mean_interval_of_equal_answers_has_no_width() -> None:
    low, high = mean_interval(np.zeros(4), 100)
    assert (float(low), float(high)) == (0.0, 0.0)


def test_mean_interval_survives_rounding_of_a_constant_difference() -> None:
    low, high = mean_interval(powers(np.full(7, 0.1)), 7)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_mean_interval_of_one_image_is_undefined() -> None:
    assert np.isnan(mean_interval([[0.0, 0.3], [0.0, 0.09], [0.0, 0.027], [0.0, 0.0081]], [0, 1])).all()


@pytest.mark.filterwarnings("error")
def test_mean_interval_of_infinite_differences_is_undefined_without_a_warning() -> None:
    assert np.isnan(mean_interval([np.inf, np.inf, np.inf, np.inf], 10)).all()


@pytest.mark.parametrize(
    ("images", "flips"), [(100, 0.05), (500, 0.0), (500, 0.02), (500, 0.1), (2000, 0.05), (50_000, 0.02), (50_000, 0.2)]
)
def test_smallest_resolvable_drop_is_found_80_times_in_100(images: int, flips: float) -> None:
    drop = smallest_resolvable_drop(images, flips_fraction=flips, power=0.8) / 100
    cells = [flips / 2 + drop, flips / 2, 1 - flips - drop]
    draws = np.random.default_rng(5).multinomial(images, cells, size=40_000)
    found = np.mean(mcnemar_p(draws[:, 0], draws[:, 1]) < 0.05)
    assert abs(found - 0.8) < 0.01


@pytest.mark.parametrize(("flips", "drop"), [(0.02, 0.02), (0.04, 0.02), (0.1, 0.05)])
def test_smallest_resolvable_drop_is_close_to_connors_formula(flips: float, drop: float) -> None:
    # Connor 1987: the images for a power of 80% at the 5% level, by a normal approximation
    rate = flips + drop
    images = (Z * np.sqrt(rate) + stats.norm.ppf(0.8) * np.sqrt(rate - drop**2)) ** 2 / drop**2
    assert smallest_resolvable_drop(round(images), flips_fraction=flips) == pytest.approx(100 * drop, rel=0.05)


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
