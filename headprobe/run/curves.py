"""Heads removed in an order: `curves.csv`, which follows from the masks of a run and `groups.npz`.

An order is a curve of `masks.json` whose masks are nested: each takes away all that the smaller ones do. It does not
matter which clause of the mask language they come from.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from scipy import stats

from headprobe.masks.clauses import HEADS_MASKED
from headprobe.metrics.accuracy.agreement import mean_of_sums
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.ablations import images_of
from headprobe.run.load import Cell, Row, RunFiles
from headprobe.text import counted

FEWEST_FOR_BAND = 10
"""With fewer random orders there is no band, but the smallest and the largest of them."""

OVER_IMAGES, ONE_MORE_ORDER, RANGE = "images", "one more order", "range of "
"""What the limits of a row are; a range says more behind these words."""

FEATURES = ("feature_cosine", "feature_distance")
"""Columns of a mask's feature against the unmasked model's; runs of before have none."""

_RANDOM = re.compile(r"(.*)random_seed_\d+")


class Order(NamedTuple):
    """Nested masks under one ablation, by the number of heads they take away; masks of no head are left out."""

    name: str  #: the curve in `masks.json`
    ablation: str
    counts: IntArray  #: heads removed at each point, `[points]`, ascending
    lines: list[list[int]]  #: rows of `masks.csv` of each point, one for each draw of the ablation

    @property
    def random(self) -> str | None:
        """The name of all random orders beside the same fixed clauses; None for an order that is not random."""
        found = _RANDOM.fullmatch(self.name)
        return f"{found[1]}random" if found else None


def orders_of(run: RunFiles) -> list[Order]:
    """Return the orders of a run by ablation, those that are not random first.

    They have two points or more, but for random draws of a single size, which join other draws.
    """
    points: dict[tuple[str, str], dict[int, dict[str, list[int]]]] = {}
    for number, row in enumerate(run.masks[1:], start=1):
        mask, count = str(row["mask"]), int(row["heads_masked"])
        curve = run.curves[mask][0]
        if count and curve != HEADS_MASKED:
            masks = points.setdefault((str(row["ablation"]), curve), {}).setdefault(count, {})
            masks.setdefault(mask, []).append(number)
    found = []
    for (ablation, curve), by_count in points.items():
        counts = sorted(by_count)
        lines = [next(iter(by_count[count].values())) for count in counts]  # nested masks of a size are the same
        order = Order(curve, ablation, np.array(counts), lines)
        if order.random or (len(counts) > 1 and _nested(run, [mask for masks in by_count.values() for mask in masks])):
            found.append(order)
    kinds = list(dict.fromkeys(order.ablation for order in found))
    return sorted(found, key=lambda order: (kinds.index(order.ablation), order.random is not None))


def random_orders(orders: Sequence[Order]) -> list[list[Order]]:
    """Return the random orders that belong together: those of one ablation beside the same fixed clauses."""
    found: dict[tuple[str, str], list[Order]] = {}
    for order in orders:
        if order.random:
            found.setdefault((order.ablation, order.random), []).append(order)
    return list(found.values())


def _nested(run: RunFiles, masks: Sequence[str]) -> bool:
    sets = sorted((frozenset(run.heads[mask]) for mask in masks), key=len)
    return all(smaller <= larger for smaller, larger in pairwise(sets))


class GroupSums(NamedTuple):
    """What the rows of `masks.csv` score on each group of images."""

    images: IntArray  #: `[groups]`
    right: IntArray  #: right answers, `[1 + variants, groups]`; none without labels
    nll: FloatArray  #: sums of the NLL, `[1 + variants, groups]`; none without labels
    read: float  #: share of the images that could be read: only these are in groups
    moved: dict[str, FloatArray]  #: sums of `FEATURES`, `[1 + variants, groups]`; none where there is no feature

    @classmethod
    def of(cls, run: RunFiles) -> Self:
        """Return those of a run."""
        arrays = run.arrays("groups.npz")
        images = images_of(arrays)
        read = float(images.sum() / max(int(run.masks[0]["images"]), 1))
        nothing = np.zeros((len(run.masks), 0))
        moved = {name: arrays[name] for name in FEATURES if name in arrays}
        right, nll = arrays.get("top1_count", nothing.astype(np.int64)), arrays.get("nll", nothing)
        return cls(images, right, nll, read, moved)


def curve_rows(run: RunFiles) -> list[Row]:
    """Return the rows of `curves.csv`: what each order costs at each number of heads, and where random orders lie.

    There are none where no order has two points.
    """
    orders = orders_of(run)
    if all(len(order.counts) < 2 for order in orders):
        return []
    sums = GroupSums.of(run)
    single = [_points(run, order, sums) for order in orders if len(order.counts) > 1 and not order.random]
    several = [_random_points(run, members) for members in random_orders(orders)]
    seeds = [_points(run, order, sums) for order in orders if len(order.counts) > 1 and order.random]
    kinds = list(dict.fromkeys(order.ablation for order in orders))
    found = [row for rows in (*single, *several, *seeds) for row in rows]
    return sorted(found, key=lambda row: kinds.index(str(row["ablation"])))


def _points(run: RunFiles, order: Order, sums: GroupSums) -> list[Row]:
    """Return the rows of one order: of several draws of the ablation their mean."""
    found = []
    for place, lines in enumerate(order.lines):
        key = _key(order.name, order, int(order.counts[place]), 1, run)
        if run.labelled:
            names = ("top1", "drop_pp", "nll", "nll_rise")
            top1, drop, nll, rise = (mean_of_draws(run, lines, name) for name in names)
            drops, rises = _limits(run, lines, sums)
            key |= _cells(top1, (drop, *drops), nll, (rise, *rises))
        found.append(key | _moved(run, lines, sums) | {"interval": OVER_IMAGES})
    return found


def features_of(run: RunFiles) -> list[str]:
    """Return the columns of features that a run has."""
    return [name for name in FEATURES if name in run.masks[0]]


def _moved(run: RunFiles, lines: list[int], sums: GroupSums) -> Row:
    """Return how far a point's feature has moved, with limits: of the mean of several draws by the jackknife."""
    cells: Row = {}
    for name in features_of(run):
        cells[name] = mean_of_draws(run, lines, name)
        ends: tuple[Cell, Cell] = (math.nan, math.nan)
        if len(lines) == 1:
            ends = run.masks[lines[0]][f"{name}_low"], run.masks[lines[0]][f"{name}_high"]
        elif name in sums.moved:
            ends = mean_of_sums(sums.moved[name][lines].mean(axis=0), sums.images)[1:]
        cells |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return cells


