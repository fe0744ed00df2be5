from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray

from headprobe.report.spectrum_figures import spectra_by_layer, stream_spectra
from tests.report.drawn import drawn, pixels, texts

FREQUENCY = np.arange(7) * 2 / 14  # the half diagonal of a 14 x 14 grid


def slope(layer: int, head: int) -> float:
    return -1.0 - layer - 0.1 * head


def table(heads_per_layer: list[int], after: bool = True) -> dict[str, NDArray[Any]]:
    rows = []
    for layer, heads in enumerate(heads_per_layer):
        series = {"head": range(heads), "contribution": range(heads), "stream_before": [-1]}
        if after:
            series["stream_after"] = [-1]
        for name, members in series.items():
            for head in members:
                for profile in ("diagonal", "radial"):
                    steep = (
                        slope(layer, head) * (2 if profile == "radial" else 1) * (3 if name == "contribution" else 1)
                    )
                    rows += [(layer, name, head, profile, f, steep * f) for f in FREQUENCY]
    columns = ("layer", "series", "head", "profile", "frequency", "delta_log_amplitude")
    return {name: np.array(values) for name, values in zip(columns, zip(*rows, strict=True), strict=True)}


def heads_of(axes: Axes) -> dict[str, NDArray[np.float64]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines if "head" in line.get_label()}  # type: ignore[operator]


def panel(figure: Any, layer: int) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == f"layer {layer}")


@pytest.mark.parametrize(("series", "factor"), [("head", 1), ("contribution", 3)])
@pytest.mark.parametrize(("profile", "times"), [("diagonal", 1), ("radial", 2)])
def test_every_head_is_one_line_over_true_frequencies(series: str, factor: int, profile: str, times: int) -> None:
    figure = spectra_by_layer(table([2, 3]), "t", series, profile)
    found = heads_of(panel(figure, 1))
    assert list(found) == ["head 0", "head 1", "head 2"]
    for head in range(3):
        np.testing.assert_allclose(found[f"head {head}"][:, 0], FREQUENCY)
        np.testing.assert_allclose(found[f"head {head}"][:, 1], slope(1, head) * factor * times * FREQUENCY)


def test_rows_may_come_in_any_order() -> None:
    columns = table([2, 2])
    order = np.random.default_rng(0).permutation(len(columns["layer"]))
    shuffled = {name: values[order] for name, values in columns.items()}
    assert drawn(spectra_by_layer(columns, "t")).png == drawn(spectra_by_layer(shuffled, "t")).png


def test_panels_share_their_axes_and_name_the_frequency() -> None:
    figure = spectra_by_layer(table([2] * 5), "t")
    shown = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert len({axes.get_ylim() for axes in shown}) == 1
    assert len(shown) == 5
    assert texts(figure).count("frequency (pi rad/sample)") >= 3


def test_a_head_without_a_spectrum_has_no_line() -> None:
    columns = table([2, 2])
    silent = (columns["layer"] == 0) & (columns["head"] == 1)
    columns["delta_log_amplitude"][silent] = np.nan
    figure = spectra_by_layer(columns, "t")
    assert list(heads_of(panel(figure, 0))) == ["head 0"]
    assert drawn(figure).misplaced == []


def test_forty_heads_of_a_layer_all_look_different() -> None:
    axes = panel(spectra_by_layer(table([40]), "t"), 0)
    looks = {(str(line.get_color()), str(line.get_linestyle())) for line in axes.lines if "head" in line.get_label()}  # type: ignore[operator]
    # a dash pattern's style is named "--" whatever its pattern: two of four count once
    assert len(looks) >= 20


def test_the_stream_is_drawn_before_and_after_each_layer() -> None:
    left, right, *_ = stream_spectra(table([2, 2, 2]), "t").axes
    over = [np.asarray(line.get_xydata()) for line in left.lines if len(np.asarray(line.get_xydata())) == 7]
    assert len(over) == 6
    marks = {str(line.get_label()): np.asarray(line.get_ydata()) for line in right.lines}
    expected = [slope(layer, -1) * FREQUENCY[-1] for layer in range(3)]
    np.testing.assert_allclose(marks["before attention"].astype(float), expected)
    np.testing.assert_allclose(marks["after attention"].astype(float), expected)


def test_blocks_whose_stream_after_attention_cannot_be_seen_are_drawn_without_it() -> None:
    figure = stream_spectra(table([2, 2], after=False), "t")
    after = next(line for line in figure.axes[1].lines if line.get_label() == "after attention")
    assert np.isnan(np.asarray(after.get_ydata(), dtype=float)).all()
    assert drawn(figure).misplaced == []


@pytest.mark.parametrize("draw", [spectra_by_layer, stream_spectra])
def test_nothing_to_draw_says_so(draw: Any) -> None:
    columns = table([2, 2])
    columns["delta_log_amplitude"][:] = np.nan
    figure = draw(columns, "t")
    assert drawn(figure).misplaced == []
    assert any(text.startswith("no s") for text in texts(figure))


@pytest.mark.parametrize("shape", [[1], [3], [24] * 2])
@pytest.mark.parametrize("draw", [spectra_by_layer, stream_spectra])
def test_every_layout_is_drawn_without_a_warning(draw: Any, shape: list[int]) -> None:
    figure = draw(table(shape), "Frequencies of heads\nmodel, 64 images")
    assert drawn(figure).misplaced == []


def test_30_layers_stay_below_6000_pixels() -> None:
    assert pixels(spectra_by_layer(table([1] * 30), "t")) < 6000


def test_a_grid_of_one_patch_has_a_single_point() -> None:
    columns = table([2])
    only = columns["frequency"] == 0
    for draw in (spectra_by_layer, stream_spectra):
        assert drawn(draw({name: values[only] for name, values in columns.items()}, "t")).misplaced == []
