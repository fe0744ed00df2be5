"""The figure of a comparison: what masks cost in one run against what the same masks cost in another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headprobe.metrics.arrays import FloatArray
from headprobe.report.agreement_figures import HEAD, layer_bar, layers_of, name_dots, scatter_masks
from headprobe.report.comparison.tables import WORDS
from headprobe.report.style import new_figure, panel_grid, write_title
from headprobe.run.ablations import with_limits
from headprobe.run.comparison.pairs import Pair
from headprobe.run.comparison.tables import LEVEL, first_family
from headprobe.run.load import Row
from headprobe.run.results import FAMILIES_JOINED

MOST_PANELS = 6
"""Panels of a figure; the rest is in the tables."""

MOST_WITH_LIMITS = 60
"""Of more masks the intervals would hide the dots."""


class Panel(NamedTuple):
    """Two runs under one ablation."""

    pair: Pair
    ablation: str
    rows: list[Row]  #: of `compare.csv`
    ranks: Row | None  #: of `compare_ranks.csv`


def comparison_figure(pairs: Sequence[Pair], rows: Sequence[Row], ranks: Sequence[Row], quantity: str) -> Figure:
    """Draw a panel for each two runs and ablation: a dot for each mask of the first form.

    Args:
        pairs: Every two runs.
        rows: The rows of `compare.csv` of all pairs.
        ranks: The rows of `compare_ranks.csv`.
        quantity: What is compared.
    """
    own = [row for row in rows if row["quantity"] == quantity]
    family = first_family(own)
    panels = [panel for pair in pairs for panel in _panels(pair, own, ranks, family)]
    shown = panels[:MOST_PANELS]
    down, across = panel_grid(len(shown))
    figure = new_figure(5.2 * across + 0.8, 4.9 * down + 0.8)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for one, panel in zip(axes, shown, strict=False):
        _draw(one, panel, quantity)
    for one in axes[len(shown) :]:
        one.set_axis_off()
    masks = [str(row["mask"]) for row in shown[0].rows]
    layers = layers_of(shown[0].pair.first.run, masks)
    if layers is not None:
        layer_bar(figure, list(axes), layers)
    what, _, _ = WORDS[quantity]
    more = f" {len(panels) - len(shown)} more panels are left out: compare.csv has all." * (len(panels) > len(shown))
    title = f"{what[0].upper()}{what[1:]} of the same masks, {family or 'masks named one by one'}"
    named = "as layer.head " * all(mask.startswith(HEAD) for mask in masks)
    write_title(
        figure,
        _plain(title),
        f"A dot per mask. Rings, named {named}where there is room: the two runs differ at q (BH) of at most {LEVEL}. "
        "Line: the same in both." + (" Bars: 95% intervals." if len(masks) <= MOST_WITH_LIMITS else "") + more,
    )
    return figure


def _panels(pair: Pair, rows: Sequence[Row], ranks: Sequence[Row], family: str) -> list[Panel]:
    """Return the panels of two runs, one for each ablation."""
    own = [row for row in rows if _of(row, pair) and family in str(row["test_family"]).split(FAMILIES_JOINED)]
    found = []
    for ablation in dict.fromkeys(str(row["ablation"]) for row in own):
        of_rank = [
            row for row in ranks if _of(row, pair) and (row["test_family"], row["ablation"]) == (family, ablation)
        ]
        shown = [row for row in own if row["ablation"] == ablation]
        of_quantity = [row for row in of_rank if row["quantity"] == shown[0]["quantity"]]
        found.append(Panel(pair, ablation, shown, of_quantity[0] if of_quantity else None))
    return found


def _of(row: Row, pair: Pair) -> bool:
    return (row["run_a"], row["run_b"]) == (pair.first.name, pair.second.name)


def _draw(axes: Axes, panel: Panel, quantity: str) -> None:
    """Draw a panel: dots with their intervals, and the names of masks that differ."""
    first, second = ([_column(panel.rows, f"value_{side}{end}") for end in ("", "_low", "_high")] for side in "ab")
    masks = [str(row["mask"]) for row in panel.rows]
    if len(masks) <= MOST_WITH_LIMITS:
        known = np.isfinite(first[0]) & np.isfinite(second[0])
        reach = [np.nan_to_num(np.abs(np.stack(own[1:])[:, known] - own[0][known])) for own in (first, second)]
        axes.errorbar(
            first[0][known],
            second[0][known],
            xerr=reach[0],
            yerr=reach[1],
            fmt="none",
            ecolor="0.8",
            elinewidth=0.8,
            zorder=1,
        )
    scatter_masks(axes, first[0], second[0], layers_of(panel.pair.first.run, masks))
    differ = _column(panel.rows, "bh_q") <= LEVEL
    axes.scatter(
        first[0][differ], second[0][differ], s=95, facecolors="none", edgecolors="#c0392b", linewidths=1.4, zorder=4
    )
    short = [mask.removeprefix(HEAD) if all(one.startswith(HEAD) for one in masks) else mask for mask in masks]
    if differ.any():
        sizes = np.where(differ, np.abs(_column(panel.rows, "b_minus_a")), np.nan)[differ]
        name_dots(axes, first[0][differ], second[0][differ], [_plain(short[i]) for i in np.flatnonzero(differ)], sizes)
    _, unit, _ = WORDS[quantity]
    unit = f" ({unit})" if unit else ""
    axes.set(xlabel=_plain(f"{panel.pair.first.name}{unit}"), ylabel=_plain(f"{panel.pair.second.name}{unit}"))
    agree = f"Spearman {with_limits(panel.ranks, 'spearman', '+.2f')}" if panel.ranks else f"{len(masks)} masks"
    title = f"{panel.ablation}: {agree}; {panel.pair.test}, {int(differ.sum())} of {len(masks)} differ"
    axes.set_title(title, loc="left", fontsize=9)


def _column(rows: Sequence[Row], name: str) -> FloatArray:
    return np.array([float(row[name]) for row in rows])


def _plain(text: str) -> str:
    """Return a text that matplotlib takes as it is: a dollar would begin a formula."""
    return text.replace("$", r"\$")
