"""Writes the results of a run as files: tables, `masks.json`, `run.json`, arrays; `headprobe.run.load` reads them."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.files import write_bytes, write_text
from headprobe.masks.ablations import FITTED
from headprobe.masks.spec import NONE, Variant
from headprobe.masks.tables import CALIBRATION
from headprobe.metrics.accuracy.paired_tests import bh_q, p_of_e
from headprobe.metrics.accuracy.scores import PairedScores
from headprobe.metrics.arrays import FloatArray
from headprobe.mixture import SCHEMA
from headprobe.run.load import PRUNED, Cell, Columns, Row
from headprobe.text import ranges

if TYPE_CHECKING:  # files are read without torch
    from headprobe.metrics.features import FeatureScores

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
    "log_e_value",
    "agreement",
    "kl_nats",
    "nll_rise",
    "nll_rise_low",
    "nll_rise_high",
    "nonfinite",
)


LABEL_FREE = ("images", "nonfinite")
"""Those of them that stand in `masks.csv` of a run without labels too."""

FEATURE_COLUMNS = (
    "feature_cosine",
    "feature_cosine_low",
    "feature_cosine_high",
    "feature_distance",
    "feature_distance_low",
    "feature_distance_high",
)

Tests = dict[tuple[str, str], dict[str, list[int]]]
"""By test family and ablation its tests: by the digest of their heads the rows of `masks.csv`, from 1 on."""


def variant_rows(
    variants: Sequence[Variant],
    scores: PairedScores | None,
    calibration: str = "",
    e_values: bool = True,
    features: "FeatureScores | None" = None,
) -> list[Row]:
    """Return the rows of `masks.csv`, the baseline first.

    The column `calibration` is filled in rows of ablations that are fitted, and of heads that its scores order.

    Benjamini-Hochberg's q is taken within each test family: the masks that one `each:`, grid or `grow:` form stands
    for, under one ablation. A mask that several forms name belongs to each, and its q is the largest of theirs. Masks
    of no head belong to none, nor do the draws of `one-per-layer:`, with which others are compared. e-BH goes by the
    same families.

    Args:
        variants: The variants, without the baseline.
        scores: Their scores; None without a classifier, and then the columns that need labels are not there.
        calibration: Which images fitted and scored: `half`, `same`, `split:NAME`, `other`, or nothing.
        e_values: Give e-values: images came in random order.
        features: What they do to the pooled feature; None where it cannot be read, and then its columns are empty.
    """
    cells = _moved(features, len(variants))
    if scores is None:
        if features is None:
            raise RunError("a run without labels has nothing but features, and they are not there")
        counts = [{name: getattr(features, name)[row].item() for name in LABEL_FREE} for row in range(len(cells))]
        return [
            {**key, **counted, **moved}
            for key, counted, moved in zip(_keys(variants, calibration), counts, cells, strict=True)
        ]
    test_families = [(), *(_test_families(variant) for variant in variants)]
    tests = tests_of([(one.mask.mask.digest, one.ablation) for one in variants], test_families[1:])
    q_values = largest_q(tests, scores.mcnemar_p)
    e_bh_q = largest_q(tests, p_of_e(scores.log_e_value))
    if not e_values:
        scores = scores._replace(log_e_value=np.full_like(scores.log_e_value, np.nan))
        e_bh_q = np.full_like(e_bh_q, np.nan)
    rows: list[Row] = []
    for number, row in enumerate(_keys(variants, calibration)):
        row |= {column: getattr(scores, column)[number].item() for column in SCORE_COLUMNS}
        rows.append(row | {"bh_q": float(q_values[number]), "e_bh_q": float(e_bh_q[number])} | cells[number])
    return rows


def _keys(variants: Sequence[Variant], calibration: str) -> list[Row]:
    """Return the cells of each row that say what was scored, the baseline first."""
    test_families = [(), *(_test_families(variant) for variant in variants)]
    rows: list[Row] = []
    for number, key in enumerate([_BASELINE_KEY, *(_key(variant) for variant in variants)]):
        fitted = key["ablation"] in FITTED or _OWN_ORDER.search(str(key["mask"]))
        row: Row = {**key, "calibration": calibration if fitted else ""}
        row["test_family"] = FAMILIES_JOINED.join(test_families[number])
        row["heads_masked"] = variants[number - 1].mask.mask.count if number else 0
        rows.append(row)
    return rows


def _moved(features: "FeatureScores | None", variants: int) -> list[Row]:
    """Return the cells of each row that say how far its feature has moved."""
    if features is None:
        return [dict.fromkeys(FEATURE_COLUMNS, math.nan) for _ in range(1 + variants)]
    return [{name: getattr(features, name)[row].item() for name in FEATURE_COLUMNS} for row in range(1 + variants)]


FAMILIES_JOINED = " :: "
"""What stands between the test families of a mask: no spec holds two colons in a row, whatever its paths are."""

_BASELINE_KEY: Row = {"mask": NONE, "ablation": NONE, "draw": 0}


def _key(variant: Variant) -> Row:
    """Return the cells that name a variant in every table."""
    return {"mask": variant.mask.name, "ablation": variant.ablation, "draw": variant.draw}


def _test_families(variant: Variant) -> tuple[str, ...]:
    """Return the test families of a variant; of several draws the first alone is tested."""
    if variant.draw or not variant.mask.mask.count:
        return ()
    return tuple(family for family in variant.mask.test_families if not _NULL_DRAWS.search(family))


_OWN_ORDER = re.compile(rf"(^|[+:])grow:{CALIBRATION}:")
"""A mask of heads in the order of a score of the run's own calibration."""

