"""The tables of a comparison: `compare.csv`, a row per mask, and `compare_ranks.csv`, a row per form of masks."""

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.agreement import (
    FEWEST_ORDERED,
    mean_of_sums,
    rank_agreement,
    rank_agreement_of_samples,
    reliability,
)
from headprobe.metrics.accuracy.two_runs import Differences, paired_differences, two_sample_differences
from headprobe.metrics.arrays import FloatArray
from headprobe.run.comparison.pairs import LIMITS, PAIRED, Key, Measured, Pair, measured, pair_of
from headprobe.run.load import Row, RunFiles
from headprobe.run.results import FAMILIES_JOINED, largest_q, tests_of

LEVEL = 0.05
"""Masks with a q of at most this count as differing."""

ROUNDING = 1e-6
"""Means that differ by less, in nats or points, are equal: other hardware or batches change the last bits of logits."""

_NO_ORDER = re.compile(r"(^|[+:])(grow:|one-per-layer:)")
"""Masks whose ranks say nothing: nested ones cost more the larger they are, nulls are others' yardstick."""


def pairs_of(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Pair]:
    """Return every two of the runs, the earlier first.

    Raises:
        UsageError: Two of them cannot be compared, or one is not finished.
    """
    if len(runs) < 2:
        raise UsageError(f"a comparison needs two runs or more, got {len(runs)}")
    found = [measured(run, name) for run, name in zip(runs, names, strict=True)]
    return [pair_of(*two) for two in combinations(found, 2)]


def mask_rows(pair: Pair) -> list[Row]:
    """Return the rows of `compare.csv` of two runs: each mask under each ablation by each quantity.

    Benjamini-Hochberg's q is taken as in `masks.csv`: within each test family of either run, under one ablation.
    """
    families = [_families(pair, key) for key in pair.keys]
    tests = tests_of([(_digest(pair, key), key[1]) for key in pair.keys], families)
    rows: list[Row] = []
    for quantity in pair.quantities:
        sides = [_values(own, pair.keys, quantity) for own in (pair.first, pair.second)]
        tested = _tested(pair, quantity)
        q_values = largest_q(tests, np.concatenate([[np.nan], tested.p]))[1:]  # row 0 is a baseline's
        for place, (mask, ablation) in enumerate(pair.keys):
            row: Row = {**pair.names, "mask": mask, "ablation": ablation}
            row |= {"test_family": FAMILIES_JOINED.join(families[place])}
            row |= {"heads_masked": len(pair.first.run.heads[mask]), "quantity": quantity}
            for side, own, values in zip("ab", (pair.first, pair.second), sides, strict=True):
                row[f"draws_{side}"] = len(own.places[mask, ablation])
                for end, value in zip(("", "_low", "_high"), values[place], strict=True):
                    row[f"value_{side}{end}"] = float(value)
            row |= {"b_minus_a": number(row, "value_b") - number(row, "value_a")}
            row |= {"b_minus_a_low": float(tested.low[place]), "b_minus_a_high": float(tested.high[place])}
            rows.append(row | {"test": pair.test, "p": float(tested.p[place]), "bh_q": float(q_values[place])})
    return rows


def number(row: Row, name: str) -> float:
    """Return a number of a row."""
    return float(row[name])


def _families(pair: Pair, key: Key) -> tuple[str, ...]:
    """Return the test families of a mask in either run; only draw 0 is in any."""
    found: dict[str, None] = {}
    for own in (pair.first, pair.second):
        for place in own.places[key]:
            family = str(own.run.masks[place]["test_family"])
            found |= dict.fromkeys(family.split(FAMILIES_JOINED) if family else ())
    return tuple(found)


def _digest(pair: Pair, key: Key) -> str:
    """Return what masks of the same heads have in common."""
    return str(sorted(pair.first.run.heads[key[0]]))


def _values(own: Measured, keys: Sequence[Key], quantity: str) -> list[tuple[float, float, float]]:
    """Return what each mask costs in a run, with limits: as in `masks.csv`, of several draws their mean."""
    columns = (quantity, *LIMITS[quantity])
    found: list[tuple[float, float, float]] = []
    for key in keys:
        draws = [own.run.masks[place] for place in own.places[key]]
        value, low, high = (float(draws[0][column]) for column in columns)
        if len(draws) > 1:
            value, low, high = float(np.mean([float(row[quantity]) for row in draws])), np.nan, np.nan
            if quantity in own.sums:
                sums = own.sums_of([key], quantity)[0] / len(draws)
                value, low, high = mean_of_sums(sums, own.counted[quantity])
        found.append((value, low, high))
    return found


