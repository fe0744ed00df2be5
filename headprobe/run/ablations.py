"""Kinds of ablation against each other: `ablations.csv`, which follows from `masks.csv` and `groups.npz`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.masks.ablations import FITTED
from headprobe.metrics.accuracy.agreement import FEWEST_ORDERED, mean_of_sums, rank_agreement
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.load import Row
from headprobe.run.results import FAMILIES_JOINED

NLL_RISE, DROP_PP = "nll_rise", "drop_pp"
MOVED = "feature_distance"
"""What masks cost without labels; with labels the other two are compared."""

_NESTED = re.compile(r"(^|[+:])grow:")
"""Forms of nested masks, which cost more the larger they are, whatever the ablation: `orders.csv` compares those."""

Sums = dict[str, FloatArray]
"""By quantity or ablation, sums over the images of each group: `[masks, groups]`, or `[groups]` of one mask."""


def ablation_rows(rows: Sequence[Row], groups: Mapping[str, NDArray[Any]], calibration: str = "") -> list[Row]:
    """Return the rows of `ablations.csv`: for each two ablations, whether masks cost the same under both.

    Compared are the masks of one test family, such as `each:head`, under a row's two ablations. Where an ablation
    draws, each mask counts with the mean of its draws.

    Args:
        rows: Rows of `masks.csv`, the baseline first.
        groups: The arrays of `groups.npz`, in the same order.
        calibration: Which images fitted the constants: `half`, `same`, `split:NAME`, `other`; nothing where nothing
            was fitted.
    """
    kinds = list(dict.fromkeys(str(row["ablation"]) for row in rows[1:]))
    of_variants = sums_by_variant(rows, groups) if len(kinds) > 1 else {}
    images = images_of(groups)
    draws = {kind: 1 + max(int(row["draw"]) for row in rows if row["ablation"] == kind) for kind in kinds}
    found: list[Row] = []
    families = _families(rows) if of_variants else {}
    for (family, members), (first, second) in product(families.items(), combinations(kinds, 2)):
        masks = [mask for mask in members.get(first, ()) if mask in members.get(second, ())]
        if len(masks) < FEWEST_ORDERED:  # enough of them to be ordered
            continue
        of_kinds = {kind: _stacked(of_variants[kind, mask] for mask in masks) for kind in (first, second)}
        for quantity in of_kinds[first]:
            key: Row = {"test_family": family, "ablation_a": first, "ablation_b": second, "quantity": quantity}
            sums = {kind: of_kinds[kind][quantity] for kind in (first, second)}
            fitted = calibration if {first, second} & FITTED else ""
            found.append(key | _compared(sums, draws, images) | {"calibration": fitted})
    return found


def _families(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, None]]]:
    """Return the masks of each test family that is compared, by ablation, in their order."""
    members: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows[1:]:
        for family in str(row["test_family"]).split(FAMILIES_JOINED) if row["test_family"] else ():
            of_kind = members.setdefault(family, {}).setdefault(str(row["ablation"]), {})
            of_kind[str(row["mask"])] = None
    return {family: of_kinds for family, of_kinds in members.items() if not _NESTED.search(family)}


def sums_by_variant(rows: Sequence[Row], groups: Mapping[str, NDArray[Any]]) -> dict[tuple[str, str], Sums]:
    """Return for each ablation and mask its quantities' sums over draws and over the images of each group."""
    sums = rises_and_drops(groups)
    places: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows[1:], start=1):
        places.setdefault((str(row["ablation"]), str(row["mask"])), []).append(number)
    return {
        key: {quantity: of_rows[draws].sum(axis=0) for quantity, of_rows in sums.items()}
        for key, draws in places.items()
    }


def rises_and_drops(groups: Mapping[str, NDArray[Any]]) -> Sums:
    """Return the sums of each quantity over the images of each group, `[rows, groups]`, from `groups.npz`.

    They are NLL rise and drop; of a run without labels how far the feature moves.
    """
    if "nll" not in groups:
        return {MOVED: np.asarray(groups[MOVED], dtype=np.float64)}
    with np.errstate(invalid="ignore"):  # infinite minus infinite NLL: a rise that is not defined
        rises = np.asarray(groups["nll"] - groups["nll"][0], dtype=np.float64)
    return {NLL_RISE: rises, DROP_PP: 100.0 * (groups["top1_count"][0] - groups["top1_count"])}


def images_of(groups: Mapping[str, NDArray[Any]]) -> IntArray:
    """Return the images of each group, `[groups]`, that the quantities are sums over."""
    return np.asarray(groups["images"] if "images" in groups else groups["feature_images"][0], dtype=np.int64)


def main_quantity(quantities: Iterable[object]) -> str:
    """Return what a table is read for first: the NLL rise, or without labels how far the feature moves."""
    return NLL_RISE if NLL_RISE in quantities else MOVED


def _stacked(of_masks: Iterable[Sums]) -> Sums:
    listed = list(of_masks)
    return {quantity: np.stack([sums[quantity] for sums in listed]) for quantity in listed[0]}


def _compared(sums: Sums, draws: Mapping[str, int], images: NDArray[np.int64]) -> Row:
    """Return the cells that compare two ablations.

    Args:
        sums: By ablation the sums over its draws, `[masks, groups]`.
        draws: How many draws each ablation has.
        images: Images of each group, `[groups]`.
    """
    (one, first), (other, second) = sums.items()
    cells: Row = {"masks": len(first), "images": int(images.sum())}
    # Ranks of sums over draws, which are whole numbers of lost answers: rounded means would break ties by chance.
    cells |= rank_agreement(first, second, images)._asdict()
    first, second = first / draws[one], second / draws[other]
    totals = {"sum_a": first, "sum_b": second, "b_minus_a": second - first}
    for name, of_masks in totals.items():
        estimate, low, high = mean_of_sums(of_masks.sum(axis=0), images)
        cells |= {name: estimate, f"{name}_low": low, f"{name}_high": high}
    return cells


def with_limits(row: Row, name: str, form: str) -> str:
    """Return a number with its limits as text, where it has any: `+0.93 [+0.81, +0.97]`."""
    value, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "not defined"
    return f"{value:{form}}" if math.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"
