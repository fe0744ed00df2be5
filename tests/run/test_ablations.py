"""`ablations.csv` follows from `masks.csv` and `groups.npz`."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from headprobe.run.ablations import ablation_rows
from headprobe.run.load import RunFiles, load_files
from tests.run.small_runs import IMAGES, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return load_files(write_run(tmp_path, ["each:head", "each:layer", "head:0.1"], ["zero", "mean", "resample:3"]))


def rises(run: RunFiles, kind: str, column: str = "nll_rise") -> list[float]:
    """The mean of draws of each single head, in the order of masks.csv; rounded, so that equal ones are ties."""
    found: dict[str, list[float]] = {}
    for row in run.masks[1:]:
        if row["ablation"] == kind and str(row["mask"]).startswith("head:"):
            found.setdefault(str(row["mask"]), []).append(float(row[column]))
    return [round(float(np.mean(values)), 12) for values in found.values()]


def test_groups_hold_the_rows_of_masks_csv(run: RunFiles) -> None:
    groups = run.arrays("groups.npz")
    for name in ("mask", "ablation", "draw"):
        assert groups[name].tolist() == [row[name] for row in run.masks]
    assert groups["images"].shape == (64,)
    assert groups["images"].sum() == IMAGES
    assert groups["top1_count"].sum(axis=1).tolist() == [row["top1_count"] for row in run.masks]
    np.testing.assert_allclose(groups["nll"].sum(axis=1) / IMAGES, [float(row["nll"]) for row in run.masks])


def test_the_table_is_computed_again_from_the_files(run: RunFiles) -> None:
    again = ablation_rows(run.masks, run.arrays("groups.npz"))
    table = run.table("ablations.csv")
    assert table is not None
    assert list(table) == list(again[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in again], err_msg=name)


def test_every_test_family_has_a_row_for_each_two_ablations_and_quantity(run: RunFiles) -> None:
    keys = ("test_family", "ablation_a", "ablation_b", "quantity", "masks")
    found = [tuple(row[key] for key in keys) for row in ablation_rows(run.masks, run.arrays("groups.npz"))]
    pairs = [("zero", "mean"), ("zero", "resample"), ("mean", "resample")]
    families = [("each:head", 7), ("each:layer", 3)]
    wanted = [(name, *pair, what, n) for name, n in families for pair in pairs for what in ("nll_rise", "drop_pp")]
    assert found == wanted


@pytest.mark.parametrize("quantity", ["nll_rise", "drop_pp"])
@pytest.mark.parametrize("pair", [("zero", "mean"), ("mean", "resample")])
def test_the_cells_follow_from_the_rises_of_masks_csv(run: RunFiles, pair: tuple[str, str], quantity: str) -> None:
    (row,) = [
        row
        for row in ablation_rows(run.masks, run.arrays("groups.npz"))
        if (row["ablation_a"], row["ablation_b"], row["quantity"]) == (*pair, quantity)
        and row["test_family"] == "each:head"
    ]
    first, second = (rises(run, kind, quantity) for kind in pair)
    assert row["spearman"] == pytest.approx(spearmanr(first, second).statistic)
    assert row["kendall"] == pytest.approx(kendalltau(first, second).statistic)
    wanted = (sum(first), sum(second), sum(second) - sum(first))
    assert (row["sum_a"], row["sum_b"], row["b_minus_a"]) == pytest.approx(wanted)
    assert float(row["b_minus_a_low"]) < float(row["b_minus_a"]) < float(row["b_minus_a_high"])


def test_one_ablation_is_compared_with_nothing(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ["mean"]))
    assert ablation_rows(run.masks, run.arrays("groups.npz")) == []
    assert run.table("ablations.csv") is None


def test_two_masks_have_no_order(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["layer:0-1+each:index"], ["zero", "mean"]))
    assert len({row["mask"] for row in run.masks[1:]}) == 3
    few = [row for row in run.masks if row["mask"] != run.masks[1]["mask"]]
    keep = [row in few for row in run.masks]
    groups = {name: array if name == "images" else array[keep] for name, array in run.arrays("groups.npz").items()}
    assert ablation_rows(few, groups) == []


def test_every_row_says_which_images_fitted(run: RunFiles) -> None:
    rows = ablation_rows(run.masks, run.arrays("groups.npz"), "same")
    pairs = {(row["ablation_a"], row["ablation_b"]): row["calibration"] for row in rows}
    # neither zero nor resampling is fitted
    assert pairs == {("zero", "mean"): "same", ("zero", "resample"): "", ("mean", "resample"): "same"}
