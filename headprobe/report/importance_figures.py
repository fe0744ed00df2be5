"""Scores of heads against what the heads cost: the rises themselves, and how well each score predicts them."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from headprobe.masks.ablations import FITTED
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.agreement_figures import ONE_COLOUR, layer_bar, layer_colours
from headprobe.report.mask_figures import about_masks, single_heads
from headprobe.report.style import MASKED_COLOUR, figure_of, new_figure, say_nothing_there, write_title
from headprobe.run.ablations import NLL_RISE, main_quantity, with_limits
from headprobe.run.importance import ALL, CALIBRATION, JUDGED, WITHIN_LAYERS, candidates_named
from headprobe.run.load import Columns, Row, RunFiles
from headprobe.run.results import column_rows

PANELS_WIDE = 3

MANY_DECADES = 30.0
"""A positive score whose largest value is so many times its median is drawn over a logarithmic axis."""

COLOURS = {CALIBRATION: ONE_COLOUR, JUDGED: MASKED_COLOUR, "": "0.35"}
"""Colours of scores, by the rows of the data that they are from."""

NAMES = {CALIBRATION: "chosen on calibration images", JUDGED: "chosen on the judged images", "": "chosen on no image"}

WITHIN_COLOUR = "0.62"

DASHES = (0, (4, 2))
"""The line of a ceiling."""


def importance_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield the calibration scores against the first ablation's NLL rises, and the correlations of all scores."""
    table = column_rows(run.table("importance.csv") or {})
    rows = [row for row in table if row["target"] == main_quantity({one["target"] for one in table})]
    scores = run.table("scores.csv")
    if not rows:
        return
    if scores and any(np.isfinite(scores[name].astype(np.float64)).any() for name in candidates_named(scores)):
        yield "importance/scores", _scores(run, rows, scores)
    yield "importance/correlations", correlations(run, rows)


