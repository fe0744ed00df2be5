"""e-values hold at every look, say less than p at the end, and are not given where labels come sorted."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from headprobe.metrics.accuracy.paired_tests import bh_q, log_e_value, mcnemar_p, p_of_e, smallest_resolvable_drop
from headprobe.metrics.accuracy.scores import FEWEST_IMAGES, why_no_e_value
from headprobe.units.coverage import label_sums

Counts = NDArray[np.int64]
ENOUGH = np.log(20)


def looks(rate: float, lost_share: float, units: int, images: int, runs: int, seed: int = 0) -> tuple[Counts, Counts]:
    """Flips in both directions up to each unit of independent images, `[runs, units]`."""
    rng = np.random.default_rng(seed)
    flips = rng.binomial(images, rate, (runs, units))
    lost = rng.binomial(flips, lost_share)
    return lost.cumsum(axis=1), (flips - lost).cumsum(axis=1)


def reason(units: list[list[int]], complete: bool = True) -> str:
    return why_no_e_value([label_sums(unit) for unit in units], complete)


def cut(labels: list[int] | NDArray[np.int64], size: int) -> list[list[int]]:
    listed = [int(label) for label in labels]
    return [listed[first : first + size] for first in range(0, len(listed), size)]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (12, 1), (9, 3), (40, 60), (300, 200)])
def test_the_e_value_is_the_mean_likelihood_ratio_over_a_beta_of_a_half(lost: int, won: int) -> None:
    # with p = sin(t)^2 a Beta(1/2, 1/2) is uniform over t
    def ratio(t: float) -> float:
        return float(np.exp(2 * lost * np.log(2**0.5 * np.sin(t)) + 2 * won * np.log(2**0.5 * np.cos(t))))

    top = np.arctan2(np.sqrt(lost), np.sqrt(won)) if lost + won else 0.5
    mean = integrate.quad(ratio, 0, np.pi / 2, points=[top], limit=200)[0] / (np.pi / 2)
    assert float(log_e_value(lost, won)) == pytest.approx(np.log(mean), abs=1e-8)


def test_the_next_flip_of_a_fair_coin_leaves_the_e_value_as_it_is_on_average() -> None:
    lost, won = np.mgrid[:60, :60]
    now, one, other = (np.exp(log_e_value(lost + b, won + c)) for b, c in ((0, 0), (1, 0), (0, 1)))
    np.testing.assert_allclose((one + other) / 2, now, rtol=1e-9)


def test_the_direction_does_not_matter_and_no_overflow_spoils_many_flips() -> None:
    assert float(log_e_value(0, 50_000)) == float(log_e_value(50_000, 0)) == pytest.approx(34_651, abs=1)
    assert p_of_e(log_e_value(50_000, 0)) == 0


def test_e_bh_rejects_as_wang_and_ramdas_define_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        e = np.exp(rng.normal(1, 3, size=rng.integers(1, 15)))
        q = bh_q(p_of_e(np.log(e)))
        for level in (0.01, 0.05, 0.2):
            ordered = np.sort(e)[::-1]
            enough = [k for k in range(1, len(e) + 1) if ordered[k - 1] >= len(e) / (k * level)]
            assert (q <= level).sum() == max(enough, default=0)


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1])
@pytest.mark.parametrize(("units", "images"), [(390, 128), (2000, 1)])
def test_looks_after_every_unit_give_at_most_5_percent_false_alarms(rate: float, units: int, images: int) -> None:
    lost, won = looks(rate, 0.5, units, images, runs=3000)
    assert (log_e_value(lost, won) >= ENOUGH).any(axis=1).mean() <= 0.05
    if images > 1:  # what the e-value is there for
        assert (mcnemar_p(lost, won) < 0.05).any(axis=1).mean() > 0.3


def test_e_bh_over_masks_that_share_their_flips_raises_few_false_alarms_over_all_looks() -> None:
    masks, units, runs = 20, 30, 300
    rng = np.random.default_rng(2)
    common = rng.binomial(6, 0.5, (runs, units, 1))  # of 8 flips a unit all masks share 6
    lost = (common + rng.binomial(2, 0.5, (runs, units, masks))).cumsum(axis=1)
    won = 8 * np.arange(1, units + 1)[:, None] - lost
    p = p_of_e(log_e_value(lost, won))
    decided = [any(bh_q(p[run, unit]).min() <= 0.05 for unit in range(units)) for run in range(runs)]
    assert np.mean(decided) <= 0.05


def test_a_planted_drop_of_twice_what_p_resolves_is_found_early() -> None:
    drop = 2 * smallest_resolvable_drop(50_000, 0.02) / 100  # 0.37 points
    lost, won = looks(0.02 + drop, (0.01 + drop) / (0.02 + drop), 390, 128, runs=1000)
    found = log_e_value(lost, won) >= ENOUGH
    assert found.any(axis=1).mean() > 0.95
    assert np.median(found.argmax(axis=1)[found.any(axis=1)]) < 390 / 2
    # the price: what p finds in 80 of 100 runs at the end, an e-value finds in fewer
    smaller = drop / 2
    lost, won = looks(0.02 + smaller, (0.01 + smaller) / (0.02 + smaller), 390, 128, runs=1000)
    assert (mcnemar_p(lost[:, -1], won[:, -1]) < 0.05).mean() > 0.75
    assert 0.2 < (log_e_value(lost, won) >= ENOUGH).any(axis=1).mean() < 0.45


# -- labels that come sorted -------------------------------------------------------------------------------------------


def test_no_e_value_is_given_at_any_stop_where_units_hold_a_class_each() -> None:
    # Half of the classes lose, half win: there is no drop, yet the e-value is sure of one before all classes came.
    rng = np.random.default_rng(3)
    losing = np.repeat(rng.permuted(np.tile([0, 1], (200, 25)), axis=1), 4, axis=1)  # [runs, units], 4 a class
    flips = rng.binomial(128, 0.03, losing.shape)
    lost = rng.binomial(flips, np.where(losing, 0.9, 0.1))
    e = log_e_value(lost.cumsum(axis=1), (flips - lost).cumsum(axis=1))
    assert (e >= ENOUGH).any(axis=1).mean() > 0.9
    units = [[unit // 4] * 128 for unit in range(200)]
    assert all(reason(units[:stop], complete=stop == 200) for stop in range(1, 201))


@pytest.mark.parametrize("images", [FEWEST_IMAGES, 80, 500])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled classes"])
def test_sorted_labels_are_noticed_in_one_unit_and_in_several(images: int, classes: int, order: str) -> None:
    rng = np.random.default_rng(images + classes)
    labels = np.sort(np.arange(images) % classes)
    if order == "descending":
        labels = labels[::-1]
    elif order == "shuffled classes" and classes < images:  # with a class an image the order is random
        labels = rng.permutation(classes)[labels]
    assert "labels come sorted" in reason([labels.tolist()])
    assert reason(cut(labels, max(10, images // 5)))


def test_units_of_different_classes_are_noticed_though_each_is_shuffled() -> None:
    rng = np.random.default_rng(5)
    # each unit has 60 of 1,000 classes: neighbours alone hardly show it
    units = [rng.choice(rng.choice(1000, 60, replace=False), 500).tolist() for _ in range(20)]
    assert "units are of different classes" in reason(units)


def test_labels_in_random_order_are_hardly_ever_called_sorted() -> None:
    rng = np.random.default_rng(6)
    for classes, images, size in ((2, 60, 12), (10, 500, 100), (1000, 2000, 128)):
        found = [reason(cut(rng.integers(0, classes, images), size)) for _ in range(500)]
        assert found == [""] * 500


def test_both_tests_have_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headprobe.metrics.accuracy.scores.SORTED_P", 0.05)
    rng = np.random.default_rng(7)
    found = [reason(cut(rng.integers(0, 100, 640), 128)) for _ in range(2000)]
    for text in ("labels come sorted", "units are of different classes"):
        assert np.mean([text in one for one in found]) == pytest.approx(0.05, abs=0.015)


def test_the_first_unit_alone_decides_nothing() -> None:
    labels = np.random.default_rng(8).integers(0, 10, 200)
    assert "single unit" in reason([labels.tolist()], complete=False)
    assert reason(cut(labels, 100), complete=False) == ""
    assert reason([labels.tolist()]) == ""
    assert "one class" in reason([[3] * 100, [3] * 100], complete=False)


def test_data_of_one_class_and_units_without_images_are_no_sorted_labels() -> None:
    assert reason([[7] * 100, [], [7] * 50]) == ""
    assert f"fewer than {FEWEST_IMAGES}" in reason([[1, 2, 3], []])
    assert f"fewer than {FEWEST_IMAGES}" in reason([])


def test_the_sums_of_labels_are_those_of_numpy() -> None:
    labels = np.random.default_rng(9).integers(0, 21_843, 300)
    products = sum(one * other for one, other in pairwise(labels.tolist()))
    wanted = (300, labels.sum(), (labels**2).sum(), labels[0] + labels[-1], products)
    assert label_sums(labels.tolist()) == wanted
    assert stats.pearsonr(labels[1:], labels[:-1]).statistic < 0.2  # a plain random order
