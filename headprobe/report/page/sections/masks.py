"""What whole layers and head indices cost, and whether masks rank alike under two ablations."""

from collections.abc import Sequence
from typing import Any

from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import (
    LOSSES,
    QUANTITIES,
    SCRIPTS,
    by_column,
    columns_of,
    head_name,
    kinds_of,
    losses_of,
    of_runs,
    rows_of_masks,
    short,
)
from headprobe.run.index_null import nulls_of
from headprobe.run.load import Row, RunFiles
from headprobe.run.results import FAMILIES_JOINED

BY_LAYER = "by_layer"
"""The curve of masks of whole layers, in `masks.json`."""

MOST_NAMED = 2
"""Masks of so many heads at most are marked with them."""

MOST_WITH_LIMITS = 200
"""In families of more masks, such as all pairs of heads, the page leaves the intervals to `masks.csv`."""

FEWEST = 2
"""So many masks make a figure."""


def layers(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the drops by layer, from `masks.csv`."""
    found = of_runs(runs, _layers)
    if found is None:
        return None
    return Section(
        key="layers",
        title="Without one layer's heads",
        short="Layers",
        look_at="Which layers the model needs: intervals that leave out 0, under every ablation.",
        definition=(
            "All heads of one layer are masked together; drop and rise are paired with the whole model on the same "
            "images, with 95% intervals (Tango; Student's t), and so is how far the pooled feature moves."
        ),
        link="results.md#how-the-statistics-are-defined",
        data={"runs": found, "quantities": QUANTITIES},
        sources=("masks.csv", "masks.json"),
        scripts=SCRIPTS,
    )


def _layers(run: RunFiles) -> dict[str, Any] | None:
    rows = [row for row in run.masks[1:] if run.curves[str(row["mask"])][0] == BY_LAYER]
    if len({row["mask"] for row in rows}) < FEWEST:
        return None
    table = by_column(rows, ("mask", "ablation", "draw", "heads_masked", "top1", *LOSSES, "mcnemar_p", "bh_q"))
    steps = [run.curves[str(row["mask"])][1] for row in rows]
    return {"rows": {"layer": steps, **table}, "heads_per_layer": run.record["model"]["heads_per_layer"]}


def indices(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of head indices beside random heads of the same layers, from `index_null.csv`."""
    found = of_runs(runs, _indices)
    if found is None:
        return None
    return Section(
        key="indices",
        title="The same head index in every layer, beside random heads",
        short="Indices",
        look_at=(
            "Whether a diamond stands outside of the cloud of its draws. Heads of a layer have no order, so nothing is "
            "expected to."
        ),
        definition=(
            "Each dot masks one random head of every layer that has the index; the bar holds the middle 95% of the "
            "dots; p is two-sided by rank, q corrects it for the number of indices."
        ),
        link="results.md#index_nullcsv",
        data={"runs": found, "quantities": QUANTITIES},
        sources=("index_null.csv", "masks.csv"),
        scripts=SCRIPTS,
    )


def _indices(run: RunFiles) -> dict[str, Any] | None:
    table = run.table("index_null.csv")
    if not table:
        return None
    draws: dict[tuple[str, str], dict[str, Any]] = {}  # indices of the same layers share their draws
    for null in nulls_of(run):
        draws[null.ablation, null.layers] = {"ablation": null.ablation, "layers": null.layers, **null.draws}
    heads_per_layer = run.record["model"]["heads_per_layer"]
    return {"rows": columns_of(table, table), "draws": list(draws.values()), "heads_per_layer": heads_per_layer}


def ablations(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of ablations against each other, from `ablations.csv` and `masks.csv`."""
    found = of_runs(runs, _ablations)
    if found is None:
        return None
    return Section(
        key="ablations",
        title="One ablation against another",
        short="Ablations",
        look_at=(
            "Dots far below the diagonal: heads that cost less when something better than zero stands in for them. "
            "Linear against mean: what can be predicted from the layer's other heads."
        ),
        definition=(
            "Each dot is one mask under two ablations; Spearman's rank correlation has a 95% interval over images, "
            "where there are eight masks or more."
        ),
        link="results.md#ablationscsv",
        data={"runs": found, "quantities": QUANTITIES},
        sources=("ablations.csv", "masks.csv"),
        scripts=SCRIPTS,
    )


AGREEMENT = (
    *("test_family", "ablation_a", "ablation_b", "quantity", "masks", "images"),
    *("spearman", "spearman_low", "spearman_high", "kendall", "kendall_low", "kendall_high"),
    *("b_minus_a", "b_minus_a_low", "b_minus_a_high", "calibration"),
)


def _ablations(run: RunFiles) -> dict[str, Any] | None:
    table = run.table("ablations.csv")
    if not table:
        return None
    families = list(dict.fromkeys(table["test_family"].tolist()))
    return {"rows": columns_of(table, AGREEMENT), "families": [_family(run, family) for family in families]}


def _family(run: RunFiles, family: str) -> dict[str, Any]:
    """Return what the masks of a test family cost under each ablation, `[masks]` each."""
    # Only draw 0 is in a test family.
    members = [str(row["mask"]) for row in run.masks[1:] if family in str(row["test_family"]).split(FAMILIES_JOINED)]
    masks = list(dict.fromkeys(members))
    found = rows_of_masks(run)
    kinds = [kind for kind in kinds_of(run) if all((kind, mask) in found for mask in masks)]
    heads = [[head_name(*head) for head in run.heads[mask]] for mask in masks]
    return {
        "family": family,
        "masks": masks,
        "layers": [_only({layer for layer, _ in run.heads[mask]}) for mask in masks],
        # Of larger sets the name says enough.
        "heads": [" ".join(own) for own in heads] if all(len(own) <= MOST_NAMED for own in heads) else None,
        "kinds": {kind: _costs([found[kind, mask] for mask in masks]) for kind in kinds},
    }


def _only(members: set[int]) -> int | None:
    return next(iter(members)) if len(members) == 1 else None


def _costs(of_masks: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Return the losses of masks in fewer digits: families may be large."""
    losses = losses_of(of_masks, limits=len(of_masks) <= MOST_WITH_LIMITS)
    return {name: short(values) for name, values in losses.items()}
