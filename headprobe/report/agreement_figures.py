"""Kinds of ablation against each other: the NLL rise of every mask under one and under another."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import stats

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.mask_figures import about_masks
from headprobe.report.style import VALUE_COLOURS, new_figure, some, write_title
from headprobe.run.ablations import MOVED, NLL_RISE, main_quantity, with_limits
from headprobe.run.load import Row, RunFiles
from headprobe.run.results import FAMILIES_JOINED

NAMED = 8
"""How many masks get their names at most: those with the largest rises."""

LEAST_NAMED = 0.1
"""Only rises of this part of the largest have names."""

LETTER_WIDTH, LETTER_HEIGHT, DOT_WIDTH = 0.015, 0.035, 0.014
"""Room of a letter and of half a dot, in parts of the axes."""

HEAD = "head:"

ONE_COLOUR = "#0f5fa6"


def agreement_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield for each two ablations of a test family the rises of its masks against each other, and their ranks."""
    rows = _rows(run)
    main = main_quantity({row["quantity"] for row in rows})
    what, unit = ("NLL rise", " (nats)") if main == NLL_RISE else ("feature distance", "")
    for row in rows:
        if row["quantity"] != main:
            continue
        family, kinds = str(row["test_family"]), (str(row["ablation_a"]), str(row["ablation_b"]))
        rises = [_rises(run, family, kind) for kind in kinds]
        masks = [mask for mask in rises[0] if mask in rises[1]]
        first, second = (np.array([of_kind[mask] for mask in masks]) for of_kind in rises)
        agree = with_limits(row, "spearman", "+.2f")
        ranked = f"{kinds[0]} and {kinds[1]} ablation: rank agreement (Spearman) of {what}s {agree}"
        title = f"{ranked}\n{about_masks(run, kinds)}"
        layers = layers_of(run, masks)
        slug = re.sub(r"[^\w-]+", "-", family)
        yield (
            f"ablations/{slug}_{kinds[0]}_{kinds[1]}",
            rises_against(
                first, second, kinds, masks, f"{title}, {row['masks']} masks of {family}", layers, (what, unit)
            ),
        )


