"""Everything that a run's files say of single heads, one column of numbers after the other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.measures import MEASURES
from headprobe.run.importance import candidates_named, single_head_masks
from headprobe.run.load import Columns, Row, RunFiles

SIGNIFICANT_Q = 0.05
"""False discovery rate below which a drop is called different from nothing."""

SEQUENTIAL, DIVERGING = "sequential", "diverging"
"""Kinds of colours: from the least to the most, or about 0."""

COSTS = {
    "nll_rise": ("NLL rise", "nats"),
    "drop_pp": ("Top-1 drop", "points"),
    "feature_distance": ("Distance of the feature", "of its length"),
    "feature_cosine": ("Cosine of the feature", ""),
}
"""What a mask costs, in words and units."""

MOVED = "feature_"
"""What the columns of the pooled feature begin with."""

LABELS = {
    "attention_distance_px": ("Attention distance", "pixels"),
    "attention_distance_raw_px": ("Attention distance, not renormalised", "pixels"),
    "attention_distance_ratio": ("Attention distance over that of uniform attention", ""),
    "entropy_nats": ("Attention entropy", "nats"),
    "entropy_all_keys_nats": ("Attention entropy over all keys", "nats"),
    "entropy_ratio": ("Attention entropy over that of uniform attention", ""),
    "mutual_information": ("Mutual information of query and key", "normalised"),
    "confidence": ("Confidence: a query's largest weight", "weight"),
    "class_mass": ("Attention to the class token", "weight"),
    "register_mass": ("Attention to registers", "weight"),
    "self_mass": ("Attention of a patch to itself", "weight"),
    "sink_mass": ("Largest key's share of attention", "weight"),
    "value_weighted_attention": ("Attention weighted by values", "over uniform"),
    "output_norm_ratio": ("Output over the residual stream", "ratio of norms"),
    "rank": ("Directions in which the output varies", "dims"),
    "kept_dims": ("Directions that hold 99% of it", "dims"),
    "high_frequency": ("High frequency of the output", "delta log amplitude"),
    "contribution_high_frequency": ("High frequency of the contribution", "delta log amplitude"),
    "gradient_abs": ("|gradient|", "nats"),
    "gradient_abs_l2": ("|gradient| within the layer", "share of its L2 norm"),
    "gradient_fisher": ("Gradient squared (Fisher)", "nats²"),
    "taylor_zero": ("Taylor, to zero", "nats"),
    "taylor_mean": ("Taylor, to the mean", "nats"),
    "variance_after_projection": ("Variance after W_O", "squared activations"),
    "residual_variance_after_projection": (
        "Variance that the layer's other heads do not predict",
        "squared activations",
    ),
    "stable_rank": ("Stable rank", "directions"),
    "direct_logit": ("Direct addition to the right logit", "logits"),
}
"""Columns of `heads.csv` and `scores.csv` in words, with their units; one that is not here is called by its name."""

MEASURE_NAMES = {
    "svcca": "SVCCA",
    "cca": "CCA",
    "pwcca": "PWCCA",
    "cka": "CKA",
    "cka_unbiased": "debiased CKA",
    "procrustes": "Procrustes",
}
"""Measures of similarity in words."""


class Place(NamedTuple):
    """Where a head is."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadColumn:
    """One number for every head, with what is known of its uncertainty.

    Attributes:
        key: The name in saved tables, such as `nll_rise_zero`.
        label: The same in words, and its `unit`.
        group: The heading that it stands under.
        values: `[heads]` by layer and head, NaN where there is none.
        kind: Its colours, `SEQUENTIAL` or `DIVERGING`.
        extra: Further numbers `[heads]` by name: `low` and `high` of a 95% interval, `se`, `p`, `q`, `least` and
            `most` of several draws.
        differs: By which rule a head differs from nothing: `interval` (it leaves out 0) or `q` (below 0.05); empty
            where nothing says so.
        ablation: The ablation of a cost.
        note: What else must be known of it.
    """

    key: str
    label: str
    unit: str
    group: str
    values: FloatArray
    kind: str = SEQUENTIAL
    extra: Mapping[str, FloatArray] | None = None
    differs: str = ""
    ablation: str = ""
    note: str = ""

    def for_page(self) -> dict[str, Any]:
        """Return what the drawing gets; what is empty is left out."""
        texts = {
            name: getattr(self, name)
            for name in ("key", "label", "unit", "group", "kind", "differs", "ablation", "note")
        }
        return {name: text for name, text in texts.items() if text} | {"values": self.values} | dict(self.extra or {})


