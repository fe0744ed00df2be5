"""One dot per head over the layers, as in figure 7 of the ViT paper (Dosovitskiy et al., 2021, arXiv 2010.11929)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.style import (
    BASELINE_COLOUR,
    CHANGE_COLOURS,
    MASKED_COLOUR,
    one_axes,
    say_nothing_there,
    some,
    write_title,
    zoom,
)

BAND = 0.7
"""Part of a layer's width on the x axis that its dots are spread over."""

NUMBERED_HEADS = 60
"""Up to so many heads of a model, dots carry their heads' numbers."""

Z95 = 1.96
"""Standard errors on either side of a value that make a 95% interval."""


def by_layer(
    layer: IntArray,
    head: IntArray,
    values: FloatArray,
    errors: FloatArray | None,
    title: str,
    ylabel: str,
    uniform: FloatArray | None = None,
    masked: FloatArray | None = None,
    masked_name: str = "",
    given: Axes | None = None,
) -> Figure:
    """Draw a statistic of every head over the layers: dots sorted within each layer, a line through the means.

    Args:
        layer: `[heads]`, number of each head's layer.
        head: `[heads]`, its number in the layer.
        values: `[heads]`, NaN where the statistic is not defined.
        errors: `[heads]`, standard errors; None draws no intervals.
        title: What is shown, of which model, on how many images.
        ylabel: The statistic and its unit.
        uniform: `[heads]`, its value under uniform attention; drawn once per layer.
        masked: `[heads]`, the values of a masked model, each joined with the baseline's.
        masked_name: Its mask.
        given: Draw into these axes, not into a figure of its own.
    """
    figure, axes = _axes(layer, ylabel, given)
    sorted_by = values if masked is None or np.isfinite(values).any() else masked
    x = _x_of_dots(layer, sorted_by)
    notes = [f"{_dots(layer)} Line: mean of the layer."]

    if uniform is not None and np.isfinite(uniform).any():
        _draw_uniform(axes, layer, uniform)
    _draw_means(axes, layer, values, BASELINE_COLOUR)
    if errors is not None and np.isfinite(errors).any():
        axes.errorbar(x, values, yerr=Z95 * errors, fmt="none", ecolor=BASELINE_COLOUR, elinewidth=0.8, alpha=0.6)
        notes.append("Bars: 95% intervals over images.")

    size = 9.0 if len(layer) <= NUMBERED_HEADS else 4.5
    name = "a head" if masked is None else "baseline"
    axes.plot(x, values, "o", color=BASELINE_COLOUR, markersize=size, markeredgewidth=0, label=name, zorder=3)
    if masked is not None:
        _draw_means(axes, layer, masked, MASKED_COLOUR)
        _draw_masked(axes, x, values, masked, size + 1, masked_name)
        notes.append("Rings: the same heads of the masked model.")
    _number(axes, x, values, head)

    _finish(axes, [values, masked, uniform])
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "fontsize": 8.5 * zoom(figure)}
        axes.legend(frameon=False, **(above if given is None else {"fontsize": 7.5}))  # there a title stands above
    write_title(figure, title, " ".join(notes), given)
    return figure


def change_by_layer(
    layer: IntArray, head: IntArray, change: FloatArray, errors: FloatArray | None, title: str, ylabel: str
) -> Figure:
    """Draw the change of a statistic by a mask, masked minus baseline, for every head over the layers.

    Args:
        layer: `[heads]`, number of each head's layer.
        head: `[heads]`, its number in the layer.
        change: `[heads]`, NaN where the statistic is not defined.
        errors: `[heads]`, standard errors, paired over images; None draws no intervals.
        title: What is shown, of which model, by which mask, on how many images.
        ylabel: The statistic and its unit.
    """
    figure, axes = _axes(layer, ylabel)
    x = _x_of_dots(layer, change)
    note = _dots(layer)
    axes.axhline(0, color="0.5", linewidth=1, zorder=1)
    if errors is not None and np.isfinite(errors).any():
        axes.errorbar(x, change, yerr=Z95 * errors, fmt="none", ecolor="0.45", elinewidth=0.9, zorder=2)
        note += " Bars: 95% intervals, paired over images."

    limit = float(np.abs(change[np.isfinite(change)]).max(initial=0)) or 1.0
    norm = Normalize(-limit, limit)
    size = 80.0 if len(layer) <= NUMBERED_HEADS else 22.0
    dots = axes.scatter(x, change, c=change, s=size, cmap=CHANGE_COLOURS, norm=norm, zorder=3)
    dots.set(edgecolors="0.3", linewidths=0.6)
    _number(axes, x, change, head, np.where(np.abs(change) > 0.6 * limit, "white", "black"))

    _finish(axes, [change], from_zero=False)
    write_title(figure, title, note)
    return figure


