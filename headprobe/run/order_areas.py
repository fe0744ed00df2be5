"""How good orders of removal are: `orders.csv`, the area under each curve and how many heads can go."""

from collections.abc import Sequence

import numpy as np

from headprobe.metrics.accuracy.agreement import mean_of_sums
from headprobe.metrics.accuracy.jackknife import images_and_draws_interval, leave_one_out
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.curves import RANGE, GroupSums, Order, curve_rows, orders_of, random_orders
from headprobe.run.load import Row, RunFiles

DROPS = (1, 5)
"""For these drops, in percentage points, the table says how many heads can go."""

FEWEST_ORDERS = 5
"""With fewer random orders a difference from their mean has no interval: of two it covered 0.84 to 0.93."""

ROUNDING = 1e-9
"""Percentage points: means over orders are not exact."""

Interval = tuple[float, float, float]
"""An estimate with its limits."""

_UNDEFINED: Interval = (float("nan"), float("nan"), float("nan"))


def order_rows(run: RunFiles) -> list[Row]:
    """Return the rows of `orders.csv`: one for each order of two points or more, and for the mean of random orders."""
    orders = [order for order in orders_of(run) if len(order.counts) > 1]
    if not orders:
        return []
    sums = GroupSums.of(run)
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in curve_rows(run):
        curves.setdefault((str(row["order"]), str(row["ablation"])), []).append(row)
    groups = {(str(own[0].random), own[0].ablation): own for own in random_orders(orders) if len(own) > 1}

    found = {}
    for order in orders:
        beside = [] if order.random else _random_beside(order, groups)
        key = order.name, order.ablation
        found[key] = _row(curves[key], _areas(order, beside, sums))
    for key, members in groups.items():
        found[key] = _row(curves[key], _mean_areas(members, sums))
    return [found[key] for key in curves if key in found]  # in the order of curves.csv


TOP1, COSINE = "", "feature_"
"""What columns of areas begin with: under the accuracy, and under the mean cosine of the feature."""


def _curves(sums: GroupSums) -> dict[str, FloatArray]:
    """Return the heights of the curves that a run has, as sums over groups, `[1 + variants, groups]`."""
    found = {TOP1: sums.read * sums.right.astype(np.float64)} if sums.right.shape[1] else {}
    if "feature_cosine" in sums.moved:
        found[COSINE] = sums.moved["feature_cosine"]
    return found


def _areas(order: Order, beside: Sequence[Order], sums: GroupSums) -> dict[str, Interval]:
    """Return the areas under an order's curves, and their differences from those of random orders."""
    found = {}
    for name, heights in _curves(sums).items():
        found[f"{name}area"] = _area(order, heights, sums)
        found[f"{name}minus_random"] = _minus_random(order, beside, heights, sums)
    return found


def _mean_areas(members: Sequence[Order], sums: GroupSums) -> dict[str, Interval]:
    """Return the mean areas of random orders, which are compared with nothing."""
    found: dict[str, Interval] = {}
    for name, heights in _curves(sums).items():
        found |= {f"{name}area": _mean_area(members, heights, sums), f"{name}minus_random": _UNDEFINED}
    return found


def _row(points: Sequence[Row], areas: dict[str, Interval]) -> Row:
    cells: Row = {name: points[0][name] for name in ("order", "ablation")}
    cells |= {"orders": max(int(row["orders"]) for row in points), "counts": len(points)}
    cells["most_removed"] = points[-1]["heads_removed"]
    for name, values in areas.items():
        cells |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
    for most in DROPS if "drop_pp" in points[0] else ():
        cells |= removable(points, most)
    return cells


def removable(points: Sequence[Row], most: float) -> Row:
    """Return how many heads can go for a drop: by the points, and by the upper ends of their intervals."""
    name = f"removable_{most}pp"
    no_band = any(str(row["interval"]).startswith(RANGE) for row in points)
    surely = float("nan") if no_band else _before_first_above(points, "drop_high_pp", most)
    return {name: _before_first_above(points, "drop_pp", most), f"{name}_surely": surely}


def _before_first_above(points: Sequence[Row], column: str, most: float) -> int:
    """Return the last number of heads before the first that costs more: no larger one is looked at."""
    removed = 0
    for row in points:
        if not float(row[column]) <= most + ROUNDING:
            break
        removed = int(row["heads_removed"])
    return removed


# -- areas --


def area_weights(counts: IntArray) -> FloatArray:
    """Return what each point counts in the mean height of the straight lines through the points of a curve.

    Args:
        counts: Heads removed at each point, ascending from 0 on, `[points]`.
    """
    widths = np.diff(counts)
    return np.asarray((np.append(widths, 0) + np.append(0, widths)) / (2 * counts[-1]), dtype=np.float64)


def _by_group(order: Order, counts: IntArray, heights: FloatArray) -> FloatArray:
    """Return the area under an order's curve through 0 and these of its counts, as sums over groups, `[groups]`."""
    own = order.counts.tolist()
    points = [heights[order.lines[own.index(count)]].mean(axis=0) for count in counts.tolist()]
    weights = area_weights(np.append(0, counts))
    return np.asarray(weights @ np.stack([heights[0], *points]), dtype=np.float64)


def _area(order: Order, heights: FloatArray, sums: GroupSums) -> Interval:
    return _as_fraction(mean_of_sums(_by_group(order, order.counts, heights), sums.images))


def _as_fraction(found: Interval) -> Interval:
    """Return an area with its limits cut where no area can lie; a mean cosine could be below 0, hardly an area."""
    area, low, high = found
    return area, max(low, min(area, 0.0)), min(high, 1.0)


def _mean_area(members: Sequence[Order], heights: FloatArray, sums: GroupSums) -> Interval:
    """Return the mean area of random orders over the counts that all of them have."""
    common = _common(members)
    if not len(common):
        return _UNDEFINED
    return _as_fraction(_over_both(np.stack([_by_group(one, common, heights) for one in members]), sums))


def _minus_random(order: Order, beside: Sequence[Order], heights: FloatArray, sums: GroupSums) -> Interval:
    """Return how much larger an order's area is than the mean of random orders, over the counts that all have."""
    common = _common([order, *beside])
    if not beside or len(common) < 2:
        return _UNDEFINED
    own = _by_group(order, common, heights)
    return _over_both(own - np.stack([_by_group(one, common, heights) for one in beside]), sums)


def _random_beside(order: Order, groups: dict[tuple[str, str], list[Order]]) -> list[Order]:
    """Return the random orders that an order is compared with: of several those with most of its fixed clauses."""
    prefixes = [name.removesuffix("random") for name, ablation in groups if ablation == order.ablation]
    longest = max((prefix for prefix in prefixes if order.name.startswith(prefix)), key=len, default=None)
    return [] if longest is None else groups[f"{longest}random", order.ablation]


def _common(orders: Sequence[Order]) -> IntArray:
    return np.array(sorted(set.intersection(*(set(order.counts.tolist()) for order in orders))), dtype=np.int64)


def _over_both(areas: FloatArray, sums: GroupSums) -> Interval:
    """Return the mean of areas, `[orders, groups]`, with the interval over images and orders."""
    each = areas.sum(axis=1) / max(int(sums.images.sum()), 1)
    estimate = float(each.mean())
    if len(each) < FEWEST_ORDERS:
        return estimate, *_UNDEFINED[1:]
    return estimate, *images_and_draws_interval(estimate, leave_one_out(areas.mean(axis=0), sums.images), each)
