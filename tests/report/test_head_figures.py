from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray
from headprobe.report.head_figures import by_layer, change_by_layer
from tests.report.drawn import caption, drawn, pixels, texts

LAYER = np.repeat(np.arange(4), [3, 3, 6, 6])
HEAD = np.concatenate([np.arange(heads) for heads in (3, 3, 6, 6)])
VALUES = np.random.default_rng(0).uniform(10, 100, len(LAYER))


def line_of(axes: Axes, label: str) -> Line2D:
    return next(line for line in axes.lines if str(line.get_label()).startswith(label))


def points(line: Line2D) -> NDArray[np.float64]:
    return np.asarray(line.get_xydata(), dtype=np.float64)


def test_every_head_is_one_dot_at_its_layer_and_value() -> None:
    dots = points(line_of(by_layer(LAYER, HEAD, VALUES, None, "t", "px").axes[0], "a head"))
    assert dots[:, 1].tolist() == VALUES.tolist()
    assert np.round(dots[:, 0]).tolist() == LAYER.tolist()


@pytest.mark.parametrize("heads", [1, 3, 16, 24])
def test_dots_of_a_layer_are_sorted_side_by_side_and_stay_clear_of_the_next(heads: int) -> None:
    layer, head = np.repeat([0, 1], heads), np.tile(np.arange(heads), 2)
    values = np.random.default_rng(1).random(2 * heads)
    dots = points(line_of(by_layer(layer, head, values, None, "t", "px").axes[0], "a head"))
    for number in (0, 1):
        mine = dots[layer == number]
        mine = mine[np.argsort(mine[:, 0])]
        assert len(set(mine[:, 0])) == heads
        assert mine[:, 1].tolist() == sorted(mine[:, 1])
        assert np.abs(mine[:, 0] - number).max() < 0.4


def test_layers_that_skip_numbers_are_named_by_their_own() -> None:
    layer = np.repeat([2, 7], 3)
    axes = by_layer(layer, np.tile(np.arange(3), 2), VALUES[:6], None, "t", "px").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "7"]


def test_the_line_goes_through_the_means_of_the_layers() -> None:
    values = VALUES.copy()
    values[0] = np.nan
    axes = by_layer(LAYER, HEAD, values, None, "t", "px").axes[0]
    means = [line for line in axes.lines if points(line)[:, 0].tolist() == [0, 1, 2, 3]]
    np.testing.assert_allclose(points(means[0])[:, 1], [np.nanmean(values[number == LAYER]) for number in range(4)])


def test_uniform_attention_is_drawn_at_each_layers_own_value() -> None:
    uniform = np.array([14.4, 14.4, 28.9, 28.9])[LAYER]
    axes = by_layer(LAYER, HEAD, VALUES, None, "t", "px", uniform).axes[0]
    dashes = next(each for each in axes.collections if each.get_label() == "uniform attention")
    heights = [path.vertices[0, 1] for path in dashes.get_paths()]  # type: ignore[index]
    assert heights == [14.4, 14.4, 28.9, 28.9]


def test_masked_rings_stand_above_or_below_their_own_heads() -> None:
    masked = VALUES + 5
    axes = by_layer(LAYER, HEAD, VALUES, None, "t", "px", None, masked, "layer:1").axes[0]
    dots, rings = points(line_of(axes, "baseline")), points(line_of(axes, "masked: layer:1"))
    assert dots[:, 0].tolist() == rings[:, 0].tolist()
    assert rings[:, 1].tolist() == masked.tolist()


def test_errors_are_drawn_as_95_percent_intervals() -> None:
    axes = by_layer(LAYER, HEAD, VALUES, np.full(len(VALUES), 2.0), "t", "px").axes[0]
    (bars,) = axes.collections
    lengths = [np.ptp(path.vertices[:, 1]) for path in bars.get_paths()]  # type: ignore[index]
    np.testing.assert_allclose(lengths, 2 * 1.959964 * 2, rtol=1e-3)


def test_changes_are_red_above_zero_and_blue_below() -> None:
    change = np.where(np.arange(len(VALUES)) % 2, 1.0, -1.0)
    figure = change_by_layer(LAYER, HEAD, change, None, "t", "px")
    drawn(figure)  # colours are set as they are drawn
    dots = next(each for each in figure.axes[0].collections if isinstance(each, PathCollection))
    colours = np.asarray(dots.get_facecolor())
    assert (colours[change > 0, 0] > colours[change > 0, 2]).all()
    assert (colours[change < 0, 2] > colours[change < 0, 0]).all()


def test_a_statistic_that_no_layer_has_says_so() -> None:
    nothing = np.full(len(VALUES), np.nan)
    for figure in (
        by_layer(LAYER, HEAD, nothing, nothing, "t", "class mass", nothing, nothing, "layer:1"),
        change_by_layer(LAYER, HEAD, nothing, nothing, "t", "class mass"),
    ):
        assert drawn(figure).misplaced == []
        assert any("not defined" in text for text in texts(figure))


def test_heads_without_a_value_leave_the_others_where_they_are() -> None:
    values = VALUES.copy()
    values[4] = np.nan
    figure = by_layer(LAYER, HEAD, values, None, "t", "px")
    dots = points(line_of(figure.axes[0], "a head"))
    assert np.isfinite(dots[:, 1]).sum() == len(VALUES) - 1
    assert drawn(figure).misplaced == []


Draw = Callable[[NDArray[np.int64], NDArray[np.int64], FloatArray, FloatArray | None, str, str], Figure]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (60, 1)])
@pytest.mark.parametrize("draw", [by_layer, change_by_layer])
def test_every_layout_is_drawn_without_a_warning(draw: Draw, shape: tuple[int, int]) -> None:
    layers, heads = shape
    layer, head = np.repeat(np.arange(layers), heads), np.tile(np.arange(heads), layers)
    values = np.random.default_rng(0).random(len(layer))
    figure = draw(layer, head, values, values / 10, "Attention distance of every head\nmodel, 64 images", "px")
    assert drawn(figure).misplaced == []
    assert pixels(figure) < 6000


def test_the_caption_says_what_is_drawn() -> None:
    said = caption(by_layer(LAYER, HEAD, VALUES, VALUES / 10, "t", "px", None, VALUES + 1, "layer:1"))
    assert all(word in said for word in ("dot per head", "95% intervals", "Rings"))
    assert "95%" not in caption(by_layer(LAYER, HEAD, VALUES, None, "t", "px"))


def test_baseline_and_masked_differ_in_colour_and_shape() -> None:
    axes = by_layer(LAYER, HEAD, VALUES, None, "t", "px", None, VALUES + 1, "layer:1").axes[0]
    dots, rings = line_of(axes, "baseline"), line_of(axes, "masked")
    assert to_rgba(dots.get_markeredgecolor()) != to_rgba(rings.get_markeredgecolor())
    assert rings.get_markerfacecolor() == "none"


def test_the_same_values_give_the_same_bytes() -> None:
    first, second = (by_layer(LAYER, HEAD, VALUES, VALUES / 10, "t", "px") for _ in range(2))
    assert drawn(first).png == drawn(second).png
