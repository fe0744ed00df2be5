"""Which score predicts what a head costs? `importance.csv` holds every score of every head against measured rises."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headprobe.metrics.accuracy.agreement import (
    FEWEST_ORDERED,
    RankAgreement,
    Reliability,
    reliability,
    score_agreements,
)
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.ablations import images_of, sums_by_variant
from headprobe.run.load import Columns, Row, RunFiles

Head = tuple[int, int]
"""Layer and number of a head."""

CALIBRATION, JUDGED = "calibration", "judged"
"""Which rows of the data chose a score; nothing where none did."""

DEPTH = "depth"
"""The score that knows only a head's layer."""

ALL, WITHIN_LAYERS = SCOPES = "all", "within_layers"
"""Heads that are compared: with all others, or with those of their own layer."""

NO_SCORE = {"mask", "layer", "head", "images"}
"""Columns of `scores.csv` and `heads.csv` that are no score of a head."""

STANDARD_ERROR = "_se"

NO_AGREEMENT = RankAgreement(*[math.nan] * 6)
NO_RELIABILITY = Reliability(*[math.nan] * 3)


class Score(NamedTuple):
    """One number for each head, which may predict what the head costs."""

    name: str  #: the column it is from
    rows: str  #: which rows of the data it was computed on: `CALIBRATION`, `JUDGED`, or nothing
    images: int  #: how many images these are
    of_heads: dict[Head, float]  #: NaN where it is not defined


def importance_of(run: RunFiles) -> list[Row]:
    """Return the rows of `importance.csv` from a run's files; none where the run has no `scores.csv`."""
    scores = run.table("scores.csv")
    if not scores:
        return []
    heads = run.described("heads").get("baseline", {})
    return importance_rows(scores, heads, run.masks, run.heads, run.arrays("groups.npz"), run.calibration)


def importance_rows(
    scores: Columns,
    heads: Columns,
    mask_rows: Sequence[Row],
    mask_heads: Mapping[str, Sequence[Head]],
    groups: Mapping[str, NDArray[Any]],
    calibration: str = "",
) -> list[Row]:
    """Return how well each score of heads predicts what their single-head masks cost, the best first.

    Args:
        scores: `scores.csv` by column: computed on calibration rows.
        heads: The baseline's rows of `heads.csv` by column, which saw the rows that judge; may be empty.
        mask_rows: Rows of `masks.csv`, the baseline first.
        mask_heads: For every mask its heads (`RunFiles.heads`); those of one head are the targets.
        groups: The arrays of `groups.npz`, in the order of `mask_rows`.
        calibration: Which images chose: `half`, `same`, `split:NAME`.

    Returns:
        Rows by ablation, target and scope, therein by the size of Spearman's correlation.
    """
    candidates = list(_candidates(scores, heads))
    images = images_of(groups)
    found: list[Row] = []
    for ablation, sums in _targets(mask_rows, mask_heads, groups).items():
        for target in sums:
            for scope in SCOPES:
                key: Row = {"ablation": ablation, "target": target, "scope": scope}
                rows = _judged(candidates, sums[target], images, scope)
                found += [key | row | {"calibration": calibration} for row in sorted(rows, key=_strength)]
    return found


def candidates_named(columns: Columns) -> list[str]:
    """Return the columns of `scores.csv` or `heads.csv` that are scores of heads: numbers, and no standard errors."""
    return [
        name
        for name, values in columns.items()
        if name not in NO_SCORE and not name.endswith(STANDARD_ERROR) and values.dtype.kind in "biuf"
    ]


def single_head_masks(mask_rows: Sequence[Row], mask_heads: Mapping[str, Sequence[Head]]) -> dict[Head, str]:
    """Return for each head the first mask that takes it away alone, where there is one."""
    found: dict[Head, str] = {}
    for name in dict.fromkeys(str(row["mask"]) for row in mask_rows[1:]):
        if len(own := mask_heads[name]) == 1:
            found.setdefault((int(own[0][0]), int(own[0][1])), name)
    return dict(sorted(found.items()))


