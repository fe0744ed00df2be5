"""The figure of orders of removal, and that of indices beside random heads of the same layers."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from headprobe.report.curve_figures import MOST_LINES
from headprobe.report.run_figures import run_figures
from headprobe.run.load import RunFiles, load_files
from tests.report.drawn import caption, drawn, texts
from tests.run.small_runs import write_run

ORDERS = ["grow:random:0-9", *(f"layer:{layer}+grow:random:0" for layer in range(3))]


def made(folder: Path, specs: list[str], ablations: list[str]) -> tuple[RunFiles, dict[str, Figure]]:
    run = load_files(write_run(folder, specs, ablations))
    return run, dict(run_figures(run))


@pytest.mark.parametrize("ablations", [["zero"], ["zero", "mean", "linear"]])
def test_orders_share_one_figure_with_a_panel_for_each_ablation_and_quantity(
    tmp_path: Path, ablations: list[str]
) -> None:
    run, figures = made(tmp_path, ORDERS, ablations)
    figure = figures["curves/heads_removed"]
    assert len(figure.axes) == 2 * len(ablations)
    assert drawn(figure).misplaced == []
    titles = [axes.get_title() for axes in figure.axes[: len(ablations)]]
    assert titles == [f"{kind} ablation" for kind in ablations]
    assert {axes.get_xlabel() for axes in figure.axes[len(ablations) :]} == {"heads removed"}
    assert "random: mean of 10; band: where one more lies with 95%" in texts(figure)
    baseline = figure.axes[0].lines[0]
    assert set(np.asarray(baseline.get_ydata())) == {100 * float(run.masks[0]["top1"])}


def test_a_line_runs_from_the_baseline_through_the_points_of_its_order(tmp_path: Path) -> None:
    run, figures = made(tmp_path, ["grow:random:3"], ["zero"])
    lines = {line.get_label(): line for line in figures["curves/heads_removed"].axes[1].lines}
    line = lines["random_seed_3"]
    assert list(np.asarray(line.get_xdata())) == list(range(8))
    assert list(np.asarray(line.get_ydata())) == [float(row["nll"]) for row in run.masks]


def test_the_band_ends_where_the_table_says(tmp_path: Path) -> None:
    run, figures = made(tmp_path, ["grow:random:0-9"], ["zero"])
    table = run.table("curves.csv")
    assert table is not None
    rows = table["order"] == "random"
    (band,) = figures["curves/heads_removed"].axes[0].collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    base = float(run.masks[0]["top1"])
    limits = [base - table[name][rows] / 100 for name in ("drop_low_pp", "drop_high_pp")]
    assert heights.max() == pytest.approx(100 * limits[0].max())
    assert heights.min() == pytest.approx(100 * limits[1].min())


def test_few_random_orders_are_said_to_be_a_range(tmp_path: Path) -> None:
    _, figures = made(tmp_path, ["grow:random:0-2"], ["zero"])
    assert "random: mean of 3; band: smallest to largest" in texts(figures["curves/heads_removed"])


def test_of_too_many_orders_those_with_the_largest_areas_are_drawn_and_the_others_named(tmp_path: Path) -> None:
    fixed = [f"head:{head}" for head in ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "2.2", "0.0-1", "1.0-1")]
    run, figures = made(tmp_path, [f"{heads}+grow:random:0" for heads in fixed], ["zero"])
    table = run.table("orders.csv")
    assert table is not None
    assert len(table["order"]) == len(fixed)
    by_area = table["order"][np.argsort(-table["area"], kind="stable")].tolist()
    figure = figures["curves/heads_removed"]
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert labels == {"no head removed", *by_area[:MOST_LINES]}
    title = figure.get_suptitle().replace("\n", " ")
    assert "Not drawn, with smaller areas in orders.csv: 2 orders" in title
    assert all(name in title for name in by_area[MOST_LINES:])
    assert drawn(figure).misplaced == []


def test_without_orders_there_is_no_figure(tmp_path: Path) -> None:
    _, figures = made(tmp_path, ["each:layer"], ["zero"])
    assert set(figures) == {"drop_pp/by_layer"}


def test_indices_stand_beside_their_draws_with_the_p_of_the_table(tmp_path: Path) -> None:
    run, figures = made(tmp_path, ["each:index", "one-per-layer:0-98", "one-per-layer:0-30:2"], ["zero", "mean"])
    assert {"index_null/by_index", "index_null/by_index_mean"} <= set(figures)
    figure = figures["index_null/by_index_mean"]
    assert drawn(figure).misplaced == []
    table = run.table("index_null.csv")
    assert table is not None
    rows = (table["ablation"] == "mean") & np.isfinite(table["p"])
    assert rows.sum() == 4
    assert {f"p {p:.3f}" for p in table["p"][rows]} == {text for text in texts(figure) if text.startswith("p ")}
    diamonds = [line for line in figure.axes[1].lines if line.get_marker() == "D"]
    values = table["value"][(table["ablation"] == "mean") & (table["quantity"] == "nll_rise")]
    assert [float(np.asarray(line.get_xdata())[0]) for line in diamonds] == values.tolist()
    assert "31 to 99 draws" in caption(figure)
    assert "fewer than 99 draws there is no p" in caption(figure)


def test_an_index_without_draws_says_so(tmp_path: Path) -> None:
    _, figures = made(tmp_path, ["each:index", "one-per-layer:0-98"], ["zero"])
    assert "no draws" in texts(figures["index_null/by_index"])