def _rows(run: RunFiles) -> list[Row]:
    columns = run.table("ablations.csv") or {}
    cells = [values.tolist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def _rises(run: RunFiles, family: str, kind: str) -> dict[str, float]:
    """Return the NLL rise of each mask of a test family under an ablation, the mean of its draws."""
    own = [row for row in run.masks[1:] if row["ablation"] == kind]
    # Only draw 0 is in a test family.
    members = [str(row["mask"]) for row in own if family in str(row["test_family"]).split(FAMILIES_JOINED)]
    found: dict[str, list[float]] = {mask: [] for mask in members}
    for row in own:
        if row["mask"] in found:
            found[str(row["mask"])].append(float(row[NLL_RISE if NLL_RISE in row else MOVED]))
    return {mask: float(np.mean(values)) for mask, values in found.items()}


def layers_of(run: RunFiles, masks: list[str]) -> IntArray | None:
    """Return the layer of each mask; None where some hit heads of several."""
    own = [{layer for layer, _ in run.heads[mask]} for mask in masks]
    if any(len(layers) != 1 for layers in own):
        return None
    return np.array([layer for layers in own for layer in layers], dtype=np.int64)


def rises_against(
    first: FloatArray,
    second: FloatArray,
    kinds: tuple[str, str],
    masks: list[str],
    title: str,
    layers: IntArray | None = None,
    quantity: tuple[str, str] = ("NLL rise", " (nats)"),
) -> Figure:
    """Draw the NLL rises of masks under one ablation against those under another, and their ranks beside.

    Args:
        first: NLL rises `[masks]`, nats.
        second: The same under the other ablation.
        kinds: Names of the ablations.
        masks: Names of the masks; the largest rises carry theirs.
        title: What is shown, of which model, on how many images.
        layers: `[masks]`, the layer of each mask, which colours its dot; None for masks of several layers.
        quantity: What is drawn, and its unit in brackets.
    """
    what, unit = quantity
    figure = new_figure(10, 5.2)
    rises, ranks = figure.subplots(1, 2)
    scatter_masks(rises, first, second, layers)
    rises.set(xlabel=f"{what}, {kinds[0]}{unit}", ylabel=f"{what}, {kinds[1]}{unit}", title=f"{what.split()[-1]}s")
    heads = all(mask.startswith(HEAD) for mask in masks)
    name_dots(rises, first, second, [mask.removeprefix(HEAD) for mask in masks] if heads else masks)

    places = [stats.rankdata(values, nan_policy="omit") for values in (first, second)]
    scatter_masks(ranks, places[0], places[1], layers)
    for axis in (ranks.xaxis, ranks.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    ranks.set(xlabel=f"rank, {kinds[0]} (1: smallest rise)", ylabel=f"rank, {kinds[1]}", title="ranks")
    if layers is not None:
        layer_bar(figure, [rises, ranks], layers)
    named = "layer.head" if heads else "the mask's name"
    write_title(figure, title, f"A dot per mask. Line: the same under both. Large rises carry {named}.")
    return figure


def scatter_masks(axes: Axes, x: FloatArray, y: FloatArray, layers: IntArray | None) -> None:
    """Draw a dot per mask, and the line of equal values; each axis as far as its own values go."""
    known = np.isfinite(x) & np.isfinite(y)
    dots: dict[str, Any] = {"color": ONE_COLOUR} if layers is None else {"c": layers[known], **layer_colours(layers)}
    axes.scatter(x[known], y[known], s=36, edgecolors="0.2", linewidths=0.5, zorder=3, **dots)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the line must not widen them
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1, zorder=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def layer_colours(layers: IntArray) -> dict[str, Any]:
    """Return the colours of layers, as arguments of matplotlib: one step for each."""
    count = int(layers.max()) + 1
    return {"cmap": VALUE_COLOURS, "norm": BoundaryNorm(np.arange(count + 1) - 0.5, 256)}


def layer_bar(figure: Figure, axes: list[Axes], layers: IntArray) -> None:
    """Draw beside the axes which colour a layer has."""
    count = int(layers.max()) + 1
    bar = figure.colorbar(ScalarMappable(**layer_colours(layers)), ax=axes, label="layer", fraction=0.05, pad=0.02)
    bar.set_ticks(list(some(count, 16)))


def name_dots(axes: Axes, x: FloatArray, y: FloatArray, names: Sequence[str], sizes: FloatArray | None = None) -> None:
    """Write the names of the largest dots beside them, where they cover no other dot and no other name.

    Args:
        axes: Where the dots are.
        x: `[dots]`.
        y: `[dots]`.
        names: `[dots]`.
        sizes: What counts as large, `[dots]`; without it the larger of x and y.
    """
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    all_sizes = np.maximum(x, y) if sizes is None else sizes
    sizes = all_sizes[known]
    limits = (axes.get_xlim(), axes.get_ylim())
    # [masks, 2], in parts of the axes
    at = np.stack([(of - low) / (high - low) for of, (low, high) in zip((x, y), limits, strict=True)], axis=1)
    taken: list[FloatArray] = []
    for number in known[np.argsort(-sizes, kind="stable")]:
        if len(taken) == NAMED or all_sizes[number] < LEAST_NAMED * sizes.max():
            break
        inwards = -1 if at[number, 0] > 0.5 else 1
        for side in (inwards, -inwards):
            box = _box(at[number], len(names[number]), side)
            if _has_room(box, at[known[known != number]], taken):
                taken.append(box)
                _write(axes, names[number], (x[number], y[number]), side)
                break


def _write(axes: Axes, name: str, dot: tuple[float, float], side: int) -> None:
    """Write a name beside a dot: 1 right of it, -1 left."""
    text = axes.annotate(name, dot, xytext=(6 * side, 0), textcoords="offset points", fontsize=7, color="0.25")
    text.set(ha="left" if side > 0 else "right", va="center")
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # the line may run through it


def _box(dot: FloatArray, letters: int, side: int) -> FloatArray:
    """Return left, lower, right and upper edge of a name beside a dot, all in parts of the axes."""
    near, far = DOT_WIDTH, DOT_WIDTH + LETTER_WIDTH * letters
    left, right = (near, far) if side > 0 else (-far, -near)
    return np.array([dot[0] + left, dot[1] - LETTER_HEIGHT / 2, dot[0] + right, dot[1] + LETTER_HEIGHT / 2])


def _has_room(box: FloatArray, dots: FloatArray, names: Sequence[FloatArray]) -> bool:
    """Return whether a name stays within the axes and covers no dot of `[dots, 2]` and no other name."""
    if (box < 0).any() or (box > 1).any():
        return False
    room = np.array([DOT_WIDTH, LETTER_HEIGHT / 2])
    low, high = box[:2] - room, box[2:] + room
    return not (
        ((dots > low) & (dots < high)).all(axis=1).any()
        or any(((one[2:] > low) & (one[:2] < high)).all() for one in names)
    )
