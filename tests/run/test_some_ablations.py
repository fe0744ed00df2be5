"""Runs whose masks were not all scored under every ablation: each table holds what is there, and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from headprobe.report.run_figures import run_figures
from headprobe.run.load import Columns, RunFiles, load_files
from tests.run.small_runs import write_run

SPECS = [
    *(
        "each:layer",
        "each:head",
        "each:index",
        "zero:each:pair",
        "zero:one-per-layer:0-98",
        "zero:one-per-layer:0-98:2",
    ),
    *("random:2,5,7:0-9", "zero:grow:random:0-4"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    folder = tmp_path_factory.mktemp("run")
    return load_files(write_run(folder, SPECS, ["zero", "mean"]))


def table(run: RunFiles, name: str) -> Columns:
    found = run.table(name)
    assert found is not None
    return found


def test_draws_judge_indices_under_their_own_ablation_alone(run: RunFiles) -> None:
    null = table(run, "index_null.csv")
    assert set(null["ablation"]) == {"zero"}
    assert np.isfinite(null["p"]).all()
    assert len(null["p"]) == 3 * 2  # indices x quantities


def test_ablations_are_compared_over_the_masks_that_both_have(run: RunFiles) -> None:
    compared = table(run, "ablations.csv")
    masks = dict(zip(compared["test_family"], compared["masks"], strict=True))
    assert masks == {"each:layer": 3, "each:head": 7, "each:index": 3, "random:2,5,7:0-9": 30}


def test_sets_are_judged_under_the_ablation_that_has_them_all(run: RunFiles) -> None:
    assert set(table(run, "shapley.csv")["ablation"]) == {"zero"}
    pairs = table(run, "interactions.csv")
    of_masks = {mask: set(pairs["ablation"][pairs["mask"] == mask].tolist()) for mask in pairs["mask"]}
    assert of_masks["head:2.0,1"] == {"zero"}
    assert of_masks["layer:0"] == {"zero", "mean"}  # a pair that is a whole layer too


def test_random_orders_have_the_sizes_of_their_ablation(run: RunFiles) -> None:
    curves = table(run, "curves.csv")
    means = curves["orders"] > 1
    sizes = {
        name: sorted(set(curves["heads_removed"][means & (curves["ablation"] == name)].tolist()))
        for name in ("zero", "mean")
    }
    assert sizes == {"zero": [1, 2, 3, 4, 5, 6, 7], "mean": [2, 5, 7]}


def test_every_figure_is_drawn(run: RunFiles) -> None:
    names = [name for name, _ in run_figures(run)]
    assert {"index_null/by_index", "curves/heads_removed", "ablations/each-head_zero_mean"} <= set(names)
    assert "index_null/by_index_mean" not in names


def test_a_run_with_orders_under_one_of_its_ablations_alone_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["random:2,5:0-1", "mean:grow:random:0-4"], ["zero", "mean"])
    (figure,) = (figure for name, figure in run_figures(load_files(folder)) if name == "curves/heads_removed")
    assert len(figure.axes) == 4