def _scores(run: RunFiles, rows: Sequence[Row], scores: Columns) -> Figure:
    """Draw a panel for each score: a dot for each head, its rise under the first ablation over its score."""
    ablation = str(rows[0]["ablation"])
    of_all = {str(row["score"]): row for row in rows if row["ablation"] == ablation and row["scope"] == ALL}
    map_of_rises = single_heads(
        run, [row for row in run.masks[1:] if row["ablation"] == ablation], str(rows[0]["target"])
    )
    layers = scores["layer"].astype(np.int64)
    rises = map_of_rises[layers, scores["head"].astype(np.int64)]
    names = sorted(candidates_named(scores), key=list(of_all).index)  # the best predictor first
    if not run.labelled:  # what needs labels has no value, which run.json says
        names = [name for name in names if np.isfinite(scores[name].astype(np.float64)).any()]
    high = -(-len(names) // PANELS_WIDE)
    figure = new_figure(3.6 * PANELS_WIDE, 1.0 + 2.7 * high)
    panels = figure.subplots(high, PANELS_WIDE, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, scores[name].astype(np.float64), rises, layers)
        axes.set_title(f"{name}\n{with_limits(of_all[name], 'spearman', '+.2f')}", fontsize=9)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[::PANELS_WIDE]:
        axes.set_ylabel("NLL rise (nats)" if rows[0]["target"] == NLL_RISE else "feature distance")
    layer_bar(figure, list(panels), layers)
    chosen = of_all[names[0]]["images_chosen"]
    title = f"Scores of heads against {_target(rows)} without each, {ablation} ablation\n{about_masks(run, FITTED)}"
    caption = (
        "A dot per head. Above: Spearman's rank correlation and its 95% interval. Scores are of "
        f"{chosen:,} calibration images. Logarithmic where a score spans decades."
    )
    write_title(figure, title, caption)
    return figure


def _target(rows: Sequence[Row]) -> str:
    """Return what scores are held against, in words."""
    return "the NLL rise" if rows[0]["target"] == NLL_RISE else "how far the feature moves"


def _panel(axes: Axes, score: FloatArray, rises: FloatArray, layers: IntArray) -> None:
    known = np.isfinite(score) & np.isfinite(rises)
    if not known.any():
        axes.set(xticks=[], yticks=[])
        say_nothing_there(axes, "no value: run.json says why")
        return
    colours = layer_colours(layers)
    axes.scatter(score[known], rises[known], c=layers[known], s=26, edgecolors="0.2", linewidths=0.4, **colours)
    if score[known].min() > 0 and score[known].max() > MANY_DECADES * np.median(score[known]):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def correlations(run: RunFiles, rows: Sequence[Row], given: Axes | None = None) -> Figure:
    """Draw a panel for each ablation: every score's correlation with the NLL rise, over all heads and within layers.

    Args:
        run: The run.
        rows: Rows of `importance.csv` with the target `nll_rise`.
        given: Draw into these axes, not into a figure of its own; for rows of one ablation.
    """
    ablations = list(dict.fromkeys(str(row["ablation"]) for row in rows))
    by_key = {(str(row["ablation"]), str(row["scope"]), str(row["score"]), str(row["rows"])): row for row in rows}
    # The best under the first ablation first, without those that give no order under any.
    ordered = {key[2:] for key, row in by_key.items() if np.isfinite(float(row["spearman"]))}
    candidates = [key[2:] for key in by_key if key[:2] == (ablations[0], ALL)]
    order = [key for key in candidates if key in ordered] or candidates
    if given is None:
        figure = new_figure(3.2 + 2.9 * len(ablations), 1.9 + 0.27 * len(order))
        panels: Any = figure.subplots(1, len(ablations), sharey=True, squeeze=False)[0]
    else:
        figure, panels = figure_of(given), np.array([given])
    for axes, ablation in zip(panels, ablations, strict=True):
        for scope, shift in ((ALL, -0.14), (WITHIN_LAYERS, 0.2)):
            _dots(axes, [by_key[(ablation, scope, *key)] for key in order], shift)
        # The ceiling is of the heads that a score is defined for: the most of them.
        widest = max((by_key[(ablation, ALL, *key)] for key in order), key=lambda row: int(row["heads"]))
        _frame(axes, widest, ablation)
    panels[0].set_yticks(range(len(order)), [name for name, _ in order], fontsize=8)
    for label, (_, source) in zip(panels[0].get_yticklabels(), order, strict=True):
        label.set_color(COLOURS[source])
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    about = f"Which score predicts {_target(rows)} without a head: Spearman's rank correlation"
    about += f"\n{about_masks(run, FITTED)}"
    left_out = [name for name, source in candidates if (name, source) not in order]
    if given is not None:
        about = f"{about}, {given.get_title()}"  # the ablation and its ceiling
        given.set_title("")
    write_title(figure, about, "", given)
    _explain(figure, {source for _, source in order}, left_out, given)
    return figure


def _dots(axes: Axes, rows: Sequence[Row], shift: float) -> None:
    """Draw the correlations of one scope with their intervals, one below the other."""
    within = rows[0]["scope"] == WITHIN_LAYERS
    for place, row in enumerate(rows):
        value, low, high = (float(row[f"spearman{end}"]) for end in ("", "_low", "_high"))
        colour = WITHIN_COLOUR if within else COLOURS[str(row["rows"])]
        axes.plot(
            [low, high], [place + shift] * 2, color=colour, linewidth=1.0 if within else 1.6, solid_capstyle="butt"
        )
        axes.plot(value, place + shift, "D" if within else "o", color=colour, markersize=3.0 if within else 5.0)


def _frame(axes: Axes, row: Row, ablation: str) -> None:
    """Draw what stands around the dots: no correlation, and the ceiling on both sides of it."""
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ceiling = float(row["ceiling"])
    for side in (-ceiling, ceiling) if np.isfinite(ceiling) else ():
        axes.axvline(side, color="0.3", linewidth=1.0, linestyle=DASHES, zorder=0)
    axes.set(xlim=(-1.05, 1.05), xticks=[-1, -0.5, 0, 0.5, 1])
    axes.set_title(
        f"{ablation}: ceiling {ceiling:.2f}" if np.isfinite(ceiling) else f"{ablation}: no ceiling", fontsize=9
    )
    axes.tick_params(labelsize=8, length=0)
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _explain(figure: Figure, sources: set[str], left_out: Sequence[str], given: Axes | None) -> None:
    """Write below the panels what dots and lines mean, and which scores are not there."""
    kinds = {source: name for source, name in NAMES.items() if source in sources}
    keys = [
        Line2D([], [], color=COLOURS[source], marker="o", markersize=5, label=name) for source, name in kinds.items()
    ]
    keys.append(Line2D([], [], color=WITHIN_COLOUR, marker="D", markersize=3, label="within layers"))
    keys.append(Line2D([], [], color="0.3", linestyle=DASHES, linewidth=1, label="ceiling: the true order itself"))
    if given is not None:
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06), "ncols": 2}
        given.legend(handles=keys, frameon=False, fontsize=7, **below)
        return
    note = "Lines: 95% intervals over images."
    note += f" Not shown, as they give no order: {', '.join(left_out)}." if left_out else ""
    wide = figure.get_size_inches()[0]
    note = textwrap.fill(note, int(13 * wide))  # letters of this size an inch
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left"}
    figure.legend(handles=keys, loc="outside lower left", ncols=3 if wide > 8 else 2, title=note, **style)
