"""Figures of what masks cost: a map of single heads, and drops with their intervals along a curve."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray
from headprobe.report.style import CHANGE_COLOURS, VALUE_COLOURS, one_axes, write_title

MOST_NUMBERED = 400  # cells: a map with more carries no numbers


def head_heat_map(
    values: FloatArray,
    title: str,
    label: str,
    ringed: NDArray[np.bool_] | None = None,
    ring: str = "",
    limit: float | None = None,
    given: Axes | None = None,
    diverging: bool = True,
) -> Figure:
    """Draw one number per head as layers x heads.

    Args:
        values: `[layers, heads]`, NaN where a layer has no such head or it was not measured.
        title: What is shown, of which model, on how many images.
        label: The number and its unit, beside the colour bar.
        ringed: `[layers, heads]`, where to draw a ring, such as around significant drops.
        ring: What a ring means, for the caption.
        limit: Value of the darkest red, which maps that are compared share; the largest of this map if not given.
        given: Draw into these axes, not into a figure of its own.
        diverging: Colours are symmetric about 0; else they go from the smallest value to the largest.
    """
    layers, heads = values.shape
    # wide models make a wide map: a cell stays large enough to carry its number
    figure, axes = one_axes(given, max(2.6 + 0.55 * heads, 5.0), 2.0 + 0.38 * layers)

    finite = values[np.isfinite(values)]
    if limit is None:
        limit = float(np.abs(finite).max(initial=0))
    limit = limit or 1.0  # all values 0
    if diverging:
        image = axes.imshow(values, cmap=CHANGE_COLOURS, vmin=-limit, vmax=limit, aspect="auto")
    else:
        image = axes.imshow(values, cmap=VALUE_COLOURS, aspect="auto")
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

    if layers * heads <= MOST_NUMBERED:
        # white where the ground is dark: at both ends of a diverging scale, at the lower end of the other
        low, high = finite.min(initial=np.inf), finite.max(initial=-np.inf)
        dark = np.abs(values) > 0.6 * limit if diverging else values < low + 0.6 * (high - low)
        _write_numbers(axes, values, limit, dark)
    if ringed is not None:
        rows, columns = np.nonzero(ringed)
        axes.scatter(columns, rows, s=600, facecolors="none", edgecolors="black", linewidths=1.2)
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    write_title(figure, title, ring if ringed is not None else "", given)
    return figure


def drop_curve(
    steps: Sequence[int],
    drops: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    x: str,
    title: str,
    others: Sequence[tuple[int, float]] = (),
    names: Sequence[str] = (),
    given: Axes | None = None,
    label: str = "top-1 drop (percentage points)",
) -> Figure:
    """Draw drops with their 95% intervals over layers, head indices or numbers of masked heads.

    Args:
        steps: Where on the x axis, in whole numbers.
        drops: Percentage points.
        lows: Lower ends of the intervals.
        highs: Upper ends.
        x: Name of the x axis.
        title: What is shown.
        others: Step and drop of further draws, which get small dots.
        names: What to write below the steps in place of their numbers.
        given: Draw into these axes, not into a figure of its own.
        label: What is drawn, and its unit.
    """
    figure, axes = one_axes(given, max(7, 0.22 * len(names)), 3.6 + 0.07 * max(map(len, names), default=0))
    errors = np.abs(np.array([lows, highs]) - np.array(drops))  # [2, points], lengths below and above
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.errorbar(steps, drops, yerr=errors, fmt="o", color="#c0392b", ecolor="#e6a79f", capsize=3, markersize=5)
    if others:
        axes.plot(*zip(*others, strict=True), ".", color="0.45", markersize=4, zorder=1, label="other draws")
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel=x, ylabel=label)
    if names:
        axes.set_xticks(steps, names, rotation=90, fontsize=8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    write_title(figure, title, "", given)
    return figure


def _write_numbers(axes: Axes, values: FloatArray, limit: float, dark: NDArray[np.bool_]) -> None:
    digits = 1 if limit >= 3 else 2 if limit >= 0.1 else 3
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: a rounded -0.0 loses its sign
        colour = "white" if dark[row, column] else "0.2"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
