"""Scores of heads against what the heads cost: `importance.csv`, and the scores and rises behind it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import (
    QUANTITIES,
    SCRIPTS,
    columns_of,
    kinds_of,
    losses_of,
    of_runs,
    rows_of_masks,
)
from headprobe.run.importance import CALIBRATION, DEPTH, JUDGED, candidates_named, single_head_masks
from headprobe.run.load import Columns, RunFiles

Head = tuple[int, int]

SHOWN = (
    *("ablation", "target", "scope", "score", "rows", "heads", "images_chosen", "images_judged"),
    *("spearman", "spearman_low", "spearman_high", "kendall", "kendall_low", "kendall_high"),
    *("reliability", "ceiling", "calibration"),
)


def importance(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of scores against measured costs."""
    found = of_runs(runs, _importance)
    if found is None:
        return None
    return Section(
        key="importance",
        title="Which score predicts what a head costs",
        short="Scores",
        look_at=(
            "How far a score's dot lies from 0, beside the dashed ceiling: what the true order of the heads would "
            "reach on so few images. Left or right says only which way round the score counts."
        ),
        definition=(
            "Spearman's rank correlation of a score with the measured loss without each head alone, with a 95% "
            "interval over the images that judge."
        ),
        link="results.md#importancecsv",
        data={"runs": found, "quantities": QUANTITIES},
        sources=("importance.csv", "scores.csv", "heads.csv", "masks.csv"),
        scripts=SCRIPTS,
    )


def _importance(run: RunFiles) -> dict[str, Any] | None:
    table = run.table("importance.csv")
    if not table:
        return None
    masks = single_head_masks(run.masks, run.heads)
    heads = list(masks)
    rows = rows_of_masks(run)
    return {
        "rows": columns_of(table, SHOWN),
        "layer": [layer for layer, _ in heads],
        "head": [head for _, head in heads],
        "scores": _scores(run, heads),
        "costs": {kind: losses_of([rows.get((kind, mask), []) for mask in masks.values()]) for kind in kinds_of(run)},
    }


def _scores(run: RunFiles, heads: Sequence[Head]) -> list[dict[str, Any]]:
    """Return every score of the heads, `[heads]` each, with which rows of the data chose it."""
    judged = run.described("heads").get("baseline", {})
    found: list[dict[str, Any]] = []
    for rows, columns in ((CALIBRATION, run.table("scores.csv") or {}), (JUDGED, judged)):
        for name, values in _by_head(columns).items():
            found.append({"score": name, "rows": rows, "values": [values.get(head, np.nan) for head in heads]})
    found.append({"score": DEPTH, "rows": "", "values": [layer for layer, _ in heads]})
    return found


def _by_head(columns: Columns) -> dict[str, dict[Head, float]]:
    if not columns:
        return {}
    places = [(int(layer), int(head)) for layer, head in zip(columns["layer"], columns["head"], strict=True)]
    names = [name for name in candidates_named(columns) if np.isfinite(columns[name].astype(np.float64)).any()]
    return {name: dict(zip(places, columns[name].tolist(), strict=True)) for name in names}
