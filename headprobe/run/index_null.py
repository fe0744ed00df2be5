"""The same head index in every layer against one random head of each layer: `index_null.csv`.

Heads of a layer have no order: permute them, and the model computes the same. So the heads of an index are no different
from one head of each layer drawn at random, unless something ties them together. A draw per layer is the null.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from headprobe.masks.pieces import number_text
from headprobe.metrics.accuracy.paired_tests import bh_q
from headprobe.metrics.arrays import FloatArray
from headprobe.run.load import Row, RunFiles

FEWEST_DRAWS = 99
"""With fewer draws than these there is no p: it could not be below 0.02."""

QUANTITIES, WITHOUT_LABELS = ("drop_pp", "nll_rise"), ("feature_distance",)
"""What an index and the draws are compared by: with labels, and without."""

_INDEX = re.compile(r"index:\d+")
_DRAW = re.compile(r"one-per-layer:(\d+)(:[\d,/-]+)?")


class Null(NamedTuple):
    """An index under one ablation beside its null."""

    mask: str
    ablation: str
    layers: str  #: those that have the index, and that the draws are from
    value: Mapping[str, float]  #: of the index, by quantity
    draws: Mapping[str, FloatArray]  #: of each draw, by quantity: `[draws]`


def quantities_of(run: RunFiles) -> tuple[str, ...]:
    """Return what a run's indices are compared by."""
    return QUANTITIES if run.labelled else WITHOUT_LABELS


def nulls_of(run: RunFiles) -> list[Null]:
    """Return each index of a run beside the draws from its layers; none where no index has a draw."""
    layers = {mask: number_text({layer for layer, _ in heads}) for mask, heads in run.heads.items()}
    draws: dict[str, dict[int, str]] = {}  # of a seed the first: `one-per-layer:5:0-11` may be `one-per-layer:5`
    for mask in run.heads:
        if drawn := _DRAW.fullmatch(mask):
            draws.setdefault(layers[mask], {}).setdefault(int(drawn[1]), mask)
    indices = [mask for mask in run.heads if _INDEX.fullmatch(mask)]
    if not any(layers[mask] in draws for mask in indices):
        return []
    values, quantities = _values(run), quantities_of(run)
    found = []
    for ablation in dict.fromkeys(str(row["ablation"]) for row in run.masks[1:]):
        own = {place: [one for one in of.values() if (ablation, one) in values] for place, of in draws.items()}
        if not any(own.values()):  # of a run whose draws are scored under another ablation alone
            continue
        for mask in indices:
            if (ablation, mask) not in values:
                continue
            drawn_by = [values[ablation, one] for one in own.get(layers[mask], ())]
            drawn_values = {name: np.array([one[name] for one in drawn_by], dtype=np.float64) for name in quantities}
            found.append(Null(mask, ablation, layers[mask], values[ablation, mask], drawn_values))
    return found


def _values(run: RunFiles) -> dict[tuple[str, str], dict[str, float]]:
    """Return by ablation and mask the mean of each quantity over the ablation's draws.

    Masks of the same heads share one: rounding may differ between them, and a draw of the index's own heads is a tie.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in run.masks[1:]:
        lines.setdefault((str(row["ablation"]), str(row["mask"])), []).append(row)
    shared: dict[tuple[str, frozenset[tuple[int, int]]], dict[str, float]] = {}
    found = {}
    for (ablation, mask), rows in lines.items():
        own = {name: float(np.mean([float(row[name]) for row in rows])) for name in quantities_of(run)}
        found[ablation, mask] = shared.setdefault((ablation, frozenset(run.heads[mask])), own)
    return found


def null_rows(run: RunFiles) -> list[Row]:
    """Return the rows of `index_null.csv`: a row for each index, ablation and quantity.

    Benjamini-Hochberg's q is taken over the indices of an ablation.
    """
    nulls, quantities = nulls_of(run), quantities_of(run)
    rows = [_row(null, quantity) for null in nulls for quantity in quantities]
    for ablation in dict.fromkeys(null.ablation for null in nulls):
        for quantity in quantities:
            tested = [row for row in rows if (row["ablation"], row["quantity"]) == (ablation, quantity)]
            for row, q in zip(tested, bh_q([float(row["p"]) for row in tested]), strict=True):
                row["bh_q"] = float(q)
    return rows


def _row(null: Null, quantity: str) -> Row:
    value, draws = null.value[quantity], null.draws[quantity]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist() if len(draws) else [float("nan")] * 2
    return {
        "mask": null.mask,
        "ablation": null.ablation,
        "quantity": quantity,
        "layers": null.layers,
        "value": value,
        "draws": len(draws),
        "draws_mean": float(draws.mean()) if len(draws) else float("nan"),
        "draws_low": low,
        "draws_high": high,
        "percentile": percentile(value, draws),
        "p": p_of_draws(value, draws) if len(draws) >= FEWEST_DRAWS else float("nan"),
        "p_smallest": smallest_p(len(draws)),
    }


def percentile(value: float, draws: FloatArray) -> float:
    """Return how many percent of the draws are smaller; equal ones count half."""
    if not len(draws) or not np.isfinite([value, *draws]).all():
        return float("nan")
    smaller, equal = np.count_nonzero(draws < value), np.count_nonzero(draws == value)
    return float(100 * (smaller + equal / 2) / len(draws))


def p_of_draws(value: float, draws: FloatArray) -> float:
    """Return the two-sided p of a value that is one more draw if nothing sets it apart.

    (1 + draws at least as extreme) / (1 + draws): extreme is how far the rank among all, the value included, is from
    the middle one; equal values share their mean rank. Each of them is as likely to be the most extreme, so the p is
    exact for any distribution and any number of draws. It goes with the percentile: distances from the mean would not,
    since drops have a long tail on one side and cannot be far on the other.

    Source: Phipson and Smyth, 2010, Statistical Applications in Genetics and Molecular Biology 9, 39.
    """
    every = np.append(draws, value)
    if not np.isfinite(every).all():
        return float("nan")
    from_middle = np.abs(stats.rankdata(every) - (len(every) + 1) / 2)  # halves are exact
    return float(np.count_nonzero(from_middle >= from_middle[-1]) / len(every))


def smallest_p(draws: int) -> float:
    """Return the p of a value beyond all draws: the draw at the other end is as extreme."""
    return min(1.0, 2 / (draws + 1)) if draws else float("nan")


def lacking(rows: Sequence[Row], layers: int) -> list[str]:
    """Return the mask specs that give every index of a table enough draws, for a model with so many layers."""
    few = dict.fromkeys(str(row["layers"]) for row in rows if int(row["draws"]) < FEWEST_DRAWS)
    every = number_text(range(layers))
    return [f"one-per-layer:0-{FEWEST_DRAWS - 1}" + (f":{own}" if own != every else "") for own in few]