def places_of(run: RunFiles) -> list[Place]:
    """Return all heads of a run's model, by layer and head."""
    return [
        Place(layer, head)
        for layer, heads in enumerate(run.record["model"]["heads_per_layer"])
        for head in range(int(heads))
    ]


def columns_of(run: RunFiles) -> list[HeadColumn]:
    """Return every column of a run that has a number for any head; those of most interest first."""
    places = places_of(run)
    found = [*_costs(run, places), *_shapley(run, places), *_described(run, places), *_scores(run, places)]
    return [column for column in found if np.isfinite(column.values).any()]


def _spread(numbers: Mapping[Place, float], places: Sequence[Place]) -> FloatArray:
    """Return numbers of some heads as `[heads]`, NaN where there is none."""
    return np.array([numbers.get(place, math.nan) for place in places], dtype=np.float64)


# -- what masking one head costs --


def _costs(run: RunFiles, places: Sequence[Place]) -> Iterator[HeadColumn]:
    """Yield NLL rise and drop of the masks of one head, ablation by ablation."""
    # Several masks may name a head alone, as the first of an order does: one of them stands for all.
    alone = {mask: Place(*place) for place, mask in single_head_masks(run.masks, run.heads).items()}
    rows: dict[str, dict[Place, list[Row]]] = {}
    for row in run.masks[1:]:
        if (place := alone.get(str(row["mask"]))) is not None:
            rows.setdefault(str(row["ablation"]), {}).setdefault(place, []).append(row)
    for ablation, of_heads in rows.items():
        for quantity in (name for name in COSTS if name in run.masks[0]):
            yield _cost(quantity, ablation, of_heads, places)


def _cost(quantity: str, ablation: str, rows: Mapping[Place, Sequence[Row]], places: Sequence[Place]) -> HeadColumn:
    """Return one cost under one ablation; of several draws their mean, and the tests of draw 0."""
    label, unit = COSTS[quantity]
    draws = max(len(own) for own in rows.values())
    all_draws = {place: [float(row[quantity]) for row in own] for place, own in rows.items()}
    first = {place: min(own, key=lambda row: row["draw"]) for place, own in rows.items()}

    wanted = {"low": _limit(quantity, "low"), "high": _limit(quantity, "high")} if draws == 1 else {}
    if quantity == "drop_pp":
        wanted |= {"p": "mcnemar_p", "q": "bh_q"}
    extra = {
        name: _spread({place: float(row[column]) for place, row in first.items()}, places)
        for name, column in wanted.items()
    }
    if draws > 1:
        extra |= {
            name: _spread({place: pick(own) for place, own in all_draws.items()}, places)
            for name, pick in (("least", min), ("most", max))
        }
    return HeadColumn(
        key=f"{quantity}_{ablation}",
        label=f"{label}, {ablation} ablation",
        unit=unit,
        group="What masking one head costs",
        values=_spread({place: float(np.mean(own)) for place, own in all_draws.items()}, places),
        kind=SEQUENTIAL if quantity.startswith(MOVED) else DIVERGING,
        extra=extra,
        differs=_rule(quantity, extra, draws),
        ablation=ablation,
        note=f"mean of {draws} draws; p and q are of draw 0" if draws > 1 else "",
    )


def _rule(quantity: str, extra: Mapping[str, FloatArray], draws: int) -> str:
    """Return by which rule a cost differs from nothing; a feature moves under any mask, which is no finding."""
    if quantity.startswith(MOVED):
        return ""
    tested = "q" in extra and np.isfinite(extra["q"]).any()
    return "q" if tested else "interval" if draws == 1 else ""


