import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray
from headprobe.report.similarity_figures import similarity_by_layer, similarity_clustered, similarity_within
from tests.report.drawn import caption, drawn, is_grey, near, pixel, pixels, texts

Axis = NDArray[np.int64]


def axes_of(heads_per_layer: list[int]) -> tuple[Axis, Axis]:
    layer = np.repeat(np.arange(len(heads_per_layer)), heads_per_layer)
    return layer, np.concatenate([np.arange(heads) for heads in heads_per_layer])


def similar(heads: int) -> FloatArray:
    values = np.random.default_rng(0).uniform(0.2, 0.8, (heads, heads))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def within(values: FloatArray, layer: Axis) -> FloatArray:
    return np.where(layer[:, None] == layer, values, np.nan)


def panels(figure: Figure) -> list[str]:
    return [text for text in texts(figure) if text.startswith("layer ") and text.split()[-1].isdigit()]


SHAPES = {
    "vit": [3] * 3,
    "swin": [2, 4, 8],
    "one head a layer": [1] * 3,
    "one layer": [4],
    "one head": [1],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["all", "within"])
def test_every_layout_is_drawn_within_its_edges_and_without_a_warning(shape: str, scope: str) -> None:
    layer, head = axes_of(SHAPES[shape])
    values = similar(len(layer))
    values = within(values, layer) if scope == "within" else values
    for draw in (similarity_by_layer, similarity_clustered):
        figure = draw(values, layer, head, "SVCCA of heads\nmodel, 64 images", "SVCCA (99% of variance)")
        assert drawn(figure).misplaced == []


def test_960_heads_stay_below_6000_pixels() -> None:
    layer, head = axes_of([24] * 40)
    values = similar(len(layer))
    figures = [
        similarity_by_layer(values, layer, head, "t", "SVCCA"),
        similarity_clustered(values, layer, head, "t", "SVCCA"),
        similarity_within(within(values, layer), layer, head, "t", "SVCCA"),
    ]
    assert max(map(pixels, figures)) < 6000


def test_layers_that_were_not_compared_get_a_matrix_each() -> None:
    layer, head = axes_of([3, 3, 6])
    values = similar(12)
    assert panels(similarity_by_layer(values, layer, head, "t", "s")) == []
    assert panels(similarity_by_layer(within(values, layer), layer, head, "t", "s")) == [
        "layer 0",
        "layer 1",
        "layer 2",
    ]


def test_a_cell_lies_in_the_row_and_column_of_its_heads() -> None:
    layer, head = axes_of([2, 2])
    values = np.zeros((4, 4))
    values[3, 0] = 1
    figure = similarity_by_layer(values, layer, head, "t", "s")
    purple, yellow = (68, 1, 84), (253, 231, 37)  # the ends of viridis
    assert near(pixel(figure, 0.3, 3.3), yellow)
    assert near(pixel(figure, 3.3, 0.3), purple)


def test_heads_are_ordered_by_layer_whatever_the_order_of_the_matrix() -> None:
    layer, head = axes_of([2, 2])
    values = similar(4)
    shuffled = np.array([2, 0, 3, 1])
    figure = similarity_by_layer(values, layer, head, "t", "s")
    other = similarity_by_layer(values[np.ix_(shuffled, shuffled)], layer[shuffled], head[shuffled], "t", "s")
    assert drawn(figure).png == drawn(other).png


def test_a_head_without_similarity_is_grey_and_last_when_clustered() -> None:
    layer, head = axes_of([2, 2])
    values = similar(4)
    values[1] = values[:, 1] = np.nan
    by_layer = similarity_by_layer(values, layer, head, "t", "s")
    clustered = similarity_clustered(values, layer, head, "t", "s")
    assert is_grey(pixel(by_layer, 1, 2))
    assert not is_grey(pixel(by_layer, 3.3, 2.3))
    matrix = next(number for number, axes in enumerate(clustered.axes) if axes.get_xlabel() == "layer.head")
    assert is_grey(pixel(clustered, 3, 1, matrix))
    assert [tick.get_text() for tick in clustered.axes[matrix].get_xticklabels()][-1] == "0.1"
    assert "Hatched: no similarity" in caption(by_layer)
    assert "Hatched" not in caption(similarity_by_layer(similar(4), layer, head, "t", "s"))


