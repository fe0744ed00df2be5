"""Figures of what heads and layers are worth together: Shapley values, and interactions of pairs."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.figures import head_heat_map
from headprobe.report.mask_figures import about_masks, suffix_of
from headprobe.report.matrices import LUMA, Matrix, colour_scale, mark_heads, mark_layers, paint
from headprobe.report.style import BASELINE_COLOUR, MASKED_COLOUR, new_figure, panel_grid, write_title, zoom
from headprobe.run.ablations import NLL_RISE, main_quantity
from headprobe.run.interactions import CLEAR_Q, PAIRWISE
from headprobe.run.load import Columns, RunFiles
from headprobe.run.shapley import HEADS, LAYERS

LABELS = {
    "nll_rise": "NLL rise (nats)",
    "drop_pp": "top-1 drop (percentage points)",
    "feature_distance": "feature distance",
}
"""Quantities, and what axes call them."""

MOST_NUMBERED_SIDE = 24
"""A larger matrix of pairs carries no numbers."""


def set_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of `shapley.csv` and `interactions.csv`, where the run has them."""
    worth, together = run.table("shapley.csv"), run.table("interactions.csv")
    if worth is not None:
        yield from _worth_of_heads(run, worth)
        yield from _worth_of_layers(run, worth)
    if together is not None:
        yield from _interactions(run, together)


def _split(table: Columns, **wanted: str) -> Iterator[tuple[str, Columns]]:
    """Yield the rows in which these columns have these values, for each ablation."""
    for ablation in dict.fromkeys(table["ablation"].tolist()):
        rows = table["ablation"] == ablation
        for column, value in wanted.items():
            rows &= table[column] == value
        if rows.any():
            yield ablation, {column: values[rows] for column, values in table.items()}


# -- Shapley values --


def _worth_of_heads(run: RunFiles, table: Columns) -> Iterator[tuple[str, Figure]]:
    for quantity, label in LABELS.items():
        of_kinds = dict(_split(table, players=HEADS, quantity=quantity))
        limit = max((float(np.nanmax(np.abs(own["value"]), initial=0)) for own in of_kinds.values()), default=0.0)
        for ablation, own in of_kinds.items():
            places = own["layer"].astype(int), own["head"].astype(int)
            shape = (1 + int(places[0].max()), 1 + int(places[1].max()))
            values, ringed = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
            values[places] = own["value"]
            ringed[places] = (own["value_low"] > 0) | (own["value_high"] < 0)
            orders, reverse = int(own["orders"][0]), int(own["reversed"][0])
            by = f"{orders} random orders" + (f", {reverse} with their reverse" if reverse else "")
            title = f"Shapley values of heads, by {by}\n{about_masks(run, [ablation])}, {ablation} ablation"
            caption = (
                "A head's share in the loss of all heads masked: the values add up to it. Ring: the 95% interval over "
                "orders and images leaves out 0 (not corrected for the number of heads)."
            )
            yield (
                f"shapley/{quantity}_heads{suffix_of(ablation)}",
                head_heat_map(values, title, label, ringed, caption, limit),
            )


def _worth_of_layers(run: RunFiles, table: Columns) -> Iterator[tuple[str, Figure]]:
    for quantity, label in LABELS.items():
        for ablation, own in _split(table, players=LAYERS, quantity=quantity):
            alone = _rises_alone(run, ablation, quantity, len(own["layer"]))
            about = f"{about_masks(run, [ablation])}, {ablation} ablation"
            title = f"Shapley values of layers, exact over all their sets\n{about}"
            yield f"shapley/{quantity}_layers{suffix_of(ablation)}", layer_values(own, alone, title, label)


def _rises_alone(run: RunFiles, ablation: str, quantity: str, layers: int) -> FloatArray:
    """Return what each whole layer costs when it alone is masked, `[layers]`; the mean of draws."""
    names: dict[int, str] = {}
    found: dict[int, list[float]] = {}
    for row in run.masks[1:]:
        name, heads = str(row["mask"]), run.heads[str(row["mask"])]
        whole = {layer for layer, _ in heads}
        if row["ablation"] == ablation and len(whole) == 1:
            (layer,) = whole
            complete = len(heads) == run.record["model"]["heads_per_layer"][layer]
            if complete and names.setdefault(layer, name) == name:  # of one set under two names the first counts
                found.setdefault(layer, []).append(float(row[quantity]))
    return np.array([np.mean(found[layer]) if layer in found else np.nan for layer in range(layers)])