def _candidates(scores: Columns, heads: Columns) -> Iterator[Score]:
    """Yield every score, and the depth of every head that has any."""
    known: dict[Head, float] = {}
    for columns, rows in ((scores, CALIBRATION), (heads, JUDGED)):
        if not columns:
            continue
        places = [(int(layer), int(head)) for layer, head in zip(columns["layer"], columns["head"], strict=True)]
        known |= {(layer, head): float(layer) for layer, head in places}
        seen = int(columns["images"].max()) if len(places) else 0
        for name in candidates_named(columns):
            yield Score(name, rows, seen, dict(zip(places, columns[name].astype(np.float64).tolist(), strict=True)))
    yield Score(DEPTH, "", 0, known)


def _targets(
    mask_rows: Sequence[Row], mask_heads: Mapping[str, Sequence[Head]], groups: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, dict[Head, FloatArray]]]:
    """Return by ablation and quantity the sums over draws and over the images of each group, `[groups]` of each head.

    Sums and no means: those of lost answers are whole numbers, and rounding would break their ties by chance.
    """
    by_ablation: dict[str, list[Row]] = {}
    for row in mask_rows[1:]:
        by_ablation.setdefault(str(row["ablation"]), []).append(row)
    masks = {kind: single_head_masks([mask_rows[0], *rows], mask_heads) for kind, rows in by_ablation.items()}
    masks = {kind: own for kind, own in masks.items() if len(own) >= FEWEST_ORDERED}
    of_variants = sums_by_variant(mask_rows, groups) if masks else {}
    return {
        ablation: {
            quantity: {head: of_variants[ablation, name][quantity] for head, name in own.items()}
            for quantity in of_variants[ablation, next(iter(own.values()))]
        }
        for ablation, own in masks.items()
    }


def _judged(scores: Sequence[Score], sums: Mapping[Head, FloatArray], images: IntArray, scope: str) -> list[Row]:
    """Return the cells of each score, for one target; scores of the same heads are compared with it together."""
    together: dict[tuple[Head, ...], list[Score]] = {}
    for score in scores:
        together.setdefault(_used(score, sums, scope), []).append(score)
    found: list[Row] = []
    for used, own in together.items():
        agreements, reliable = [NO_AGREEMENT] * len(own), NO_RELIABILITY
        if len(used) >= FEWEST_ORDERED:
            values = np.array([[score.of_heads[head] for head in used] for score in own])  # [scores, heads]
            measured = np.stack([sums[head] for head in used])  # [heads, groups]
            blocks = None if scope == ALL else np.array([layer for layer, _ in used], dtype=np.int64)
            agreements = score_agreements(values, measured, images, blocks)
            reliable = reliability(measured, images, blocks)
        for score, agreement in zip(own, agreements, strict=True):
            counts = _counts(score, sums, len(used)) | {"images_judged": int(images.sum())}
            found.append(counts | agreement._asdict() | reliable._asdict())
    return found


def _used(score: Score, measured: Mapping[Head, FloatArray], scope: str) -> tuple[Head, ...]:
    """Return the measured heads that the score is defined for, without those that nothing compares with."""
    scored = [head for head in measured if _has(score, head)]
    layers = Counter(layer for layer, _ in scored)
    return tuple(head for head in scored if scope == ALL or layers[head[0]] > 1)


def _counts(score: Score, measured: Mapping[Head, FloatArray], used: int) -> Row:
    return {
        "score": score.name,
        "rows": score.rows,
        "heads": used,
        "heads_without_mask": len(score.of_heads.keys() - measured.keys()),
        "heads_without_score": sum(not _has(score, head) for head in measured),
        "images_chosen": score.images,
    }


def _has(score: Score, head: Head) -> bool:
    return math.isfinite(score.of_heads.get(head, math.nan))


def _strength(row: Row) -> float:
    """Return by what the rows of a target are sorted: the strongest correlation first, those without one last."""
    spearman = float(row["spearman"])
    return math.inf if math.isnan(spearman) else -abs(spearman)
