"""Which image frequencies heads and the residual stream carry: delta log amplitudes, layer by layer."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.style import (
    HEAD_COLOURS,
    HEAD_DASHES,
    VALUE_COLOURS,
    figure_of,
    new_figure,
    panel_grid,
    say_nothing_there,
    some,
    write_title,
    zoom,
)
from headprobe.run.load import Columns

FREQUENCY = "frequency (pi rad/sample)"
DELTA = "delta log amplitude"

SERIES_IN_WORDS = {"head": "outputs of heads", "contribution": "what heads add to the stream (after W_O)"}


def spectra_by_layer(
    columns: Columns,
    title: str,
    series: str = "head",
    profile: str = "diagonal",
    ylabel: str = DELTA,
    given: Axes | None = None,
) -> Figure:
    """Draw a panel per layer with a line per head, beside the residual stream before the layer's attention.

    Delta log amplitude (Park & Kim, 2022, arXiv 2202.06709): natural logarithm of the amplitude minus its value at
    frequency 0. Their curves are of the stream; curves of heads are ours.

    Args:
        columns: What `spectrum.csv` holds of one model; NaN where a head has no spectrum.
        title: What is shown, of which model, on how many images.
        series: `head`, the heads' outputs, or `contribution`, what they add to the stream.
        profile: `diagonal` or `radial`.
        ylabel: The quantity.
        given: Draw into these axes, not into a figure of its own; for columns of one layer.
    """
    chosen = _chosen(columns, profile)
    layers = np.unique(columns["layer"])
    rows, wide = panel_grid(len(layers))
    if given is None:
        figure = new_figure(max(wide * 2.5, 4) + 1.4, rows * 2.0 + 1.2)
        grid: Any = figure.subplots(rows, wide, sharex=True, sharey=True, squeeze=False)
    else:
        figure, grid = figure_of(given), np.array([[given]])

    for axes, layer in zip(grid.flat, layers, strict=False):
        for _, frequency, delta in _lines(chosen, layer, "stream_before"):
            axes.plot(frequency, delta, color="0.75", linewidth=3.5, solid_capstyle="round", label="stream before")
        for head, frequency, delta in _lines(chosen, layer, series):
            style = {"color": HEAD_COLOURS[head % 10], "linestyle": HEAD_DASHES[head // 10 % len(HEAD_DASHES)]}
            axes.plot(frequency, delta, marker=".", markersize=3, linewidth=1.3, label=f"head {head}", **style)
        _dress(axes, f"layer {layer}", figure)
        if axes.lines:
            axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        else:
            say_nothing_there(axes, "no spectrum")

    for number, axes in enumerate(grid.flat):
        if number >= len(layers):
            axes.set_axis_off()
        elif number + wide >= len(layers):  # the lowest of its column, though the last row may be shorter
            axes.set_xlabel(FREQUENCY, fontsize=_small(figure))
            axes.tick_params(labelbottom=True)

    if given is None:
        figure.supylabel(ylabel, fontsize=10 * zoom(figure))
        _legend(figure, grid)
    else:
        given.set_ylabel(ylabel, fontsize=_small(figure))
        title = f"{title}, {given.get_title()}"
        given.set_title("")
        if given.lines:
            given.legend(frameon=False, fontsize=7)
    what = SERIES_IN_WORDS.get(series, series)
    stream = "thick grey: the residual stream before the layer's attention"
    write_title(figure, title, f"Lines: {what}; {stream}. Profile: {profile}.", given)
    return figure


def stream_spectra(columns: Columns, title: str, profile: str = "diagonal", ylabel: str = DELTA) -> Figure:
    """Draw the residual stream before and after every attention layer, as Park & Kim (2022, arXiv 2202.06709) do.

    Left, over frequency, coloured by depth; right, over depth at the highest frequency of each layer's grid: what
    attention (shaded) and what the rest of the block does to it.

    Args:
        columns: What `spectrum.csv` holds of one model.
        title: What is shown, of which model, on how many images.
        profile: `diagonal` or `radial`.
        ylabel: The quantity.
    """
    chosen = _chosen(columns, profile)
    layers = np.unique(columns["layer"])
    deepest = max(float(layers.max(initial=0)), 1)
    colours = ScalarMappable(Normalize(0, deepest * 1.12), VALUE_COLOURS)  # not the palest end
    figure = new_figure(11.5, 4.8)
    left, right = figure.subplots(1, 2)

    dashes: dict[str, Any] = {"stream_before": "-", "stream_after": (0, (3, 1.5))}
    highest = {series: np.full(len(layers), np.nan) for series in dashes}  # delta at the last bin, by layer
    for place, layer in enumerate(layers):
        for series, dash in dashes.items():
            for _, frequency, delta in _lines(chosen, layer, series):
                left.plot(frequency, delta, color=colours.to_rgba(layer), linestyle=dash, linewidth=1.4)
                highest[series][place] = delta[-1] if len(delta) > 1 else np.nan

    _dress(left, "over frequency", figure)
    left.set_xlabel(FREQUENCY)
    left.set_ylabel(ylabel)
    if left.lines:
        left.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        _depth_bar(figure, left, colours, layers)
    else:
        say_nothing_there(left, "no stream was seen")

    _draw_depth(right, layers, highest["stream_before"], highest["stream_after"])
    _dress(right, "at the highest frequency, over depth", figure)
    note = f"Left: solid before, dashed after each layer's attention; profile: {profile}."
    write_title(figure, title, f"{note} Right: at the highest frequency that each layer's grid carries.")
    return figure


def _draw_depth(axes: Axes, layers: IntArray, before: FloatArray, after: FloatArray) -> None:
    """Draw the way through the blocks: attention within each layer's shade, the rest of the block between them."""
    centres = np.arange(len(layers))
    for centre in centres:
        axes.axvspan(centre - 0.25, centre + 0.25, color="0.93", linewidth=0)

    # before, after, before, after, ...
    path = np.column_stack([before, after]).ravel()
    x = np.column_stack([centres - 0.25, centres + 0.25]).ravel()
    axes.plot(x, path, color="0.6", linewidth=1.2, zorder=1)
    size = 5 if len(layers) <= 24 else 3.5
    axes.plot(centres - 0.25, before, "o", color="0.2", mfc="white", markersize=size, label="before attention")
    axes.plot(centres + 0.25, after, "s", color="0.2", markersize=size, label="after attention")

    shown = list(some(len(layers), 20))
    axes.set_xticks(shown, [str(layers[place]) for place in shown])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer (shaded: its attention)")
    if np.isfinite(path).any():
        axes.legend(frameon=False, fontsize=8.5)
    else:
        axes.set_yticks([])
        say_nothing_there(axes, "no stream was seen")


