"""Heads removed one after the other: the curve of each order, and the ladder that shows which heads are gone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import LOSSES, SCRIPTS, columns_of, head_name, of_runs
from headprobe.run.curves import Order, orders_of
from headprobe.run.load import Columns, RunFiles

FEATURES = ("feature_cosine", "feature_cosine_low", "feature_cosine_high")

POINT = ("order", "ablation", "heads_removed", "orders", "top1", "nll", *LOSSES, *FEATURES, "interval")
"""Columns of a point; of a random order that only its mean stands for, the first ones."""

SINGLE = ("order", "ablation", "heads_removed", "top1", "nll", "feature_cosine", "feature_distance")

AREA = (
    *("order", "ablation", "area", "area_low", "area_high", "removable_1pp", "removable_1pp_surely"),
    *("feature_area", "feature_area_low", "feature_area_high"),
)

SOURCES = ("curves.csv", "orders.csv", "masks.csv")


def curves(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the curves, from `curves.csv`."""
    found = of_runs(runs, _curves)
    if found is None:
        return None
    return Section(
        key="curves",
        title="Heads removed one after the other",
        short="Curves",
        look_at=(
            "How many heads can go before a line leaves the dashed one, and whether an order that a score chose lies "
            "above the mean of random orders; above the band, where another random order would lie, it is better than "
            "nearly all of them."
        ),
        definition=(
            "Each point is the accuracy (or the mean negative log-likelihood of the label, or the cosine of the pooled "
            "feature with the unmasked one) with so many heads masked together; the band is a 95% prediction interval "
            "for another random order."
        ),
        link="results.md#curvescsv",
        data={"runs": found},
        sources=SOURCES,
        scripts=SCRIPTS,
    )


def _curves(run: RunFiles) -> dict[str, Any] | None:
    table = run.table("curves.csv")
    if not table:
        return None
    single = np.isin(table["order"], _members(table))
    return {
        "baseline": _baseline(run),
        "heads": sum(run.record["model"]["heads_per_layer"]),
        "areas": _areas(run),
        "rows": columns_of(table, POINT, ~single),
        "single": columns_of(table, SINGLE, single),
    }


def _areas(run: RunFiles) -> dict[str, Any]:
    """Return the area under each order's curve and how many heads can go, from `orders.csv`."""
    table = run.table("orders.csv")
    return columns_of(table, AREA) if table else {}


def _baseline(run: RunFiles) -> dict[str, float]:
    wanted = ("top1", "nll", "feature_cosine", "feature_distance", "images")
    found = {name: float(run.masks[0][name]) for name in wanted if name in run.masks[0]}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _members(table: Columns) -> list[str]:
    """Return the random orders whose mean is there too."""
    names = list(dict.fromkeys(table["order"].tolist()))
    means = {str(name) for name in table["order"][table["orders"] > 1]}
    return [name for name in names if (parts := name.rpartition("_seed_"))[1] and parts[0] in means]


def ladder(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the ladder: which heads are gone at each point of an order that is not random."""
    found = of_runs(runs, _ladder)
    if found is None:
        return None
    return Section(
        key="ladder",
        title="Remove heads step by step",
        short="Step by step",
        look_at="Which heads an order takes next, and what all that are gone by then cost together.",
        definition=(
            "Every step is a mask that was measured: the heads of a step hold those of the step before. The drop is "
            "paired with the whole model on the same images, with its 95% interval."
        ),
        link="results.md#curvescsv",
        data={"runs": found},
        sources=("curves.csv", "masks.json"),
        scripts=SCRIPTS,
    )


def _ladder(run: RunFiles) -> dict[str, Any] | None:
    table = run.table("curves.csv")
    if not table:
        return None
    orders = _shown(orders_of(run))
    if not orders:
        return None
    rows = np.isin(table["order"], list(orders)) | (table["orders"] > 1)
    return {
        "baseline": _baseline(run),
        "heads_per_layer": run.record["model"]["heads_per_layer"],
        "orders": {name: _steps(run, order) for name, order in orders.items()},
        "rows": columns_of(table, POINT, rows),
    }


def _shown(orders: Sequence[Order]) -> dict[str, Order]:
    """Return the orders of two steps or more by name: random ones only where there are no others."""
    longer = {order.name: order for order in orders if len(order.counts) > 1}
    chosen = {name: order for name, order in longer.items() if not order.random}
    return chosen or longer


def _steps(run: RunFiles, order: Order) -> list[list[str]]:
    """Return the heads that each step of an order takes beside those of the step before."""
    gone: set[tuple[int, int]] = set()
    steps = []
    for lines in order.lines:
        heads = set(run.heads[str(run.masks[lines[0]]["mask"])])
        steps.append([head_name(*head) for head in sorted(heads - gone)])
        gone = heads
    return steps
