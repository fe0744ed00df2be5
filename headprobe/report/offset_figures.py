"""Where heads look relative to the query: a small map per head, layers below each other."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke

from headprobe.metrics.arrays import FloatArray
from headprobe.report.style import MISSING_CELL, VALUE_COLOURS, new_figure, write_title, zoom

GAP = 0.08
"""Space between maps, as a part of the side of a tile."""

QUERY_COLOUR = "#ff4b3e"

NUMBERED_TILE = 0.6
"""Inches: smallest tile that carries the number of its map's largest weight."""


def offset_grid(maps: Sequence[FloatArray | None], title: str) -> Figure:
    """Draw every head's map of mean attention by offset of key from query; layers are rows, heads columns.

    A single bright cell at the query is a local head, one beside it a head of fixed offset, a broad hump a global one:
    even uniform attention gives a hump, as few queries have keys far away. Colours go with the square root of the
    weight and end at each map's own largest, so that the shapes can be compared over window sizes.

    Args:
        maps: For each layer `[heads, 2h - 1, 2w - 1]`, the query in the middle; None for a layer without a map, NaN
            for a head without.
        title: What is shown, of which model, on how many images.
    """
    rows = len(maps)
    columns = max((len(heads) for heads in maps if heads is not None), default=4)
    tile = float(np.clip(min(16 / columns, max(11 / rows, 0.7)), 0.45, 1.05))  # inches
    figure = new_figure(columns * tile + 1.7, max(rows * tile, 2.6) + 1.5)
    axes = figure.add_subplot()

    scale = ScalarMappable(PowerNorm(0.5, 0, 1), VALUE_COLOURS)
    for row, heads in enumerate(maps):
        if heads is None:
            _say_none(axes, row, columns)
            continue
        for column, values in enumerate(heads):
            _draw_map(axes, row, column, values, scale, tile)

    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(columns) if any(heads is not None for heads in maps) else [])
    axes.set_yticks(range(rows))
    axes.set_xlabel("head", fontsize=10 * zoom(figure))
    axes.set_ylabel("layer", fontsize=10 * zoom(figure))
    axes.tick_params(length=0, labelsize=8 * zoom(figure))
    axes.spines[:].set_visible(False)

    shrink = float(np.clip(4 / (rows * tile), 0.1, 1))  # a bar of four inches
    bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.02, aspect=25, shrink=shrink)
    bar.set_ticks([0, 0.01, 0.1, 0.3, 0.6, 1])
    bar.set_label("attention / largest of the map", size=9 * zoom(figure))

    notes = ["Attention by offset of key from query (red ring: the query itself), mean over queries and images."]
    if tile >= NUMBERED_TILE:
        notes.append("Number: the map's largest weight.")
    notes.append("Colours go with the square root, up to each map's largest weight.")
    notes.append("Uniform attention gives a tent: small offsets are the most frequent.")
    write_title(figure, title, " ".join(notes))
    return figure


def _draw_map(axes: Axes, row: int, column: int, values: FloatArray, scale: ScalarMappable, tile: float) -> None:
    """Draw one map in its tile, which its longer side fills."""
    # half of the map's sides, in tiles
    high, wide = np.array(values.shape) / max(values.shape) * (0.5 - GAP / 2)
    largest = float(values.max(initial=0))
    if not np.isfinite(values).all():
        axes.add_patch(Rectangle((column - wide, row - high), 2 * wide, 2 * high, linewidth=0, **MISSING_CELL))
        return

    colours = scale.to_rgba(values / (largest or 1.0))
    extent = (column - wide, column + wide, row + high, row - high)
    axes.imshow(colours, extent=extent, interpolation="nearest", aspect="auto")
    # the ring goes around the query's cell, so as not to hide it
    cell = 2 * max(high, wide) / max(values.shape)
    axes.add_patch(Circle((column, row), max(1.1 * cell, 0.05), fill=False, edgecolor=QUERY_COLOUR, linewidth=0.9))

    if tile >= NUMBERED_TILE:
        corner = (column + wide - 0.03, row + high - 0.03)
        text = axes.text(*corner, f"{_percent(largest)}%", ha="right", va="bottom", fontsize=6.5, color="white")
        text.set_path_effects([withStroke(linewidth=1.2, foreground="0.2")])


def _percent(share: float) -> str:
    """Return two digits, without the exponent that `.2g` gives 100."""
    return f"{100 * share:.2g}" if share < 0.995 else f"{100 * share:.0f}"


def _say_none(axes: Axes, row: int, columns: int) -> None:
    """Say across a layer's row why it is empty."""
    left, top = -0.5 + GAP / 2, row - 0.5 + GAP / 2
    axes.add_patch(Rectangle((left, top), columns - GAP, 1 - GAP, linewidth=0, **MISSING_CELL))
    text = "no map: no patches as queries, or unknown places"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text((columns - 1) / 2, row, text, ha="center", va="center", fontsize=8, color="0.25", bbox=box)
