"""Which rows of `masks.csv` sentences are about: whole layers, single heads, one kind of ablation."""

from collections.abc import Sequence

import numpy as np

from headprobe.masks.ablations import LINEAR, MEAN, OPTIMAL, POSITION, RESAMPLE, ZERO
from headprobe.metrics.accuracy.paired_tests import smallest_resolvable_drop
from headprobe.run.load import Row, RunFiles

SIGNIFICANT_Q = 0.05
"""A mask with a q below it is said to differ from the whole model."""

FILLED = {
    ZERO: "set to zero",
    MEAN: "replaced by their mean over the images that calibrate",
    POSITION: "replaced by their mean at each place over the images that calibrate",
    LINEAR: "replaced by a linear prediction from the heads that their layer keeps",
    RESAMPLE: "replaced by their output on another image",
    OPTIMAL: "replaced by the constant with which the model loses least",
}
"""What masked heads are, by the kind of ablation, in the middle of a sentence."""

Heads = frozenset[tuple[int, int]]
"""Heads as (layer, head)."""


def main_ablation(run: RunFiles) -> str:
    """Return the ablation that sentences are about: zero where it was measured, else the first; nothing without one."""
    kinds = list(dict.fromkeys(str(row["ablation"]) for row in run.masks[1:]))
    return ZERO if ZERO in kinds else kinds[0] if kinds else ""


def filled(run: RunFiles, ablation: str) -> str:
    """Return what masked heads are, such as `set to zero`; of several draws, that it is the first."""
    draws = len({int(row["draw"]) for row in run.masks[1:] if row["ablation"] == ablation})
    words = FILLED.get(ablation.partition(":")[0], f"{ablation} ablation")
    return f"{words}, the first of {draws} draws" if draws > 1 else words


def masked(run: RunFiles, ablation: str) -> dict[Heads, Row]:
    """Return by its heads the row of every set that an ablation was measured on: the first of several draws."""
    found: dict[Heads, Row] = {}
    for row in run.masks[1:]:
        heads = frozenset(run.heads[str(row["mask"])])
        if row["ablation"] == ablation and not row["draw"] and heads:
            known = found.setdefault(heads, row)
            if not known["test_family"] and row["test_family"]:  # the name that was tested
                found[heads] = row
    return found


def whole_layers(run: RunFiles, rows: dict[Heads, Row]) -> dict[int, Row]:
    """Return the rows of masks of exactly one whole layer, by its number."""
    counts = run.record["model"]["heads_per_layer"]
    sets = {frozenset((layer, head) for head in range(count)): layer for layer, count in enumerate(counts) if count}
    return {sets[heads]: row for heads, row in rows.items() if heads in sets}


def single_heads(rows: dict[Heads, Row]) -> dict[tuple[int, int], Row]:
    """Return the rows of masks of exactly one head, by (layer, head)."""
    return {next(iter(heads)): row for heads, row in rows.items() if len(heads) == 1}


def largest_first(rows: Sequence[Row], column: str) -> list[Row]:
    """Return the rows with a number in a column, the largest first."""
    there = [row for row in rows if not np.isnan(float(row[column]))]
    return sorted(there, key=lambda row: -float(row[column]))


def churn_of(rows: Sequence[Row], images: int) -> float:
    """Return the fraction of images that flip without net effect, as many lost as won: the median over masks."""
    both = [2 * min(int(row["right_to_wrong"]), int(row["wrong_to_right"])) / images for row in rows]
    return float(np.median(both))


def resolvable(images: int, churn: float) -> float:
    """Return the smallest true drop, points, that a test at 5% finds with 80% power; NaN where it finds none."""
    return smallest_resolvable_drop(images, churn) if churn < 1 else float("nan")
