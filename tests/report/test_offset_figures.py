import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle

from headprobe.metrics.arrays import FloatArray
from headprobe.report.offset_figures import offset_grid
from tests.report.drawn import drawn, is_grey, near, pixel, pixels, texts

YELLOW, PURPLE = (253, 231, 37), (68, 1, 84)  # the ends of viridis


def looking(at: tuple[int, int], rows: int = 7, columns: int = 7, heads: int = 1) -> FloatArray:
    """Maps of heads that all look at one offset (down, right) from the query."""
    maps = np.zeros((heads, 2 * rows - 1, 2 * columns - 1))
    maps[:, rows - 1 + at[0], columns - 1 + at[1]] = 1
    return maps


def tiles(figure: Figure) -> list[AxesImage]:
    return [image for image in figure.axes[0].images if isinstance(image, AxesImage)]


def test_the_ring_marks_the_query_in_the_middle_of_every_map() -> None:
    figure = offset_grid([looking((0, 0), heads=3), looking((0, 0), heads=2)], "t")
    rings = [patch for patch in figure.axes[0].patches if isinstance(patch, Circle)]
    assert [tuple(ring.center) for ring in rings] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    for tile, ring in zip(tiles(figure), rings, strict=True):
        left, right, bottom, top = tile.get_extent()
        assert np.allclose(((left + right) / 2, (bottom + top) / 2), ring.center)


@pytest.mark.parametrize("at", [(0, 0), (3, 0), (0, -3), (-2, 4)])
def test_a_weight_below_and_right_of_the_query_is_drawn_there(at: tuple[int, int]) -> None:
    figure = offset_grid([looking(at)], "t")
    left, right, bottom, top = tiles(figure)[0].get_extent()
    x = at[1] * (right - left) / 13
    y = at[0] * (bottom - top) / 13
    assert near(pixel(figure, x, y), YELLOW)
    assert near(pixel(figure, -x or 0.3, -y or 0.3), PURPLE)


def test_a_map_wider_than_high_keeps_its_shape() -> None:
    left, right, bottom, top = tiles(offset_grid([looking((0, 0), rows=3, columns=6)], "t"))[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(11 / 5)


def test_layers_may_differ_in_heads_and_windows() -> None:
    figure = offset_grid([looking((0, 0), 4, 4, 2), looking((0, 0), 2, 2, 6)], "t")
    places = [
        (round(x0 + x1) / 2, round(y0 + y1) / 2) for x0, x1, y0, y1 in (tile.get_extent() for tile in tiles(figure))
    ]
    assert places == [(0, 0), (1, 0), *((head, 1) for head in range(6))]
    assert [image.get_array().shape[0] for image in tiles(figure)] == [7] * 2 + [3] * 6  # type: ignore[union-attr]


def test_every_map_ends_at_its_own_largest_weight() -> None:
    maps = np.concatenate([looking((0, 0)), 0.01 * looking((2, 2))])
    figure = offset_grid([maps], "t")
    assert near(pixel(figure, 0, 0), YELLOW)
    assert near(pixel(figure, 1 + 2 * 0.92 / 13, 2 * 0.92 / 13), YELLOW)
    assert {"100%", "1%"} <= set(texts(figure))


def test_a_layer_without_a_map_says_so() -> None:
    figure = offset_grid([looking((0, 0), heads=3), None], "t")
    assert len(tiles(figure)) == 3
    assert any(text.startswith("no map") for text in texts(figure))


def test_a_head_without_a_map_is_grey() -> None:
    maps = looking((0, 0), heads=2)
    maps[1] = np.nan
    figure = offset_grid([maps], "t")
    assert is_grey(pixel(figure, 1.2, 0.2))
    assert not is_grey(pixel(figure, 0.2, 0.2))


def test_a_map_of_zeros_is_drawn() -> None:
    assert drawn(offset_grid([np.zeros((2, 5, 5))], "t")).misplaced == []


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (12, 3), (4, 24)])
def test_every_layout_is_drawn_without_a_warning(layers: int, heads: int) -> None:
    figure = offset_grid([looking((1, 0), 3, 3, heads)] * layers, "Where every head looks\nmodel, 64 images")
    assert drawn(figure).misplaced == []


@pytest.mark.parametrize(("layers", "heads"), [(40, 24), (60, 1)])
def test_large_models_stay_below_6000_pixels(layers: int, heads: int) -> None:
    assert pixels(offset_grid([looking((0, 0), 2, 2, heads)] * layers, "t")) < 6000


def test_no_layer_with_a_map_is_drawn() -> None:
    assert drawn(offset_grid([None, None], "t")).misplaced == []


def test_the_same_maps_give_the_same_bytes() -> None:
    first, second = (offset_grid([looking((1, 0))], "t") for _ in range(2))
    assert drawn(first).png == drawn(second).png
