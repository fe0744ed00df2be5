import numpy as np
from scipy import stats

from headprobe.data.parts import calibrates
from headprobe.metrics.accuracy.jackknife import jackknife_interval, leave_one_out
from headprobe.metrics.accuracy.paired_accuracy import GROUPS, image_groups


def test_a_group_depends_on_unit_and_row_alone() -> None:
    whole = image_groups(3, range(1000))
    assert image_groups(3, [17, 999, 0]) == [whole[17], whole[999], whole[0]]
    assert image_groups(4, range(1000)) != whole


def test_groups_never_change() -> None:
    assert image_groups(0, range(8)) == [57, 22, 57, 46, 43, 58, 13, 18]


def test_groups_are_of_equal_size_up_to_chance() -> None:
    counts = np.bincount([group for unit in range(10) for group in image_groups(unit, range(5000))], minlength=GROUPS)
    assert len(counts) == GROUPS
    assert stats.chisquare(counts).pvalue > 0.001


def test_either_half_of_the_rows_is_spread_over_all_groups_alike() -> None:
    rows = range(20_000)
    counts = np.zeros((2, GROUPS))
    for row, group in zip(rows, image_groups(0, rows), strict=True):
        counts[int(calibrates(0, row)), group] += 1
    assert stats.chi2_contingency(counts).pvalue > 0.001


def test_leaving_a_group_out_gives_the_mean_of_the_others() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(2, 30)), rng.integers(0, 5, 30) * 2  # odd groups are empty
    sums = np.stack([np.bincount(groups, row, minlength=10) for row in values]).astype(np.float64)
    found = leave_one_out(sums, np.bincount(groups, minlength=10))
    wanted = [values[:, groups != group].mean(axis=1) for group in range(0, 10, 2)]
    np.testing.assert_allclose(found, wanted)


def test_with_an_image_a_group_the_interval_of_a_mean_is_students() -> None:
    values = np.random.default_rng(0).normal(size=40)
    replicates = leave_one_out(values, np.ones(40, dtype=np.int64))
    wanted = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    np.testing.assert_allclose(jackknife_interval(float(values.mean()), replicates), wanted)


def test_without_two_groups_or_with_nan_there_is_no_interval() -> None:
    assert np.isnan(jackknife_interval(1.0, np.array([1.0]))).all()
    assert np.isnan(jackknife_interval(1.0, np.array([1.0, np.nan, 2.0]))).all()
