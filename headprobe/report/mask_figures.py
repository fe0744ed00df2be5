"""Figures of what masks cost under each ablation: maps of heads, drops by layer and by index, indices beside draws."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.masks.ablations import FITTED, ZERO
from headprobe.metrics.arrays import FloatArray
from headprobe.report.figures import drop_curve, head_heat_map
from headprobe.report.style import BASELINE_COLOUR, MASKED_COLOUR, new_figure, write_title
from headprobe.run.index_null import FEWEST_DRAWS, Null, nulls_of
from headprobe.run.load import Row, RunFiles, main_cost
from headprobe.text import counted

SIGNIFICANT_Q = 0.05
"""False discovery rate below which a head's drop gets a ring in the heat map."""

CURVES = {"by_layer": "layer masked", "by_index": "head index masked in every layer"}
"""Curves of masks that get a figure, and the names of their x axes."""


class HeadMap(NamedTuple):
    """One quantity of single-head masks."""

    column: str  #: of `masks.csv`
    heading: str  #: what the map shows
    label: str  #: the quantity and its unit
    ring: str  #: what a ring means


MAPS = (
    HeadMap(
        "nll_rise",
        "NLL rise when one head is masked",
        "NLL rise (nats)",
        "Ring: the paired 95% interval leaves out 0 (not corrected for the number of heads).",
    ),
    HeadMap(
        "drop_pp",
        "Top-1 drop when one head is masked",
        "drop (percentage points)",
        f"Ring: q (Benjamini-Hochberg) below {SIGNIFICANT_Q}.",
    ),
    HeadMap(
        "feature_distance",
        "How far the pooled feature moves when one head is masked",
        "feature distance",
        "Mean over images of |masked - unmasked| / |unmasked|; no labels are needed.",
    ),
)

COSTS = {
    "drop_pp": ("Top-1 drop with its paired 95% interval", "top-1 drop (percentage points)"),
    "feature_distance": (
        "How far the pooled feature moves, with its 95% interval",
        "distance over the feature's length",
    ),
}
"""What masks are drawn by along a curve, in words: without labels the second."""


def mask_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield for each ablation the figures that its masks allow; all draws of an ablation share them."""
    kinds: dict[str, list[Row]] = {}
    for row in run.masks[1:]:
        kinds.setdefault(suffix_of(row["ablation"]), []).append(row)
    yield from _head_maps(run, kinds)
    for suffix, rows in kinds.items():
        yield from _curves(run, rows, suffix)


def about_masks(run: RunFiles, kinds: Collection[str]) -> str:
    """Return what titles say of ablations of a run: its model, the images that judge, and those that fitted."""
    model = run.record["model"]
    about = f"{model.get('title', model['name'])}, {counted(int(run.masks[0]['images']), 'image')}"
    return f"{about}, {run.fitted_in_words}" if FITTED & set(kinds) and run.fitted_in_words else about


def suffix_of(ablation: object) -> str:
    """Return the end of the names of an ablation's figures."""
    return "" if ablation == ZERO else f"_{ablation}"


def _about(run: RunFiles, rows: Sequence[Row]) -> str:
    """Return what titles say of the rows of one ablation."""
    kind = str(rows[0]["ablation"])
    return f"{about_masks(run, [kind])}, {kind} ablation"


def _head_maps(run: RunFiles, kinds: dict[str, list[Row]]) -> Iterator[tuple[str, Figure]]:
    """Yield each quantity's map for each ablation, all in the same colours."""
    for quantity in (one for one in MAPS if one.column in run.masks[0]):
        limit = largest_change(run, kinds.values(), quantity.column)
        for suffix, rows in kinds.items():
            figure = head_map(run, rows, quantity, limit)
            if figure is not None:
                yield f"{quantity.column}/heads{suffix}", figure


def largest_change(run: RunFiles, kinds: Iterable[Sequence[Row]], column: str) -> float:
    """Return the largest size of a quantity of single heads under any ablation, 0 where there is none."""
    maps = [single_heads(run, rows, column) for rows in kinds]
    return max((float(np.abs(one[np.isfinite(one)]).max(initial=0)) for one in maps), default=0.0)


