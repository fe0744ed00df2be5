"""Plots of a run: each gives (fig, ax) and draws the files' numbers, also into axes that were given."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import headprobe
from headprobe.errors import UsageError
from headprobe.report.run_figures import run_figures
from headprobe.run.load import load_files
from tests.loaded.whole_runs import PLACES
from tests.report.drawn import drawn, texts
from tests.run.small_runs import HEADS, write_run


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture
def run(whole: Path) -> headprobe.Run:
    return headprobe.load_run(whole)


ONE: dict[str, Callable[..., Any]] = {
    "drops": lambda plot, ax=None: plot.drops(ax),
    "drops by index": lambda plot, ax=None: plot.drops(ax, by="index", ablation="mean"),
    "drops by mask": lambda plot, ax=None: plot.drops(ax, by="mask"),
    "heads_map": lambda plot, ax=None: plot.heads_map(ax),
    "heads_map of a score": lambda plot, ax=None: plot.heads_map(ax, column="gradient_abs"),
    "heads_map of a description": lambda plot, ax=None: plot.heads_map(ax, column="attention_distance_px"),
    "distance": lambda plot, ax=None: plot.distance(ax),
    "similarity of a layer": lambda plot, ax=None: plot.similarity(ax, layer=2),
    "spectra of a layer": lambda plot, ax=None: plot.spectra(ax, layer=1),
    "curves of one kind": lambda plot, ax=None: plot.curves(ax, quantity="nll", ablation="mean"),
    "importance of one kind": lambda plot, ax=None: plot.importance(ax, ablation="zero"),
}

SEVERAL = {"similarity": len(HEADS), "spectra": len(HEADS), "curves": 4, "importance": 2}


@pytest.mark.parametrize("name", ONE)
def test_a_plot_gives_a_figure_that_notebooks_show_and_its_axes(run: headprobe.Run, name: str) -> None:
    fig, ax = ONE[name](run.plot)
    assert isinstance(fig, Figure)
    assert isinstance(ax, Axes)
    assert ax.figure is fig
    assert fig.number in plt.get_fignums()
    assert drawn(fig).misplaced == []


@pytest.mark.parametrize("name", ONE)
def test_a_plot_draws_into_axes_that_were_given_and_makes_no_figure(run: headprobe.Run, name: str) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(14, 8), layout="constrained")
    fig.suptitle("mine")
    found = ONE[name](run.plot, axes[1])
    assert (found[0] is fig, found[1] is axes[1]) == (True, True)
    assert plt.get_fignums() == [fig.number]
    assert axes[1].has_data()
    assert not axes[0].has_data()
    assert axes[1].get_title(loc="left")
    assert fig.get_suptitle() == "mine"
    drawn(fig)


def test_axes_of_a_subfigure_are_drawn_into(run: headprobe.Run) -> None:
    fig = plt.figure(layout="constrained")
    halves: Any = fig.subfigures(1, 2)
    ax = halves[1].subplots()
    assert run.plot.heads_map(ax) == (fig, ax)
    assert ax.has_data()
    drawn(fig)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_figure_of_several_panels_gives_an_array_of_axes_and_refuses_one(run: headprobe.Run, name: str) -> None:
    fig, axes = getattr(run.plot, name)()
    assert isinstance(axes, np.ndarray)
    assert len(axes) == SEVERAL[name]
    assert all(isinstance(one, Axes) and one.figure is fig for one in axes)
    before = plt.get_fignums()
    with pytest.raises(UsageError, match=f"has {SEVERAL[name]} panels: choose one by .*=, or leave ax out"):
        getattr(run.plot, name)(axes[0])
    assert plt.get_fignums() == before


def test_drops_are_the_files_numbers(run: headprobe.Run, whole: Path) -> None:
    rows = pd.read_csv(whole / "masks.csv", keep_default_na=False)
    rows = rows[(rows["ablation"] == "mean") & rows["mask"].isin(["layer:0", "layer:1", "layer:2"])]
    _, ax = run.plot.drops(by="layer", ablation="mean")
    (dots, _, (bars,)) = ax.containers[0]
    np.testing.assert_array_equal(dots.get_ydata(), rows["drop_pp"])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, rows[["drop_low_pp", "drop_high_pp"]].astype(float))
    assert "mean ablation" in ax.figure.get_suptitle()


def test_the_map_holds_each_head_in_its_place(run: headprobe.Run, whole: Path) -> None:
    rows = pd.read_csv(whole / "masks.csv", keep_default_na=False)
    rises: dict[tuple[int, int], float] = {}
    for mask, rise in rows[rows["ablation"] == "zero"][["mask", "nll_rise"]].itertuples(index=False):
        if len(run.masked_heads[mask]) == 1:  # of several names of a head the first: their answers are made up here
            rises.setdefault(run.masked_heads[mask][0], rise)
    _, ax = run.plot.heads_map()
    image = ax.images[0].get_array()
    assert {place: image[place] for place in PLACES} == rises
    _, ax = run.plot.heads_map(column="attention_distance_px")
    np.testing.assert_array_equal(ax.images[0].get_array().compressed(), run.heads["attention_distance_px"])
    assert "attention_distance_px (pixels)" in texts(ax.figure)


def test_a_map_says_which_images_it_is_of(run: headprobe.Run) -> None:
    assert "9 images, those that calibrate" in run.plot.heads_map(column="gradient_abs")[0].get_suptitle()
    judged = run.plot.heads_map(column="attention_distance_px")[0].get_suptitle()
    assert "40 images" in judged
    assert "calibrate" not in judged


def test_plots_show_what_a_run_saves(run: headprobe.Run) -> None:
    """The pixels of `figures/`, which are drawn from the same files."""
    saved = dict(run_figures(run.files))
    for name, mine in (
        ("drop_pp/by_layer", run.plot.drops()),
        ("drop_pp/heads_mean", run.plot.heads_map(column="drop_pp", ablation="mean")),
        ("attention_distance_px/by_layer", run.plot.distance()),
        ("svcca/by_layer_baseline", run.plot.similarity()),
        ("spectrum/head_baseline", run.plot.spectra()),
        ("curves/heads_removed", run.plot.curves()),
        ("importance/correlations", run.plot.importance()),
    ):
        assert drawn(mine[0]).png == drawn(saved[name]).png, name


def test_a_run_gives_every_figure_by_name(run: headprobe.Run) -> None:
    assert [name for name, _ in run.figures()] == [name for name, _ in run_figures(run.files)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plot: plot.drops(ablation="linear"), r"ablation must be one of zero, mean, got 'linear'"),
        (lambda plot: plot.drops(by="head"), r"by must be one of layer, index, mask, got 'head'"),
        (lambda plot: plot.drops(3), r"ax must be one of matplotlib's Axes, .*got int"),
        (lambda plot: plot.heads_map(column="nothing"), r"column must be one of nll_rise, drop_pp, .*got 'nothing'"),
        (lambda plot: plot.distance(column="nothing"), r"column must be one of attention_distance_px, .*got 'nothing'"),
        (lambda plot: plot.similarity(measure="cka"), r"measure must be one of svcca, cca, got 'cka'"),
        (lambda plot: plot.similarity(layer=3), r"layer must be one of 0, 1, 2, got 3"),
        (lambda plot: plot.spectra(series="x"), r"series must be one of head, contribution, got 'x'"),
        (
            lambda plot: plot.curves(quantity="top5"),
            r"quantity must be one of top1, nll, feature_cosine, feature_distance, got 'top5'",
        ),
        (lambda plot: plot.importance(ablation="x"), r"ablation must be one of zero, mean, got 'x'"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_right_ones(
    run: headprobe.Run, call: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        call(run.plot)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["distance", "similarity", "spectra", "curves", "importance"])
def test_a_plot_of_what_is_not_there_says_what_makes_it(tmp_path: Path, name: str) -> None:
    run = headprobe.load_run(write_run(tmp_path, ["layer:1"]))
    with pytest.raises(UsageError, match=r"there is no .* makes it, got "):
        getattr(run.plot, name)()


def test_a_single_mask_is_drawn_by_its_name_and_has_no_map(tmp_path: Path) -> None:
    run = headprobe.load_run(write_run(tmp_path, ["layer:1"]))
    _, ax = run.plot.drops()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["layer:1"]
    with pytest.raises(UsageError, match=r"a map of nll_rise needs two masks of one head or more: .*each:head"):
        run.plot.heads_map()
    with pytest.raises(UsageError, match="the baseline alone"):
        headprobe.load_run(write_run(tmp_path / "none", ["none"])).plot.drops()


def test_of_many_masks_the_largest_drops_are_drawn_and_the_title_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, ["grow:random:0-19"])
    files = load_files(tmp_path)
    fig, ax = headprobe.load_run(tmp_path).plot.drops(by="mask")
    drops = sorted((float(row["drop_pp"]) for row in files.masks[1:]), reverse=True)
    assert len(drops) > 60
    assert sorted(ax.containers[0][0].get_ydata(), reverse=True) == drops[:60]
    assert f"the largest 60 of {len(drops)}" in fig.get_suptitle()
    assert drawn(fig).misplaced == []
