"""The results of a run as files: `masks.csv`, `masks.json` and `classes.csv`, and how to read them back."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import UsageError
from headprobe.files import write_bytes, write_text
from headprobe.masks.spec import NONE, Variant
from headprobe.metrics.accuracy.paired_tests import bh_q
from headprobe.metrics.accuracy.scores import PairedScores

Cell = str | int | float
Row = dict[str, Cell]


SCORE_COLUMNS = (
    "images",
    "top1_count",
    "top5_count",
    "top1",
    "top5",
    "nll",
    "drop_pp",
    "drop_low_pp",
    "drop_high_pp",
    "right_to_wrong",
    "wrong_to_right",
    "mcnemar_p",
    "agreement",
    "kl_nats",
    "nll_rise",
    "nll_rise_low",
    "nll_rise_high",
    "nonfinite",
)


@dataclass(frozen=True)
class Run:
    """A finished run, read back.

    Attributes:
        path: Its directory.
        masks: Rows of `masks.csv`, the baseline first; an empty cell is NaN.
        heads: For every mask its heads as (layer, head).
        record: `run.json`.
    """

    path: Path
    masks: list[Row]
    heads: dict[str, list[tuple[int, int]]]
    record: dict[str, Any]


def variant_rows(variants: Sequence[Variant], scores: PairedScores) -> list[Row]:
    """Return the rows of `masks.csv`, the baseline first.

    Benjamini-Hochberg's q is taken within each test family: the masks that one `each:`, grid or `grow:` form stands
    for, under one ablation, without masks of no head and without `one-per-layer:` draws, which are what others are
    compared with.
    """
    families = ["", *(_test_family(variant) for variant in variants)]
    q_values = _q_values(variants, scores, families)
    rows: list[Row] = []
    for number, variant in enumerate([_BASELINE_ROW, *(_key(variant) for variant in variants)]):
        row: Row = {**variant, "test_family": families[number]}
        row["heads_masked"] = variants[number - 1].mask.mask.count if number else 0
        row |= {column: getattr(scores, column)[number].item() for column in SCORE_COLUMNS}
        rows.append(row | {"bh_q": q_values[number]})
    return rows


_BASELINE_ROW: Row = {"mask": NONE, "ablation": NONE, "draw": 0}


def _key(variant: Variant) -> Row:
    """Return the cells by which a row of `masks.csv` is known."""
    return {"mask": variant.mask.name, "ablation": variant.ablation, "draw": variant.draw}


def _test_family(variant: Variant) -> str:
    """Return the form in which a variant's p-value is corrected, empty for none; of several draws the first counts."""
    null = _NULL_DRAWS.search(variant.mask.test_family)
    return "" if null or variant.draw or not variant.mask.mask.count else variant.mask.test_family


_NULL_DRAWS = re.compile(r"(^|[+:])one-per-layer:\d+[-,/]")
"""A form of many `one-per-layer:` draws; a single draw joined to a sweep is no null."""


def _q_values(variants: Sequence[Variant], scores: PairedScores, families: Sequence[str]) -> list[float]:
    """Return a q per row; variants of the same heads in one test family are one test, and share its q."""
    firsts: dict[tuple[str, str, str], int] = {}
    same = [0]
    for number, (variant, family) in enumerate(zip(variants, families[1:], strict=True), start=1):
        test = (family, variant.ablation, variant.mask.mask.digest)
        same.append(firsts.setdefault(test, number) if family else number)

    # Each test once, in the family of its form and ablation; the empty text stands for no test.
    once = [""]
    for number, (variant, family) in enumerate(zip(variants, families[1:], strict=True), start=1):
        once.append(f"{family} {variant.ablation}" if family and same[number] == number else "")
    q_values = bh_q(scores.mcnemar_p, once)
    return [float(q_values[first]) for first in same]