def _key(name: str, order: Order, count: int, orders: int, run: RunFiles) -> Row:
    cells: Row = {"order": name, "ablation": order.ablation, "heads_removed": count, "orders": orders}
    return cells | {"images": run.masks[0]["images"]}


def _cells(top1: float, drop: tuple[float, float, float], nll: float, rise: tuple[float, float, float]) -> Row:
    """Return what a point costs; the drop and the rise with their limits."""
    drops = dict(zip(("drop_pp", "drop_low_pp", "drop_high_pp"), drop, strict=True))
    rises = dict(zip(("nll_rise", "nll_rise_low", "nll_rise_high"), rise, strict=True))
    return {"top1": top1, **drops, "nll": nll, **rises}


def mean_of_draws(run: RunFiles, lines: Sequence[int], column: str) -> float:
    """Return the mean of a column of `masks.csv` over some of its rows."""
    return float(np.mean([float(run.masks[line][column]) for line in lines]))


def _limits(run: RunFiles, lines: list[int], sums: GroupSums) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits of a point's drop and NLL rise: of the mean of several draws by the jackknife."""
    if len(lines) == 1:
        row = run.masks[lines[0]]
        low, high, rise_low, rise_high = (
            float(row[name]) for name in ("drop_low_pp", "drop_high_pp", "nll_rise_low", "nll_rise_high")
        )
        return (low, high), (rise_low, rise_high)
    lost = 100 * sums.read * (sums.right[0] - sums.right[lines].mean(axis=0))
    with np.errstate(invalid="ignore"):  # infinite minus infinite NLL: a rise that is not defined
        rise = sums.nll[lines].mean(axis=0) - sums.nll[0]
    return mean_of_sums(lost, sums.images)[1:], mean_of_sums(rise, sums.images)[1:]


def _random_points(run: RunFiles, members: Sequence[Order]) -> list[Row]:
    """Return the mean of random orders at each number of heads that several have, and where one more would lie."""
    found = []
    for count in sorted({count for order in members for count in order.counts.tolist()}):
        lines = [order.lines[order.counts.tolist().index(count)] for order in members if count in order.counts]
        if len(lines) > 1:
            key = _key(str(members[0].random), members[0], count, len(lines), run)
            cells = _mean_cells(run, lines) if run.labelled else {}
            for name, (least, most) in {"feature_cosine": (-1.0, 1.0), "feature_distance": (0.0, np.inf)}.items():
                if name in features_of(run):
                    cells |= _with_ends(name, one_more(_values(run, lines, name), least, most))
            found.append(key | cells | {"interval": _about_limits(len(lines))})
    return found


def _values(run: RunFiles, lines: Sequence[Sequence[int]], column: str) -> FloatArray:
    """Return a column's value under each order, of several draws their mean, `[orders]`."""
    return np.array([mean_of_draws(run, own, column) for own in lines])


def _mean_cells(run: RunFiles, lines: Sequence[Sequence[int]]) -> Row:
    """Return what a point of random orders costs, and where one more order would lie."""
    top1, nll = float(run.masks[0]["top1"]), float(run.masks[0]["nll"])
    drops, rises = _values(run, lines, "drop_pp"), _values(run, lines, "nll_rise")
    drop, rise = one_more(drops, 100 * (top1 - 1), 100 * top1), one_more(rises, -nll)
    return _cells(top1 - drop[0] / 100, drop, nll + rise[0], rise)


def _with_ends(name: str, values: tuple[float, float, float]) -> Row:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _about_limits(orders: int) -> str:
    if orders >= FEWEST_FOR_BAND:
        return ONE_MORE_ORDER
    return f"{RANGE}{counted(orders, 'order')}: a band needs {FEWEST_FOR_BAND}"


def one_more(values: FloatArray, least: float = -np.inf, most: float = np.inf) -> tuple[float, float, float]:
    """Return the mean of random orders and where one more would lie with 95%: mean +- t s sqrt(1 + 1 / S).

    Args:
        values: One of each order, `[orders]`; of fewer than `FEWEST_FOR_BAND` the limits are the smallest and largest.
        least: The smallest that a value can be.
        most: The largest.

    Source: Student's prediction interval for one more normal value, Hahn, 1970, Journal of Quality Technology 2, 115.
    """
    count, mean = len(values), float(values.mean())
    if not np.isfinite(values).all():
        return mean, float("nan"), float("nan")
    if count < FEWEST_FOR_BAND:
        return mean, float(values.min()), float(values.max())
    reach = float(stats.t.isf(0.025, count - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / count))
    return mean, max(mean - reach, least), min(mean + reach, most)