_NULL_DRAWS = re.compile(r"(^|[+:])one-per-layer:\d+[-,/]")
"""A form of many `one-per-layer:` draws; a single draw joined to a sweep is no null."""


def families_in_words(variants: Sequence[Variant]) -> dict[str, str]:
    """Return which variants, counted from 0, belong to each test family, such as `{"each:layer": "0-11"}`."""
    members: dict[str, list[int]] = {}
    for number, variant in enumerate(variants):
        for family in _test_families(variant):
            members.setdefault(family, []).append(number)
    return {family: ranges(numbers) for family, numbers in members.items()}


def tests_of(variants: Sequence[tuple[str, str]], test_families: Sequence[Sequence[str]]) -> Tests:
    """Return the tests of each family: within one, variants of the same heads are one test.

    Args:
        variants: Of each variant the digest of its heads and its ablation.
        test_families: Its test families.
    """
    found: Tests = {}
    for number, ((digest, ablation), families) in enumerate(zip(variants, test_families, strict=True), start=1):
        for family in families:
            found.setdefault((family, ablation), {}).setdefault(digest, []).append(number)
    return found


def largest_q(tests: Tests, p_values: FloatArray) -> FloatArray:
    """Return Benjamini-Hochberg's q per row, `[1 + masks]`: the largest over its test families, NaN without one."""
    largest = np.full(len(p_values), np.nan)
    for of_family in tests.values():
        q_values = bh_q([p_values[rows].max() for rows in of_family.values()])
        for rows, q in zip(of_family.values(), q_values, strict=True):
            largest[rows] = np.fmax(largest[rows], q)
    return largest


def group_arrays(
    rows: Sequence[Row], scores: PairedScores | None, features: "FeatureScores | None" = None
) -> dict[str, NDArray[Any]]:
    """Return the arrays of `groups.npz`: what each row of `masks.csv` scores on each of 64 groups of images."""
    arrays = {
        "mask": np.array([str(row["mask"]) for row in rows]),
        "ablation": np.array([str(row["ablation"]) for row in rows]),
        "draw": np.array([int(row["draw"]) for row in rows], dtype=np.int64),
    }
    if scores is not None:
        arrays |= {"images": scores.group_images, "top1_count": scores.group_top1_count, "nll": scores.group_nll}
    if features is not None:
        arrays |= {
            "feature_images": features.group_images,
            "feature_cosine": features.group_cosine,
            "feature_distance": features.group_distance,
        }
    return arrays


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
    for number, key in enumerate([_BASELINE_KEY, *(_key(variant) for variant in variants)]):
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
    write_text(path, json.dumps({"schema": SCHEMA, **data}, indent=1) + "\n")


def _is_nan(cell: Cell) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    write_text(directory / "run.json", json.dumps({"schema": SCHEMA, **record}, indent=1, default=str) + "\n")


def write_pruned(directory: Path, record: Mapping[str, Any]) -> None:
    """Write `pruned.json`."""
    write_text(directory / PRUNED, json.dumps({"schema": SCHEMA, **record}, indent=1) + "\n")


# -- what describes heads: `heads.csv`, `heads_change.csv`, and arrays as npz ------------------------------------------


def head_rows(heads_per_layer: Sequence[int], models: Mapping[str, Columns]) -> list[Row]:
    """Return a row per mask, layer and head.

    Args:
        heads_per_layer: Heads of each layer.
        models: By the mask's name, `none` for the baseline, columns with one entry per head in the order of
            (layer, head).
    """
    heads = [(layer, head) for layer, count in enumerate(heads_per_layer) for head in range(count)]
    rows: list[Row] = []
    for name, columns in models.items():
        for (layer, head), cells in zip(heads, column_rows(columns), strict=True):
            rows.append({"mask": name, "layer": layer, "head": head, **cells})
    return rows


def column_rows(columns: Columns) -> list[Row]:
    """Return the rows of a table that is given by column."""
    cells = [values.tolist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write arrays as a compressed npz file with the version of its `schema`, in one step."""
    out, content = io.BytesIO(), {"schema": np.asarray(SCHEMA, dtype=np.int64), **dict[str, Any](arrays)}
    np.savez_compressed(out, **content)
    write_bytes(path, out.getvalue())