def _limit(quantity: str, end: str) -> str:
    """Return the name of a limit's column in `masks.csv`."""
    return f"drop_{end}_pp" if quantity == "drop_pp" else f"{quantity}_{end}"


# -- what it is worth among all --


def _shapley(run: RunFiles, places: Sequence[Place]) -> Iterator[HeadColumn]:
    """Yield the Shapley values of heads, by ablation and quantity."""
    table = run.table("shapley.csv")
    if not table:
        return
    of_heads = table["players"] == "heads"
    kinds = dict.fromkeys(zip(table["ablation"][of_heads], table["quantity"][of_heads], strict=True))
    for ablation, quantity in kinds:
        chosen = of_heads & (table["ablation"] == ablation) & (table["quantity"] == quantity)
        of = {name: _by_place(table, name, places, chosen) for name in ("value", "value_low", "value_high")}
        label, unit = COSTS.get(str(quantity), (str(quantity), ""))
        yield HeadColumn(
            key=f"shapley_{quantity}_{ablation}",
            label=f"Shapley value, {label}, {ablation} ablation",
            unit=unit,
            group="What it is worth among all heads",
            values=of["value"],
            kind=DIVERGING,
            extra={"low": of["value_low"], "high": of["value_high"]},
            differs="interval",
            ablation=str(ablation),
        )


def _by_place(table: Columns, column: str, places: Sequence[Place], chosen: Any = slice(None)) -> FloatArray:
    """Return a column of some rows of a table as `[heads]`."""
    rows = zip(table["layer"][chosen], table["head"][chosen], table[column][chosen], strict=True)
    return _spread({Place(int(layer), int(head)): float(value) for layer, head, value in rows}, places)


# -- what it is like, and what scores say of it --


def _described(run: RunFiles, places: Sequence[Place]) -> Iterator[HeadColumn]:
    """Yield the statistics of the unmasked model's heads, with standard errors; first how near the nearest head is."""
    yield from _nearest(run, places)
    table = run.described("heads").get("baseline")
    if not table:
        return
    similarities = {f"{measure}_mean": f"Mean {MEASURE_NAMES[measure]} with other heads" for measure in MEASURES}
    for name in candidates_named(table):
        label, unit = (similarities[name], "") if name in similarities else LABELS.get(name, (name, ""))
        error = f"{name}_se"
        extra = {"se": _by_place(table, error, places)} if error in table else {}
        yield HeadColumn(
            name, label, unit, "What it attends to and writes", _by_place(table, name, places), extra=extra
        )


def _nearest(run: RunFiles, places: Sequence[Place]) -> Iterator[HeadColumn]:
    """Yield the similarity of each head with its nearest, by measure."""
    found = run.arrays("similarity.npz")
    for measure in MEASURES:
        if measure not in found:
            continue
        others = np.where(np.eye(len(found[measure]), dtype=bool), np.nan, found[measure])
        # A row without any comparison has no largest one: `-inf` stands for it until the end.
        largest = np.where(np.isnan(others), -np.inf, others).max(axis=1, initial=-np.inf)
        of_heads = {
            Place(int(layer), int(head)): float(value)
            for layer, head, value in zip(found["layer"], found["head"], largest, strict=True)
            if np.isfinite(value)
        }
        label = f"{MEASURE_NAMES[measure]} with the nearest head"
        yield HeadColumn(f"nearest_{measure}", label, "", "What it attends to and writes", _spread(of_heads, places))


def _scores(run: RunFiles, places: Sequence[Place]) -> Iterator[HeadColumn]:
    """Yield the importance scores, which other images than the judged ones gave."""
    table = run.table("scores.csv")
    if not table:
        return
    signed = {"taylor_zero", "taylor_mean", "direct_logit"}
    for name in candidates_named(table):
        label, unit = LABELS.get(name, (name, ""))
        kind = DIVERGING if name in signed else SEQUENTIAL
        yield HeadColumn(
            name, label, unit, "Scores, of the images that calibrate", _by_place(table, name, places), kind
        )
