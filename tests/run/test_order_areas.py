"""`orders.csv`: areas by numpy's trapezoid, intervals by hand and by simulation, heads removable by counting."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from headprobe.metrics.accuracy.agreement import mean_of_sums
from headprobe.metrics.accuracy.jackknife import images_and_draws_interval, leave_one_out
from headprobe.metrics.accuracy.paired_tests import drop_interval_pp
from headprobe.run.curves import curve_rows
from headprobe.run.load import Row, RunFiles, load_files, read_files
from headprobe.run.order_areas import area_weights, order_rows, removable
from headprobe.run.results import write_rows
from tests.run.small_runs import IMAGES, write_run
from tests.run.test_curves import grown

Array = NDArray[np.float64]


def row_of(run: RunFiles, order: str, ablation: str = "zero") -> Row:
    (row,) = [row for row in order_rows(run) if (row["order"], row["ablation"]) == (order, ablation)]
    return row


def curve(run: RunFiles, order: str) -> tuple[list[int], list[float]]:
    """Heads removed and accuracies, the baseline in front."""
    rows = [row for row in curve_rows(run) if row["order"] == order]
    base = float(run.masks[0]["top1"])
    return [0, *(int(row["heads_removed"]) for row in rows)], [base, *(float(row["top1"]) for row in rows)]


def test_weights_are_those_of_the_trapezoid() -> None:
    rng = np.random.default_rng(0)
    for counts in ([0, 1], [0, 1, 2, 3], [0, 1, 6, 11, 36], [0, 5]):
        values = rng.random(len(counts))
        wanted = np.trapezoid(values, np.array(counts) / counts[-1])
        assert area_weights(np.array(counts)) @ values == pytest.approx(wanted)


@pytest.mark.parametrize("rest", ["", ":most", ":least:1-7/3"])
def test_the_area_is_the_mean_height_of_the_curve(tmp_path: Path, rest: str) -> None:
    run = grown(tmp_path, rest)
    (row,) = order_rows(run)
    counts, accuracies = curve(run, str(row["order"]))
    assert row["area"] == pytest.approx(np.trapezoid(accuracies, counts) / counts[-1])
    assert (row["counts"], row["most_removed"]) == (len(counts) - 1, counts[-1])
    assert float(row["area_low"]) < float(row["area"]) < float(row["area_high"])


def test_the_limits_of_an_area_are_the_jackknifes_over_groups(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0"]))
    row = row_of(run, "random_seed_0")
    groups = run.arrays("groups.npz")
    names = ["none", *(f"random:{count}:0" for count in range(1, 8))]
    right = groups["top1_count"][[groups["mask"].tolist().index(name) for name in names]]
    full = groups["images"] > 0
    areas = [
        np.trapezoid((right.sum(axis=1) - right[:, group]) / (IMAGES - groups["images"][group]), np.arange(8)) / 7
        for group in np.flatnonzero(full)
    ]
    count = len(areas)
    reach = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * np.square(areas - np.mean(areas)).sum())
    limits = [float(row["area"]) - reach, float(row["area"]) + reach]
    assert [row["area_low"], row["area_high"]] == pytest.approx(limits)


def test_the_mean_of_random_orders_has_the_mean_of_their_areas(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0-9"]))
    seeds = [float(row_of(run, f"random_seed_{seed}")["area"]) for seed in range(10)]
    row = row_of(run, "random")
    assert row["orders"] == 10
    assert row["area"] == pytest.approx(np.mean(seeds))
    assert float(row["area_high"]) - float(row["area"]) > stats.t.ppf(0.975, 63) * np.std(seeds, ddof=1) / np.sqrt(10)


def test_the_difference_from_random_orders_is_over_the_counts_of_all(tmp_path: Path) -> None:
    run = grown(tmp_path, ":least:1-7/3", ("grow:random:0-5", "random:1-7/2:6-9"))
    counts = [0, 1, 7]  # 1, 4, 7 and 1, 3, 5, 7

    def area(name: str) -> float:
        every, accuracies = curve(run, name)
        return float(np.trapezoid([accuracies[every.index(count)] for count in counts], counts)) / 7

    wanted = area("grow_nll_rise_least") - np.mean([area(f"random_seed_{seed}") for seed in range(10)])
    row = row_of(run, "grow_nll_rise_least")
    assert row["minus_random"] == pytest.approx(wanted)
    assert float(row["minus_random_low"]) < wanted < float(row["minus_random_high"])
    assert all(np.isnan(float(row_of(run, name)["minus_random"])) for name in ("random", "random_seed_3"))


def test_few_random_orders_give_a_difference_without_interval(tmp_path: Path) -> None:
    row = row_of(grown(tmp_path, "", ("grow:random:0-3",)), "grow_nll_rise_least")
    assert np.isfinite(float(row["minus_random"]))
    assert np.isnan([float(row["minus_random_low"]), float(row["minus_random_high"])]).all()


def test_an_order_beside_fixed_heads_is_compared_with_random_orders_beside_the_same(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    before = write_run(tmp_path / "before", ["each:head"])
    specs = [f"layer:0+grow:{before}:nll_rise", "layer:0+grow:random:0-5", "grow:random:0-5"]
    (tmp_path / "run").mkdir()
    run = load_files(write_run(tmp_path / "run", specs))
    beside = [float(row_of(run, f"layer_0_random_seed_{seed}")["area"]) for seed in range(6)]
    row = row_of(run, "layer_0_grow_nll_rise_least")
    assert row["minus_random"] == pytest.approx(float(row["area"]) - np.mean(beside))


def with_drops(folder: Path, drops: list[float], highs: list[float]) -> RunFiles:
    """Give the masks of one order these drops and upper limits."""
    run = read_files(write_run(folder, ["grow:random:0"]))
    for row, drop, high in zip(run.masks[1:], drops, highs, strict=True):
        row |= {"drop_pp": drop, "drop_high_pp": high}
    write_rows(folder / "masks.csv", run.masks)
    return read_files(folder)


@pytest.mark.parametrize(
    ("drops", "wanted"),
    [
        ([-1, 0, 1, 2, 0.5, 6, 1], (3, 5)),  # the first that costs more ends it, whatever comes behind
        ([2, 0, 0, 0, 0, 0, 0], (0, 7)),
        ([0, 0, 0, 0, 0, 0, 1], (7, 7)),
        ([0, float("nan"), 0, 0, 0, 0, 0], (1, 1)),
    ],
)
def test_heads_can_go_up_to_the_first_that_costs_more(
    tmp_path: Path, drops: list[float], wanted: tuple[int, int]
) -> None:
    row = row_of(with_drops(tmp_path, drops, [drop + 1 for drop in drops]), "random_seed_0")
    assert (row["removable_1pp"], row["removable_5pp"]) == wanted
    below = with_drops(tmp_path, [drop - 1 for drop in drops], drops)
    assert (row_of(below, "random_seed_0")["removable_1pp_surely"]) == wanted[0]


def test_a_number_of_heads_that_can_go_surely_costs_more_in_at_most_one_run_of_forty() -> None:
    """Looking at one number of heads after the other needs no correction: the first wrong one must pass by chance."""
    rng = np.random.default_rng(5)
    images, counts = 400, np.arange(1, 13)
    lost, gained = 0.02 + 0.006 * counts, np.full(12, 0.012)  # the drop is above 5 points from 8 heads on
    flips = np.zeros((2, 800, 12), dtype=np.int64)
    for number in range(800):
        margin = rng.normal(size=(images, 1)) * 0.8 + rng.normal(size=(images, 12)) * 0.6  # alike at all counts
        flips[0, number] = (margin < stats.norm.ppf(lost)).sum(axis=0)
        flips[1, number] = (margin > stats.norm.isf(gained)).sum(axis=0)
    wrong = 0
    for highs in drop_interval_pp(flips[0], flips[1], images)[1].tolist():
        rows: list[Row] = [
            {"heads_removed": count, "drop_high_pp": high, "drop_pp": 0.0, "interval": "images"}
            for count, high in zip(counts.tolist(), highs, strict=True)
        ]
        given = int(removable(rows, 5)["removable_5pp_surely"])
        wrong += given > 0 and bool(100 * (lost - gained)[given - 1] > 5)
    assert wrong / 800 <= 0.035


def test_a_range_of_random_orders_says_nothing_surely(tmp_path: Path) -> None:
    few = row_of(load_files(write_run(tmp_path, ["grow:random:0-4"])), "random")
    assert np.isnan(float(few["removable_5pp_surely"]))
    many = row_of(load_files(write_run(tmp_path, ["grow:random:0-9"])), "random")
    assert int(many["removable_5pp_surely"]) <= int(many["removable_5pp"])


def test_the_sum_of_both_variances_is_welchs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sums, images, draws = rng.normal(size=64), rng.integers(1, 9, 64), rng.normal(size=12)
    without = leave_one_out(sums, images)
    both = 63 / 64 * np.square(without - without.mean()).sum(), draws.var(ddof=1) / 12
    degrees = sum(both) ** 2 / (both[0] ** 2 / 63 + both[1] ** 2 / 11)
    reach = stats.t.ppf(0.975, degrees) * np.sqrt(sum(both))
    assert images_and_draws_interval(1.0, without, draws) == pytest.approx((1 - reach, 1 + reach))
    assert np.isnan(images_and_draws_interval(1.0, without, draws[:1])).all()
    assert np.isnan(images_and_draws_interval(1.0, without[:1], draws)).all()
    assert images_and_draws_interval(1.0, np.ones(64), np.ones(3)) == (1.0, 1.0)


# -- coverage: images and random orders are both drawn anew in every run --

COUNTS = np.arange(0, 25, 4)
SHARE = COUNTS / 24


def accuracy(difficulty: Array) -> Array:
    return np.asarray(stats.norm.sf((difficulty - 1.2) / np.sqrt(1.25)))


def areas_of(rng: np.random.Generator, images: int, difficulty: Array) -> tuple[Array, NDArray[np.int64]]:
    """Areas of one sample of images as sums over groups, `[orders, groups]`, and images of each group.

    An image is right where its margin, which all orders share, exceeds the order's difficulty `[orders, points]`.
    """
    margin = rng.normal(1.2, 1, (images, 1, 1)) + 0.5 * rng.normal(size=(images, *difficulty.shape))
    areas = (margin > difficulty) @ area_weights(COUNTS)  # [images, orders]
    groups = rng.integers(0, 64, images)
    sums = np.stack([np.bincount(groups, own, minlength=64) for own in areas.T]).astype(np.float64)
    return sums, np.bincount(groups, minlength=64)


@pytest.mark.parametrize("images", [50, 250])
def test_the_interval_of_an_area_covers_that_of_all_images(images: int) -> None:
    rng = np.random.default_rng(0)
    truth = float(area_weights(COUNTS) @ accuracy(3 * SHARE**2))
    covered = []
    for _ in range(300):
        sums, counts = areas_of(rng, images, 3 * SHARE[None] ** 2)
        _, low, high = mean_of_sums(sums[0], counts)
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize("orders", [5, 10])
@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_the_interval_of_a_difference_covers_that_from_all_orders_on_all_images(orders: int, spread: float) -> None:
    rng = np.random.default_rng(1)
    every = np.exp(np.random.default_rng(9).normal(0, spread, 20_000))[:, None]
    truth = float(area_weights(COUNTS) @ (accuracy(3 * SHARE**2) - accuracy(3 * SHARE * every).mean(axis=0)))
    covered = []
    for _ in range(200):
        random = 3 * SHARE * np.exp(rng.normal(0, spread, orders))[:, None]
        sums, counts = areas_of(rng, 250, np.concatenate([3 * SHARE[None] ** 2, random]))
        differences = sums[0] - sums[1:]
        each = differences.sum(axis=1) / 250
        without = leave_one_out(differences.mean(axis=0), counts)
        low, high = images_and_draws_interval(float(each.mean()), without, each)
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.91