def _depth_bar(figure: Figure, axes: Axes, colours: ScalarMappable, layers: IntArray) -> None:
    bar = figure.colorbar(colours, ax=axes, fraction=0.05, pad=0.02, label="layer")
    bar.ax.set_ylim(0, max(int(layers.max()), 1))
    bar.set_ticks([float(layer) for layer in layers[list(some(len(layers), 14))]])


def _legend(figure: Figure, grid: NDArray[Any]) -> None:
    """Name every line once, beside the panels."""
    lines: dict[str, Any] = {}
    for axes in grid.flat:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, line)
    if not lines:
        return

    # the stream first, then heads by number
    names = sorted(lines, key=lambda name: (name.startswith("head"), len(name), name))
    fitting = max((figure.get_size_inches()[1] - 0.5) / 0.2, 1)  # lines of text below each other
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside right center",
        frameon=False,
        fontsize=_small(figure),
        ncols=math.ceil(len(names) / fitting),
    )


def _dress(axes: Axes, title: str, figure: Figure) -> None:
    axes.set_title(title, fontsize=9 * zoom(figure))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_small(figure))


def _small(figure: Figure) -> float:
    """Return the size of fonts that must fit below one panel."""
    return 8.5 * min(zoom(figure), 1.2)


def _chosen(columns: Columns, profile: str) -> Columns:
    """Return the rows of one profile that hold a number."""
    kept = (columns["profile"] == profile) & np.isfinite(columns["delta_log_amplitude"])
    return {name: columns[name][kept] for name in ("layer", "series", "head", "frequency", "delta_log_amplitude")}


def _lines(columns: Columns, layer: int, series: str) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    """Yield head, frequencies and values of each line of a layer's series, in order of frequency."""
    here = (columns["layer"] == layer) & (columns["series"] == series)
    for head in np.unique(columns["head"][here]):
        rows = np.flatnonzero(here & (columns["head"] == head))
        rows = rows[np.argsort(columns["frequency"][rows], kind="stable")]
        yield int(head), columns["frequency"][rows], columns["delta_log_amplitude"][rows]