def _dots(layer: IntArray) -> str:
    """Return what the dots are, for the caption."""
    numbered = " with its number" if len(layer) <= NUMBERED_HEADS else ""
    return f"A dot per head{numbered}, sorted by value within its layer."


def _axes(layer: IntArray, ylabel: str, given: Axes | None = None) -> tuple[Figure, Axes]:
    """Return a figure as wide as the layers need, and its axes; or the axes that were given."""
    numbers, heads = np.unique(layer, return_counts=True)
    of_layer = np.clip(0.13 * heads.max(), 0.32, 0.9)  # inches
    width = float(np.clip(len(numbers) * of_layer + 1.2, 6, 15))
    figure, axes = one_axes(given, width, 4.4 + 0.08 * width)

    shown = list(some(len(numbers), int(width / 0.3)))
    axes.set_xticks(shown, [str(number) for number in numbers[shown]])
    axes.set_xlim(-0.6, len(numbers) - 0.4)
    axes.set_xlabel("layer", fontsize=10 * zoom(figure, given))
    axes.set_ylabel(ylabel, fontsize=10 * zoom(figure, given))
    axes.tick_params(labelsize=9 * zoom(figure, given))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _x_of_dots(layer: IntArray, values: FloatArray) -> FloatArray:
    """Return x of each dot `[heads]`: the layer's, and beside it by the value's rank so that no dot hides another."""
    x = np.empty(len(layer))
    for centre, number in enumerate(np.unique(layer)):
        members = np.flatnonzero(layer == number)
        # sorting the order of a sort gives the ranks
        ranks = np.argsort(np.argsort(values[members], kind="stable"), kind="stable")
        step = min(BAND / max(len(members) - 1, 1), 0.2)
        x[members] = centre + step * (ranks - (len(members) - 1) / 2)
    return x


def _draw_means(axes: Axes, layer: IntArray, values: FloatArray, colour: str) -> None:
    """Draw a line through the layers' means, leaving out NaN."""
    means = []
    for number in np.unique(layer):
        defined = values[(layer == number) & np.isfinite(values)]
        means.append(float(defined.mean()) if len(defined) else np.nan)
    axes.plot(range(len(means)), means, color=colour, linewidth=1.6, alpha=0.35, zorder=1)


def _draw_uniform(axes: Axes, layer: IntArray, uniform: FloatArray) -> None:
    """Draw a dash per layer."""
    _, first = np.unique(layer, return_index=True)
    centres = np.arange(len(first))
    level = uniform[first]
    axes.hlines(level, centres - 0.42, centres + 0.42, color="0.25", linewidth=1.4, label="uniform attention", zorder=2)


def _draw_masked(axes: Axes, x: FloatArray, values: FloatArray, masked: FloatArray, size: float, name: str) -> None:
    """Draw rings, each joined with its head's dot: where nothing changed, the ring lies around the dot."""
    axes.vlines(x, values, masked, color=MASKED_COLOUR, linewidth=0.8, alpha=0.6)
    (rings,) = axes.plot(x, masked, "o", color=MASKED_COLOUR, markersize=size, label=f"masked: {name}")
    rings.set(markerfacecolor="none", markeredgewidth=1.3, zorder=4)


def _number(
    axes: Axes,
    x: FloatArray,
    values: FloatArray,
    head: IntArray,
    colours: NDArray[np.str_] | None = None,
) -> None:
    """Write the heads' numbers into the dots of a small model."""
    if len(head) > NUMBERED_HEADS:
        return
    for dot in np.flatnonzero(np.isfinite(values)):
        colour = "white" if colours is None else str(colours[dot])
        where = (x[dot], values[dot])
        axes.text(*where, str(head[dot]), ha="center", va="center_baseline", fontsize=6, color=colour, zorder=5)


def _finish(axes: Axes, drawn: list[FloatArray | None], from_zero: bool = True) -> None:
    """Start the y axis at 0 where values come near it; say so where there is nothing to draw."""
    every = np.concatenate([values for values in drawn if values is not None])
    every = every[np.isfinite(every)]
    if not len(every):
        axes.set_yticks([])
        say_nothing_there(axes, "not defined for any layer of this model")
    elif from_zero and every.min() >= 0 and every.min() < 0.5 * every.max():
        axes.set_ylim(0, None)