def head_map(
    run: RunFiles, rows: Sequence[Row], quantity: HeadMap, limit: float, given: Axes | None = None
) -> Figure | None:
    """Draw a quantity of the single heads of one ablation; None with fewer than two.

    Args:
        run: The run.
        rows: The ablation's rows of `masks.csv`, of all draws.
        quantity: The quantity.
        limit: Value of the darkest red.
        given: Draw into these axes, not into a figure of its own.
    """
    values = single_heads(run, rows, quantity.column)
    if np.isfinite(values).sum() < 2:
        return None
    first = [row for row in rows if not row["draw"]]
    draws = 1 + max(int(row["draw"]) for row in rows)
    note, of_first = (f", mean of {draws} draws", " Rings are of draw 0.") if draws > 1 else ("", "")
    title, caption = f"{quantity.heading}\n{_about(run, first)}{note}", f"{quantity.ring}{of_first}"
    ringed = _ringed(run, first, quantity.column)
    return head_heat_map(values, title, quantity.label, ringed, caption, limit, given)


def _ringed(run: RunFiles, rows: Sequence[Row], column: str) -> NDArray[np.bool_]:
    """Return which heads get a ring `[layers, heads]`; a comparison with NaN is false."""
    if column == "drop_pp":
        return np.asarray(single_heads(run, rows, "bh_q") < SIGNIFICANT_Q)
    if column == "feature_distance":  # never below 0: its interval says nothing of chance
        return np.zeros_like(single_heads(run, rows, column), dtype=np.bool_)
    low, high = (single_heads(run, rows, f"{column}_{end}") for end in ("low", "high"))
    return np.asarray((low > 0) | (high < 0))


def _curves(run: RunFiles, rows: Sequence[Row], suffix: str) -> Iterator[tuple[str, Figure]]:
    """Yield the drops by layer and by index: of draw 0 with their intervals, of other draws as dots."""
    for curve in CURVES:
        figure = drops_along(run, rows, curve)
        if figure is not None:
            yield f"{main_cost(run.masks[0])}/{curve}{suffix}", figure


def drops_along(run: RunFiles, rows: Sequence[Row], curve: str, given: Axes | None = None) -> Figure | None:
    """Draw the drops of one ablation along a curve of `CURVES`; None with fewer than two masks.

    Args:
        run: The run.
        rows: The ablation's rows of `masks.csv`, of all draws.
        curve: The curve, as in `masks.json`.
        given: Draw into these axes, not into a figure of its own.
    """
    steps = {str(row["mask"]): run.curves[str(row["mask"])][1] for row in rows}
    shown = [row for row in rows if run.curves[str(row["mask"])][0] == curve]
    if len({row["mask"] for row in shown}) < 2:
        return None
    return _drops(run, shown, steps, CURVES[curve], given=given)


def drops_of_masks(run: RunFiles, rows: Sequence[Row], most: int, given: Axes | None = None) -> Figure:
    """Draw the drops of all masks of one ablation beside each other, by name; of more than `most` the largest."""
    first = [row for row in rows if not row["draw"]]
    largest = sorted(first, key=lambda row: -float(row[main_cost(row)]))[:most]
    kept = {row["mask"] for row in (first if len(first) <= most else largest)}
    names = [str(row["mask"]) for row in first if row["mask"] in kept]
    steps = {name: place for place, name in enumerate(names)}
    left_out = f", the largest {len(names)} of {len(first)}" if len(names) < len(first) else ""
    shown = [row for row in rows if row["mask"] in kept]
    return _drops(run, shown, steps, "heads masked", names, left_out, given)


def _drops(
    run: RunFiles,
    shown: Sequence[Row],
    steps: dict[str, int],
    axis: str,
    names: Sequence[str] = (),
    note: str = "",
    given: Axes | None = None,
) -> Figure:
    """Draw the drops of draw 0 with their intervals and those of other draws as dots, each mask at its step."""
    first = [row for row in shown if not row["draw"]]
    cost = main_cost(run.masks[0])
    drops, lows, highs = ([float(row[column]) for row in first] for column in with_ends(cost))
    others = [(steps[str(row["mask"])], float(row[cost])) for row in shown if row["draw"]]
    heading, label = COSTS[cost]
    title = f"{heading}{note}\n{_about(run, first)}" + (", draw 0" if others else "")
    places = [steps[str(row["mask"])] for row in first]
    return drop_curve(places, drops, lows, highs, axis, title, others, names, given, label)