def _tested(pair: Pair, quantity: str) -> Differences:
    """Return the differences of all masks, with the test that the images allow; NaN without sums by group."""
    sides = pair.first, pair.second
    if any(quantity not in own.sums for own in sides):
        return Differences(*np.full((4, len(pair.keys)), np.nan))
    means = [own.sums_of(pair.keys, quantity) / own.draws_of(pair.keys)[:, None] for own in sides]
    images = [own.counted[quantity] for own in sides]
    if pair.test == PAIRED and not np.array_equal(
        images[0], images[1]
    ):  # features of some images are not finite in one
        return Differences(*np.full((4, len(pair.keys)), np.nan))
    with np.errstate(invalid="ignore"):  # a mask whose NLL is infinite has no difference
        if pair.test == PAIRED:
            found = paired_differences(means[0], means[1], images[0])
        else:
            found = two_sample_differences(means[0], images[0], means[1], images[1])
    return found._replace(p=np.where(np.abs(found.b_minus_a) < ROUNDING, 1.0, found.p))


# -- do masks rank alike? ----------------------------------------------------------------------------------------------


def rank_rows(pair: Pair, masks: Sequence[Row]) -> list[Row]:
    """Return the rows of `compare_ranks.csv` of two runs: whether the masks of a form rank alike in both.

    Args:
        pair: The runs.
        masks: Their rows of `compare.csv`.
    """
    members: dict[tuple[str, str], list[Key]] = {}
    for mask, ablation in pair.keys:
        for family in _families(pair, (mask, ablation)) or ("",):
            if not _NO_ORDER.search(family or mask) and pair.first.run.heads[mask]:
                members.setdefault((family, ablation), []).append((mask, ablation))
    of_masks = {(str(row["quantity"]), str(row["mask"]), str(row["ablation"])): row for row in masks}
    rows: list[Row] = []
    for (family, ablation), keys in members.items():
        if len(keys) < FEWEST_ORDERED:
            continue
        for quantity in pair.quantities:
            q_values = [number(of_masks[quantity, *key], "bh_q") for key in keys]
            row: Row = {**pair.names, "test_family": family, "ablation": ablation, "quantity": quantity}
            row |= {"masks": len(keys), "masks_differing": sum(q <= LEVEL for q in q_values)}
            if np.isnan(q_values).all():  # nothing was tested together
                row["masks_differing"] = float("nan")
            rows.append(row | _ranks(pair, keys, quantity))
    return rows


def _ranks(pair: Pair, keys: Sequence[Key], quantity: str) -> Row:
    """Return the cells about the order of masks in two runs."""
    sides = pair.first, pair.second
    row: Row = {f"images_{side}": int(own.images.sum()) for side, own in zip("ab", sides, strict=True)}
    row["test"] = pair.test
    if any(quantity not in own.sums for own in sides):
        sums = [np.array([_values(own, keys, quantity)])[0, :, :1] for own in sides]  # [masks, 1]: no interval
        one_group = np.ones(1, dtype=np.int64)
        return (
            row | rank_agreement(sums[0], sums[1], one_group)._asdict() | _reliable(np.nan, np.nan, independent=False)
        )
    # Ranks of sums over draws, which are whole numbers of lost answers: rounded means would break ties by chance.
    first, second = (_comparable_sums(own, keys, quantity) for own in sides)
    images, other_images = (own.counted[quantity] for own in sides)
    if pair.test == PAIRED and np.array_equal(images, other_images):
        agreement = rank_agreement(first, second, images)
    else:
        agreement = rank_agreement_of_samples(first, images, second, other_images)
    one, other = reliability(first, images).reliability, reliability(second, other_images).reliability
    return row | agreement._asdict() | _reliable(one, other, independent=pair.test != PAIRED)


def _comparable_sums(own: Measured, keys: Sequence[Key], quantity: str) -> FloatArray:
    """Return sums `[masks, groups]` whose order is that of the means: of as many draws each, else means."""
    draws = own.draws_of(keys)
    sums = own.sums_of(keys, quantity)
    return sums if (draws == draws[0]).all() else sums / draws[:, None]


def _reliable(one: float, other: float, independent: bool) -> Row:
    """Return the reliabilities of both orders, and the correlation that two equal true orders would reach.

    Runs on the same images share their noise and may agree more than that: they have no such ceiling.
    """
    ceiling = float(np.sqrt(one * other)) if independent and one > 0 and other > 0 else float("nan")
    return {"reliability_a": one, "reliability_b": other, "ceiling": ceiling}


def first_family(rows: Sequence[Row]) -> str:
    """Return the form of masks that figures show first: single heads, layers, else the largest."""
    masks: dict[str, set[str]] = {}
    for row in rows:
        for family in str(row["test_family"]).split(FAMILIES_JOINED):
            masks.setdefault(family, set()).add(str(row["mask"]))
    usual = [family for family in ("each:head", "each:layer") if family in masks]
    return usual[0] if usual else max(masks, key=lambda family: (bool(family), len(masks[family])))
