"""Figures of Shapley values and of interactions."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from headprobe.report.set_figures import set_figures
from headprobe.run.load import load_files, read_files
from headprobe.run.results import column_rows, write_rows
from tests.report.drawn import caption, drawn
from tests.run.small_runs import HEADS, write_run

SPECS = ["subsets:layer", "each:pair", "grow:random:0-4", "keep:grow:random:0-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), SPECS, ["zero", "mean"])


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Figure]:
    return dict(set_figures(load_files(folder)))


def cells(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))  # type: ignore[union-attr]


def test_each_ablation_has_its_figures(figures: dict[str, Figure]) -> None:
    shapley = {f"shapley/{what}_{players}" for what in ("nll_rise", "drop_pp") for players in ("heads", "layers")}
    pairs = {"interactions/heads", "interactions/layers", "interactions/shapley_layers"}
    assert set(figures) == {f"{name}{end}" for name in shapley | pairs for end in ("", "_mean")}


def test_nothing_leaves_its_place(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        assert drawn(figure).misplaced == [], name


def test_the_map_holds_each_heads_value(figures: dict[str, Figure], folder: Path) -> None:
    table = load_files(folder).table("shapley.csv")
    assert table is not None
    values = cells(figures["shapley/nll_rise_heads_mean"])
    rows = (table["players"] == "heads") & (table["ablation"] == "mean") & (table["quantity"] == "nll_rise")
    for layer, head, value in zip(table["layer"][rows], table["head"][rows], table["value"][rows], strict=True):
        assert values[int(layer), int(head)] == value
    assert np.isnan(values).sum() == 3 * 3 - sum(HEADS)
    title = figures["shapley/nll_rise_heads_mean"].get_suptitle().replace("\n", " ")
    assert title == "Shapley values of heads, by 5 random orders, 2 with their reverse tiny, 40 images, mean ablation"


def test_within_layers_each_layer_has_its_matrix(figures: dict[str, Figure]) -> None:
    panels = [axes.get_title() for axes in figures["interactions/heads"].axes if axes.get_title()]
    assert panels == ["layer 0", "layer 1", "layer 2"]
    assert caption(figures["interactions/heads"]).startswith("Rows and columns: heads of the layer.")


def test_pairs_across_layers_have_one_matrix(tmp_path: Path) -> None:
    found = dict(set_figures(load_files(write_run(tmp_path, ["each:pair:all"]))))
    assert list(found) == ["interactions/heads"]
    (axes, _) = found["interactions/heads"].axes
    assert axes.get_title() == ""
    assert {text.get_text() for text in axes.texts} != set()
    assert drawn(found["interactions/heads"]).misplaced == []


def test_layers_show_what_each_costs_alone(figures: dict[str, Figure], folder: Path) -> None:
    run = load_files(folder)
    figure = figures["shapley/nll_rise_layers"]
    (rings,) = [line for line in figure.axes[0].lines if line.get_label() == "this layer alone"]
    alone = [row["nll_rise"] for row in run.masks if row["mask"] in {f"layer:{n}" for n in range(3)}][::2]
    np.testing.assert_array_equal(np.asarray(rings.get_ydata()), alone)


def test_without_pairs_and_orders_there_are_none(tmp_path: Path) -> None:
    assert list(set_figures(load_files(write_run(tmp_path, ["each:head"])))) == []


def test_interactions_of_a_model_without_a_finite_nll_have_no_figure(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = read_files(folder).table("interactions.csv")
    assert table is not None
    gone = {name: np.full(len(table[name]), np.nan) for name in ("interaction", "bh_q")}
    write_rows(tmp_path / "interactions.csv", column_rows(table | gone))
    assert not [name for name, _ in set_figures(load_files(tmp_path)) if name.startswith("interactions")]
