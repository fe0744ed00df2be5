"""`curves.csv`: the cells are those of `masks.csv`, the band is checked by scipy and by simulation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headprobe.run.curves import FEWEST_FOR_BAND, curve_rows, one_more, orders_of
from headprobe.run.load import Row, RunFiles, load_files, read_files
from headprobe.run.results import write_rows
from tests.run.small_runs import HEADS, IMAGES, write_run

EVERY = sum(HEADS)


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return load_files(write_run(tmp_path, ["grow:random:0-9", "each:layer", "layer:0+grow:random:3"], ["zero", "mean"]))


def points(run: RunFiles, order: str, ablation: str = "zero") -> list[Row]:
    return [row for row in curve_rows(run) if (row["order"], row["ablation"]) == (order, ablation)]


def grown(folder: Path, rest: str = "", specs: tuple[str, ...] = (), **options: Any) -> RunFiles:
    """RunFiles nested masks in the order of the single heads of another run."""
    (folder / "before").mkdir()
    before = write_run(folder / "before", ["each:head"])
    (folder / "run").mkdir()
    return load_files(write_run(folder / "run", [f"grow:{before}:nll_rise{rest}", *specs], **options))


def test_the_table_is_computed_again_from_the_files(run: RunFiles) -> None:
    table = run.table("curves.csv")
    assert table is not None
    again = curve_rows(run)
    assert list(table) == list(again[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in again], err_msg=name)


def test_an_order_holds_the_cells_of_its_masks(run: RunFiles) -> None:
    found = points(run, "random_seed_4", "mean")
    assert [row["heads_removed"] for row in found] == list(range(1, EVERY + 1))
    by_mask = {row["mask"]: row for row in run.masks if row["ablation"] == "mean"}
    for row in found:
        mask = by_mask[f"random:{row['heads_removed']}:4"]
        shared = set(row) & set(mask) - {"ablation"}
        assert {name: row[name] for name in shared} == {name: mask[name] for name in shared}
        assert (row["interval"], row["orders"], row["images"]) == ("images", 1, IMAGES)


def test_masks_that_are_not_nested_are_no_order(run: RunFiles) -> None:
    random = {f"random_seed_{seed}" for seed in range(10)}
    assert {order.name for order in orders_of(run)} == random | {"layer_0_random_seed_3"}


def test_the_band_is_where_one_more_random_order_lies(run: RunFiles) -> None:
    rows = points(run, "random")
    assert [row["heads_removed"] for row in rows] == list(range(1, EVERY + 1))
    masks = {row["mask"]: row for row in run.masks if row["ablation"] == "zero"}
    drops = np.array([float(masks[f"random:3:{seed}"]["drop_pp"]) for seed in range(10)])
    reach = stats.t.ppf(0.975, 9) * np.std(drops, ddof=1) * np.sqrt(1.1)
    base = 100 * float(run.masks[0]["top1"])
    wanted = [drops.mean(), max(drops.mean() - reach, base - 100), min(drops.mean() + reach, base)]
    row = rows[2]
    assert [row["drop_pp"], row["drop_low_pp"], row["drop_high_pp"]] == pytest.approx(wanted)
    assert row["top1"] == pytest.approx((base - drops.mean()) / 100)
    rises = np.array([float(masks[f"random:3:{seed}"]["nll_rise"]) for seed in range(10)])
    reach = stats.t.ppf(0.975, 9) * np.std(rises, ddof=1) * np.sqrt(1.1)
    assert [row["nll_rise_low"], row["nll_rise_high"]] == pytest.approx([rises.mean() - reach, rises.mean() + reach])
    assert (row["orders"], row["interval"]) == (10, "one more order")


def test_fewer_than_ten_random_orders_have_a_range_and_no_band(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0-3"]))
    row = points(run, "random")[2]
    drops = [float(mask["drop_pp"]) for mask in run.masks if str(mask["mask"]).startswith("random:3:")]
    assert [row["drop_low_pp"], row["drop_high_pp"]] == [min(drops), max(drops)]
    assert row["interval"] == "range of 4 orders: a band needs 10"


def test_a_single_random_order_has_no_mean(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:7"]))
    assert {row["order"] for row in curve_rows(run)} == {"random_seed_7"}


def test_draws_of_one_size_join_the_random_orders_of_that_size(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0-1", "random:3:50-59"]))
    assert {row["heads_removed"]: row["orders"] for row in points(run, "random")}[3] == 12
    assert points(run, "random_seed_50") == []


@pytest.mark.parametrize("specs", [["each:layer", "layer:0-1", "layer:0-2"], ["random:3:0-9"], ["each:head"]])
def test_without_an_order_there_is_no_table(tmp_path: Path, specs: list[str]) -> None:
    run = load_files(write_run(tmp_path, specs))
    assert curve_rows(run) == []
    assert run.table("curves.csv") is None


@pytest.mark.parametrize(
    ("rest", "counts"), [("", range(1, 8)), (":most:1-7/3", [1, 4, 7]), (":least:0-6/2", [2, 4, 6])]
)
def test_orders_by_a_column_and_thinned_ones_have_their_own_counts(
    tmp_path: Path, rest: str, counts: list[int]
) -> None:
    run = grown(tmp_path, rest)
    name = f"grow_nll_rise_{'most' if 'most' in rest else 'least'}"
    assert [row["heads_removed"] for row in points(run, name)] == list(counts)


def test_a_reversed_order_is_by_the_heads_that_it_removes(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["keep:grow:random:0-1"]))
    rows = points(run, "keep_random_seed_1")
    assert [row["heads_removed"] for row in rows] == list(range(1, EVERY))  # to keep all removes none
    masks = {row["mask"]: row for row in run.masks}
    assert rows[1]["nll"] == masks["keep:random:5:1"]["nll"]
    assert [row["heads_removed"] for row in points(run, "keep_random")] == list(range(1, EVERY))


def test_draws_of_an_ablation_count_with_their_mean(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0"], ["resample:3"]))
    row = points(run, "random_seed_0", "resample")[1]
    lines = [number for number, mask in enumerate(run.masks) if mask["mask"] == "random:2:0"]
    assert len(lines) == 3
    rises = [float(run.masks[line]["nll_rise"]) for line in lines]
    assert row["nll_rise"] == pytest.approx(np.mean(rises))
    groups = run.arrays("groups.npz")
    full = groups["images"] > 0
    mean = (groups["nll"][lines].mean(axis=0) - groups["nll"][0])[full]
    rest = (mean.sum() - mean) / (IMAGES - groups["images"][full])
    count = len(rest)
    reach = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * np.square(rest - rest.mean()).sum())
    limits = [np.mean(rises) - reach, np.mean(rises) + reach]
    assert [row["nll_rise_low"], row["nll_rise_high"]] == pytest.approx(limits)


def test_rows_of_all_ablations_follow_each_other(run: RunFiles) -> None:
    kinds = [str(row["ablation"]) for row in curve_rows(run)]
    assert kinds == sorted(kinds, reverse=True)


def test_infinite_nll_leaves_the_rise_undefined_and_the_drop_known(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["grow:random:0-9"])
    rows = read_files(folder).masks
    rows[3] |= {"nll": float("inf"), "nll_rise": float("inf"), "nll_rise_low": float("nan")}
    write_rows(folder / "masks.csv", rows)
    row = points(read_files(folder), "random")[2]
    assert np.isfinite([float(row["drop_low_pp"]), float(row["drop_high_pp"])]).all()
    assert row["nll_rise"] == np.inf


@pytest.mark.parametrize("orders", [FEWEST_FOR_BAND, 20])
@pytest.mark.parametrize("shape", [(8.0, 2.0), (2.0, 8.0), (0.7, 0.7), (20.0, 1.0)])
def test_one_more_order_lies_in_the_band_at_its_rate(orders: int, shape: tuple[float, float]) -> None:
    """Accuracies of random orders at a count, from nearly all right to nearly all wrong, and of two kinds."""
    values = np.random.default_rng(0).beta(*shape, (2000, orders + 1))
    limits = np.array([one_more(row[:-1], 0, 1)[1:] for row in values])
    covered = (limits[:, 0] <= values[:, -1]) & (values[:, -1] <= limits[:, 1])
    assert covered.mean() >= 0.915


def test_the_band_of_normal_orders_is_exact() -> None:
    values = np.random.default_rng(1).normal(size=(4000, 11))
    limits = np.array([one_more(row[:-1])[1:] for row in values])
    covered = (limits[:, 0] <= values[:, -1]) & (values[:, -1] <= limits[:, 1])
    assert covered.mean() == pytest.approx(0.95, abs=0.011)