def class_rows(variants: Sequence[Variant], scores: PairedScores, classes: Sequence[tuple[int, str]]) -> list[Row]:
    """Return the rows of `classes.csv`: a row per variant and class that has images.

    Args:
        variants: The variants, without the baseline.
        scores: Their scores, with the counts of each class.
        classes: Number in the model and name of every class that was scored.
    """
    if scores.class_images is None or scores.class_top1_count is None:
        return []
    rows: list[Row] = []
    for number, key in enumerate([_BASELINE_ROW, *(_key(variant) for variant in variants)]):
        for index in scores.class_images.nonzero()[0].tolist():
            images, right = int(scores.class_images[index]), int(scores.class_top1_count[number, index])
            lost = int(scores.class_top1_count[0, index]) - right
            rows.append(
                {
                    **key,
                    "class": classes[index][0],
                    "name": classes[index][1],
                    "images": images,
                    "top1_count": right,
                    "drop_pp": 100 * lost / images,
                }
            )
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Cell]]) -> None:
    """Write rows as CSV with full float precision; NaN becomes an empty cell."""
    table = list(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({name: "" if _is_nan(cell) else cell for name, cell in row.items()})
    write_text(path, out.getvalue())


def write_masks(path: Path, variants: Sequence[Variant]) -> None:
    """Write `masks.json`: for each mask of `masks.csv` its heads, their digest, and its place on a curve."""
    masks = {variant.mask.name: variant.mask for variant in variants}
    data = {
        name: {**mask.mask.to_json(), "digest": mask.mask.digest, "curve": mask.curve, "step": mask.step}
        for name, mask in masks.items()
    }
    write_text(path, json.dumps(data, indent=1) + "\n")


def load_run(path: str | Path) -> Run:
    """Read a run's directory, as in `lightning_logs/version_0`.

    Raises:
        UsageError: There is no finished run.
    """
    directory = Path(path)
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        masks = json.loads((directory / "masks.json").read_text(encoding="utf-8"))
        with (directory / "masks.csv").open(encoding="utf-8", newline="") as file:
            rows = [{name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise UsageError(
            f"{str(path)!r} is not the directory of a finished run: {Path(error.filename).name} is missing; "
            "give one such as lightning_logs/version_0"
        ) from error
    heads = {
        name: [(int(layer), head) for layer, heads in mask["masked_heads"].items() for head in heads]
        for name, mask in masks.items()
    }
    return Run(directory, rows, heads, record)


_TEXT_COLUMNS = frozenset({"mask", "ablation", "test_family"})
_INTEGER_COLUMNS = frozenset(
    {"draw", "heads_masked", "images", "top1_count", "top5_count", "right_to_wrong", "wrong_to_right", "nonfinite"}
)


def _cell(name: str, text: str) -> Cell:
    if name in _TEXT_COLUMNS:
        return text
    if name in _INTEGER_COLUMNS:
        return int(text)
    return float(text) if text else math.nan


def _is_nan(cell: Cell) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    write_text(directory / "run.json", json.dumps(record, indent=1, default=str) + "\n")


# -- The description of heads as files: `heads.csv`, `heads_change.csv`, and arrays as npz --


def head_rows(heads_per_layer: Sequence[int], models: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> list[Row]:
    """Return a row per model, layer and head.

    Args:
        heads_per_layer: Heads of each layer.
        models: By the model's name its columns, one entry per head in the order of (layer, head).
    """
    places = [(layer, head) for layer, heads in enumerate(heads_per_layer) for head in range(heads)]
    rows: list[Row] = []
    for name, columns in models.items():
        for number, (layer, head) in enumerate(places):
            cells: dict[str, Cell] = {column: values[number].item() for column, values in columns.items()}
            rows.append({"model": name, "layer": layer, "head": head, **cells})
    return rows


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write arrays as a compressed npz file, in one step."""
    out, content = io.BytesIO(), dict[str, Any](arrays)
    np.savez_compressed(out, **content)
    write_bytes(path, out.getvalue())