def layer_values(values: Columns, alone: FloatArray, title: str, label: str) -> Figure:
    """Draw the Shapley value of each layer with its interval, beside what the layer costs alone.

    Args:
        values: Rows of `shapley.csv`, one for each layer.
        alone: What each layer costs when nothing else is masked, `[layers]`.
        title: What is shown, of which model, on how many images.
        label: The quantity and its unit.
    """
    layers = len(alone)
    figure = new_figure(3.2 + 0.42 * layers, 4.2)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.6", linewidth=0.8)
    x = np.arange(layers)
    errors = np.abs(np.stack([values["value_low"], values["value_high"]]) - values["value"])
    axes.errorbar(
        x - 0.1, values["value"], yerr=errors, fmt="o", color=BASELINE_COLOUR, capsize=3, label="Shapley value"
    )
    (rings,) = axes.plot(x + 0.1, alone, "o", color=MASKED_COLOUR, label="this layer alone")
    rings.set(markerfacecolor="none", markeredgewidth=1.4)
    axes.set(xlabel="layer", ylabel=label, xticks=x, xlim=(-0.6, layers - 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5)
    caption = "The values add up to the loss of all layers masked. Bars: 95% intervals over images."
    write_title(figure, title, f"{caption} Rings: the loss where all else is whole.")
    return figure


# -- interactions --


class Parts(NamedTuple):
    """One matrix of interactions."""

    layer: IntArray  #: `[parts]`
    head: IntArray  #: `[parts]`; of whole layers 0
    values: FloatArray  #: `[parts, parts]`, NaN where a pair was not scored
    clear: FloatArray  #: `[parts, parts]`, 1 where q is small


def _interactions(run: RunFiles, table: Columns) -> Iterator[tuple[str, Figure]]:
    """Yield the matrices of heads and of layers, by NLL rise; without labels by the feature's distance."""
    main = main_quantity(table["quantity"].tolist())
    cost, unit = ("NLL rise", "nats") if main == NLL_RISE else ("feature distance", "feature distance")
    for kind, what in ((PAIRWISE, "interactions"), ("shapley", "Shapley interactions")):
        for ablation, own in _split(table, kind=kind, quantity=main):
            about = f"{about_masks(run, [ablation])}, {ablation} ablation"
            of_heads = np.isfinite(own["head_a"]) & np.isfinite(own["head_b"])
            of_layers = np.isnan(own["head_a"]) & np.isnan(own["head_b"]) & np.isfinite(own["layer_a"] + own["layer_b"])
            for rows, name in ((of_heads, "heads"), (of_layers, "layers")):
                if not np.isfinite(own["interaction"][rows]).any():
                    continue
                parts = _matrix({column: values[rows] for column, values in own.items()})
                which = f"{kind}_" if kind != PAIRWISE else ""
                title = f"Pair {what} of {name}: {cost} of both masked, less the sum of each alone\n{about}"
                if kind != PAIRWISE:
                    title = f"{what} of {name}: mean over all sets of other {name} that are masked\n{about}"
                yield f"interactions/{which}{name}{suffix_of(ablation)}", pair_map(parts, title, name, unit)


def _matrix(rows: Columns) -> Parts:
    """Return pairs as a matrix of all their parts, in order of (layer, head)."""
    ends = [
        list(
            zip(
                rows[f"layer_{end}"].astype(int).tolist(),
                np.nan_to_num(rows[f"head_{end}"]).astype(int).tolist(),
                strict=True,
            )
        )
        for end in "ab"
    ]
    parts = sorted({*ends[0], *ends[1]})
    places = {part: place for place, part in enumerate(parts)}
    values, clear = np.full((2, len(parts), len(parts)), np.nan)
    first, second = (np.array([places[part] for part in end]) for end in ends)
    for one, other in ((first, second), (second, first)):
        values[one, other] = rows["interaction"]
        clear[one, other] = rows["bh_q"] < CLEAR_Q
    layer, head = np.array(parts, dtype=np.int64).T
    return Parts(layer, head, values, clear)


def pair_map(parts: Parts, title: str, name: str, unit: str = "nats") -> Figure:
    """Draw interactions as a small matrix per layer, or as one matrix where parts of different layers are paired."""
    different = parts.layer[:, None] != parts.layer
    floor = np.where(parts.clear == 1, -np.inf, np.inf)
    whole = Matrix(parts.values, floor, parts.layer, parts.head)
    scale = colour_scale(parts.values, diverging=True)
    # a few pairs of two layers come along with random orders: they are not what the run is about
    between = bool(np.isfinite(parts.values[different]).mean() > 0.5) if different.any() else False
    matrices = [whole] if between else whole.by_layer()
    most = max(len(matrix.head) for matrix in matrices)
    rows, columns = panel_grid(len(matrices))
    side = float(np.clip((0.42 if most <= MOST_NUMBERED_SIDE else 0.25) * most, 1.6, 10.5))
    figure = new_figure(columns * (side + 0.4) + 1.5, rows * (side + 0.6) + 1.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, matrix in zip(grid.flat, matrices, strict=False):
        paint(axes, matrix, scale, 0)
        _say(axes, matrix, float(np.nanmax(np.abs(parts.values))))
        if not between:
            axes.set_title(f"layer {matrix.layer[0]}", fontsize=9 * zoom(figure), pad=4)
            mark_heads(axes, [str(number) for number in matrix.head], side)
        elif name == "layers":
            mark_heads(axes, [str(number) for number in matrix.layer], side)
            axes.set(xlabel="layer", ylabel="layer")
        else:
            mark_layers(axes, matrix.layer, "0.6")
            axes.set(xlabel="layer (its heads in order)", ylabel="layer (its heads in order)")
    for axes in grid.flat[len(matrices) :]:
        axes.set_axis_off()
    figure.colorbar(scale, ax=grid, fraction=0.04, pad=0.02, aspect=30).set_label(f"interaction ({unit})")
    caption = (
        "Red: together they cost more than the sum, as where one stands in for the other. Blue: less. "
        f"Pale: not told from 0 (q not below {CLEAR_Q}). Hatched: no pair."
    )
    if not between:
        caption = f"Rows and columns: heads of the layer. {caption}"
    write_title(figure, title, caption)
    return figure


def _say(axes: Axes, matrix: Matrix, limit: float) -> None:
    """Write the numbers into the cells of a small matrix, to the digits that the largest needs."""
    if len(matrix.head) > MOST_NUMBERED_SIDE:
        return
    digits = int(np.clip(1 - np.floor(np.log10(limit or 1.0)), 0, 4))
    colours = axes.images[0].get_array()
    for (row, column), value in np.ndenumerate(matrix.values):
        if np.isfinite(value) and colours is not None:
            dark = float(np.asarray(colours)[row, column, :3] @ np.array(LUMA)) < 0.55
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: a rounded -0.0 loses its sign
            colour = "white" if dark else "0.1"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