def with_ends(column: str) -> tuple[str, str, str]:
    """Return the name of a column of `masks.csv` and those of its limits."""
    if column == "drop_pp":
        return column, "drop_low_pp", "drop_high_pp"
    return column, f"{column}_low", f"{column}_high"


def single_heads(run: RunFiles, rows: Sequence[Row], column: str) -> FloatArray:
    """Return a column of the masks of exactly one head as `[layers, most heads]`, NaN where none was scored.

    Of several draws the mean.
    """
    heads_per_layer = run.record["model"]["heads_per_layer"]
    total, count = np.zeros((2, len(heads_per_layer), max(heads_per_layer)))
    by_mask: set[tuple[tuple[int, int], int]] = set()
    for row in rows:
        heads = run.heads[str(row["mask"])]
        if len(heads) == 1 and (heads[0], int(row["draw"])) not in by_mask:  # one head may have two names
            by_mask.add((heads[0], int(row["draw"])))
            total[heads[0]] += float(row[column])
            count[heads[0]] += 1
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


# -- indices beside random heads of the same layers --

INDEX_QUANTITIES = {
    "drop_pp": "top-1 drop (percentage points)",
    "nll_rise": "NLL rise (nats)",
    "feature_distance": "feature distance",
}


def index_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield for each ablation what the same index in every layer costs, among draws of one head of these layers."""
    kinds: dict[str, list[Null]] = {}
    for null in nulls_of(run):
        kinds.setdefault(null.ablation, []).append(null)
    for ablation, nulls in kinds.items():
        table = run.table("index_null.csv") or {}
        p_values = {
            (str(mask), str(quantity)): float(p)
            for mask, kind, quantity, p in zip(*(table[name] for name in INDEX_KEYS), strict=True)
            if kind == ablation
        }
        about = f"{about_masks(run, [ablation])}, {ablation} ablation"
        title = f"The same head index in every layer, beside one random head of each\n{about}"
        yield f"index_null/by_index{suffix_of(ablation)}", beside_draws(nulls, p_values, title)


INDEX_KEYS = ("mask", "ablation", "quantity", "p")


def beside_draws(nulls: Sequence[Null], p_values: dict[tuple[str, str], float], title: str) -> Figure:
    """Draw each index as a diamond in a row of dots, which are the draws from its layers; with the p of the table."""
    figure = new_figure(10, 2.2 + 0.36 * len(nulls))
    quantities = {name: label for name, label in INDEX_QUANTITIES.items() if name in nulls[0].draws}
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
        for row, null in enumerate(nulls):
            _beside_draws(axes, row, null.value[quantity], null.draws[quantity])
            p = p_values.get((null.mask, quantity), float("nan"))
            note = f"p {p:.3f}" if np.isfinite(p) else "no draws" if not len(null.draws[quantity]) else ""
            axes.text(1.01, row, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.25")
        axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set(xlabel=label, ylim=(len(nulls) - 0.4, -0.6))
        axes.set_yticks(range(len(nulls)), [null.mask for null in nulls])
        axes.spines[["top", "right"]].set_visible(False)
    counts = sorted({len(next(iter(null.draws.values()))) for null in nulls})
    few = f" With fewer than {FEWEST_DRAWS} draws there is no p." if counts[0] < FEWEST_DRAWS else ""
    draws = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"Diamond: the index. Dots: {draws} draws; bar: the middle 95% of them. p: two-sided, by rank."
    write_title(figure, title, caption + few)
    return figure


def _beside_draws(axes: Axes, row: int, value: float, draws: FloatArray) -> None:
    finite = draws[np.isfinite(draws)]
    # Spread without chance, so that the same run gives the same pixels: each dot at its place in a fixed pattern.
    heights = row + 0.5 * (np.arange(len(finite)) * 0.6180339887 % 1 - 0.5)
    axes.plot(finite, heights, ".", color=BASELINE_COLOUR, alpha=0.35, markersize=4, markeredgewidth=0)
    if len(finite):
        axes.hlines(row, *np.quantile(finite, [0.025, 0.975]), color=BASELINE_COLOUR, linewidth=1.5)
    axes.plot(value, row, "D", color=MASKED_COLOUR, markeredgecolor="white", markersize=8, zorder=3)