def test_clustering_puts_planted_blocks_together() -> None:
    layer, head = axes_of([4, 4])
    kind = np.array([0, 1, 0, 1, 1, 0, 1, 0])
    values = np.where(kind[:, None] == kind, 0.9, 0.1)
    np.fill_diagonal(values, 1)
    figure = similarity_clustered(values, layer, head, "t", "s")
    matrix = next(axes for axes in figure.axes if axes.get_xlabel() == "layer.head")
    names = [tick.get_text() for tick in matrix.get_yticklabels()]
    found = [int(kind[4 * int(name[0]) + int(name[2])]) for name in names]
    assert found in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_a_clustered_layer_names_its_heads_in_their_new_order() -> None:
    layer, head = axes_of([4, 2])
    values = np.full((6, 6), 0.1)
    values[0, 2] = values[2, 0] = values[1, 3] = values[3, 1] = 0.9
    np.fill_diagonal(values, 1)
    figure = similarity_clustered(within(values, layer), layer, head, "t", "s")
    names = [tick.get_text() for tick in figure.axes[2].get_xticklabels()]  # below the two trees
    assert {frozenset(names[:2]), frozenset(names[2:])} == {frozenset("02"), frozenset("13")}


def test_cells_at_or_below_their_noise_floor_are_pale() -> None:
    layer, head = axes_of([2, 2])
    values, floor = np.full((4, 4), 0.3), np.full((4, 4), 0.1)
    floor[0, 1] = 0.3
    figure = similarity_by_layer(values, layer, head, "t", "s", floor)
    pale, full = pixel(figure, 1.3, 0.3), pixel(figure, 2.3, 0.3)
    assert all(a > b for a, b in zip(pale, full, strict=True))
    assert "Pale" in caption(figure)


def test_differences_are_coloured_symmetrically_about_zero() -> None:
    layer, head = axes_of([2, 2])
    values = np.zeros((4, 4))
    values[0, 1], values[0, 2] = 0.02, -0.01
    figure = similarity_by_layer(values, layer, head, "t", "masked - baseline", diverging=True)
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel() == "masked - baseline")
    assert bar.get_ylim() == (-0.02, 0.02)
    rise, fall, none = (pixel(figure, column + 0.3, 0.3) for column in (1, 2, 3))
    assert rise[0] > rise[2]
    assert fall[2] > fall[0]
    assert min(none) > 240


def test_few_heads_carry_their_numbers_and_many_do_not() -> None:
    layer, head = axes_of([2, 2])
    assert "0.25" in texts(similarity_by_layer(np.full((4, 4), 0.25), layer, head, "t", "s"))
    layer, head = axes_of([12] * 12)
    assert "0.25" not in texts(similarity_by_layer(np.full((144, 144), 0.25), layer, head, "t", "s"))


def test_a_rounded_zero_has_no_sign() -> None:
    layer, head = axes_of([2, 2])
    figure = similarity_by_layer(np.full((4, 4), -1e-9), layer, head, "t", "s", diverging=True)
    assert "0.00" in texts(figure)
    assert "-0.00" not in texts(figure)


def test_layers_of_single_heads_have_nothing_to_compare_within() -> None:
    layer, head = axes_of([1, 1, 1])
    assert any("nothing to compare" in text for text in texts(similarity_within(np.eye(3), layer, head, "t", "s")))


def test_the_same_values_give_the_same_bytes() -> None:
    layer, head = axes_of([3, 3])
    first, second = (similarity_clustered(similar(6), layer, head, "t", "s") for _ in range(2))
    assert drawn(first).png == drawn(second).png
