"""Figure of orders of removal: accuracy and NLL against the number of heads removed, beside random orders."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from headprobe.masks.ablations import FITTED
from headprobe.metrics.arrays import FloatArray
from headprobe.report.mask_figures import about_masks
from headprobe.report.style import HEAD_COLOURS, figure_of, new_figure, write_title
from headprobe.run.curves import ONE_MORE_ORDER
from headprobe.run.load import Columns, RunFiles
from headprobe.text import counted

MOST_LINES = 7
"""Orders that are drawn beside the means of random orders: more lines cannot be told apart."""

MOST_NAMED = 4
"""Of the others so many are named."""

AXES = {
    "top1": "top-1 accuracy (%)",
    "nll": "NLL (nats)",
    "feature_cosine": "mean cosine of the feature",
    "feature_distance": "distance over the feature's length",
}
"""What curves are drawn of: of a run with labels the first two, without the last two."""


def axes_of(run: RunFiles) -> list[str]:
    """Return what a run's curves are drawn of."""
    return list(AXES)[:2] if run.labelled else list(AXES)[2:]


RANDOM_COLOURS = ("0.35", "0.6")

_SEED = re.compile(r"(.*random)_seed_\d+")


def curve_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield one figure of all orders of a run: a column of panels for each ablation, all with the same axes."""
    table = run.table("curves.csv")
    if table is not None:
        yield "curves/heads_removed", orders_figure(run, table, list(dict.fromkeys(table["ablation"].tolist())))


def orders_figure(
    run: RunFiles,
    table: Columns,
    kinds: Sequence[str],
    quantities: Sequence[str] = (),
    given: Axes | None = None,
) -> Figure:
    """Draw all orders of a run: a column of panels for each ablation, a row for each quantity.

    Args:
        run: The run.
        table: Its `curves.csv`.
        kinds: The ablations.
        quantities: Of `axes_of`, all of them if not given.
        given: Draw into these axes, not into a figure of its own; for one ablation and quantity.
    """
    quantities = quantities or axes_of(run)
    means = list(dict.fromkeys(table["order"][table["orders"] > 1].tolist()))
    orders = [
        name for name in dict.fromkeys(table["order"].tolist()) if name not in means and _random(name) not in means
    ]
    shown = _largest_areas(run, orders)
    panels: Any = np.array([[given]])
    if given is None:
        high = 0.8 + 2.9 * len(quantities) + 0.2 * ((len(shown) + len(means) + 2) // 2)
        figure = new_figure(max(2.4 + 3.4 * len(kinds), 7.5), high)
        panels = figure.subplots(len(quantities), len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in zip(panels.T, kinds, strict=True):
        own = {name: values[table["ablation"] == kind] for name, values in table.items()}
        for axes, quantity in zip(column, quantities, strict=True):
            _panel(axes, own, quantity, means, shown, float(run.masks[0][quantity]))
        if given is None:
            column[0].set_title(f"{kind} ablation", fontsize=10)
        column[-1].set_xlabel("heads removed")
    for axes, quantity in zip(panels[:, 0], quantities, strict=True):
        axes.set_ylabel(AXES[quantity])
    fitted = FITTED if (run.path / "scores.csv").is_file() else kinds  # orders too are of the calibration images
    title = f"Heads removed one after the other\n{about_masks(run, fitted)}{_left_out(orders, shown)}"
    if given is not None:
        given.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(-0.1, -0.16))
        write_title(figure_of(given), f"{title}, {kinds[0]} ablation", "", given)
        return figure_of(given)
    handles = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    write_title(figure, title, "")  # the legend has the caption's place
    return figure


def _random(order: str) -> str:
    """Return the name of the mean that a random order belongs to; of other orders an empty name."""
    found = _SEED.fullmatch(order)
    return found[1] if found else ""


def _largest_areas(run: RunFiles, orders: Sequence[str]) -> list[str]:
    """Return the orders that are drawn, in their own order: of too many those with the largest area."""
    table = run.table("orders.csv")
    if table is None or len(orders) <= MOST_LINES:
        return list(orders)[:MOST_LINES]
    area = table["area" if run.labelled else "feature_area"]
    areas = {name: float(np.max(area[table["order"] == name])) for name in orders}
    largest = sorted(orders, key=lambda name: -areas[name])[:MOST_LINES]
    return [name for name in orders if name in largest]


def _panel(
    axes: Axes, table: Columns, quantity: str, means: Sequence[str], shown: Sequence[str], baseline: float
) -> None:
    """Draw one quantity of the orders of one ablation, each from the baseline on."""
    scale = 100 if quantity == "top1" else 1
    axes.axhline(scale * baseline, color="0.2", linewidth=0.9, linestyle=(0, (4, 3)), label="no head removed")
    for name, colour in zip(means, itertools.cycle(RANDOM_COLOURS), strict=False):
        rows = table["order"] == name
        if not rows.any():  # under another ablation alone
            continue
        low, high = _limits(table, rows, quantity, baseline)
        x = np.append(0, table["heads_removed"][rows])
        axes.fill_between(x[1:], scale * low, scale * high, color=colour, alpha=0.2, linewidth=0)
        y = scale * np.append(baseline, table[quantity][rows])
        axes.plot(x, y, color=colour, linewidth=2, label=_about_mean(name, table, rows))
    for name, colour in zip(shown, HEAD_COLOURS, strict=False):
        rows = table["order"] == name
        if not rows.any():
            continue
        x, y = np.append(0, table["heads_removed"][rows]), scale * np.append(baseline, table[quantity][rows])
        style = "--" if name.startswith("keep_") else "-"  # a reversed order may hide the opposite one
        axes.plot(x, y, style, marker="o", markersize=2.5, linewidth=1.4, color=colour, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(table: Columns, rows: NDArray[np.bool_], quantity: str, baseline: float) -> tuple[FloatArray, FloatArray]:
    """Return the limits of random orders, `[points]` each: those of the drop or of the rise, from the baseline."""
    if quantity == "top1":
        return baseline - table["drop_high_pp"][rows] / 100, baseline - table["drop_low_pp"][rows] / 100
    if quantity != "nll":
        return table[f"{quantity}_low"][rows], table[f"{quantity}_high"][rows]
    return baseline + table["nll_rise_low"][rows], baseline + table["nll_rise_high"][rows]


def _about_mean(name: str, table: Columns, rows: NDArray[np.bool_]) -> str:
    band = (table["interval"][rows] == ONE_MORE_ORDER).all()
    spread = "where one more lies with 95%" if band else "smallest to largest"
    return f"{name}: mean of {int(table['orders'][rows].max())}; band: {spread}"


def _left_out(orders: Sequence[str], shown: Sequence[str]) -> str:
    """Return the line of the title that names the orders which are not drawn."""
    names = [name for name in orders if name not in shown]
    if not names:
        return ""
    few = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    return f"\nNot drawn, with smaller areas in orders.csv: {counted(len(names), 'order')} ({few})"
