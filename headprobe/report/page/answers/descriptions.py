"""Sentences about what heads are like: how far and how widely they look, frequencies, resemblance, scores."""

import math

import numpy as np
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.measures import Measure, title
from headprobe.report.page.answers.selected import main_ablation
from headprobe.report.page.answers.wording import Draft, Sentence, flattered, judged_images, table_rows
from headprobe.run.load import Columns, Row, RunFiles

MEASURES: tuple[Measure, ...] = ("cka_unbiased", "cka", "svcca", "pwcca", "cca", "procrustes")
"""Of the measured similarities sentences are about the first."""

ROTATED = frozenset({"cka_unbiased", "cka", "procrustes"})
"""Measures that are 1 up to a rotation and a factor; the others are up to any invertible linear map."""


ABOUT = 0.9, 1.1
"""A ratio to uniform attention between these is about 1."""


def distance(run: RunFiles) -> Sentence | None:
    """Say how far heads look in the first and in the last layer, beside uniform attention."""
    ends = _ends(run, "attention_distance_px", "attention_distance_px_se", "attention_distance_ratio")
    if ends is None:
        return None
    heads, ends_of = ends
    draft = Draft("distance", judged_images(run))
    draft.say("How far do heads look? ")
    for end, (layer, rows) in zip(("first", "last"), ends_of, strict=True):
        px, ratio = heads["attention_distance_px"][rows], heads["attention_distance_ratio"][rows]
        draft.say("In" if end == "first" else "; in").say(" layer {layer:count} ", f"{end}_", layer=layer)
        draft.say("{mean:px} pixels on average of {heads:count head} ", f"{end}_", mean=float(px.mean()), heads=len(px))
        draft.say("(single heads {least:px} to {most:px}), ", f"{end}_", least=float(px.min()), most=float(px.max()))
        draft.say("{ratio:ratio} of the distance of uniform attention", f"{end}_", ratio=float(ratio.mean()))
    if all(ABOUT[0] <= float(heads["attention_distance_ratio"][rows].mean()) <= ABOUT[1] for _, rows in ends_of):
        draft.say(": in both about as far as uniform attention looks")
    px = heads["attention_distance_px"]
    near, far = int(np.nanargmin(px)), int(np.nanargmax(px))
    draft.say(". The smallest distance is that of head {head} with ", head=_name(heads, near)).say(
        "{near:px} pixels, ", near=float(px[near])
    )
    draft.say("the largest that of head {head} with ", head=_name(heads, far)).say("{far:px}", far=float(px[far]))
    errors = heads["attention_distance_px_se"]
    if np.isnan(errors).all():  # of one image
        return draft.say(".").done()
    error = float(np.nanmax(errors))
    return draft.say("; standard errors over images are at most {error:ratio} pixels.", error=error).done()


Ends = list[tuple[int, NDArray[np.intp]]]
"""The first and the last layer, and the rows of their heads."""


def _ends(run: RunFiles, column: str, *beside: str) -> tuple[Columns, Ends] | None:
    """Return the whole model's rows of `heads.csv`, and which of them are of the first and of the last layer.

    Layers in which the column is not defined for any head do not count. None where it is nowhere, or where a column
    that stands beside it is not there, as in files of before.
    """
    heads = run.described("heads").get("baseline", {})
    if any(name not in heads for name in (column, *beside)) or not np.isfinite(there := heads[column]).any():
        return None
    layers = np.unique(heads["layer"][np.isfinite(there)])
    return heads, [
        (int(layer), np.flatnonzero((heads["layer"] == layer) & np.isfinite(there)))
        for layer in (layers[0], layers[-1])
    ]


def _name(heads: Columns, row: int) -> str:
    return f"{heads['layer'][row]}.{heads['head'][row]}"


def entropy(run: RunFiles) -> Sentence | None:
    """Say how widely attention is spread, as a share of uniform attention's entropy."""
    ends = _ends(run, "entropy_ratio")
    if ends is None:
        return None
    heads, ends_of = ends
    draft = Draft("entropy", judged_images(run)).say("How widely is attention spread? Its entropy is ")
    _shares(draft, heads["entropy_ratio"], ends_of)
    draft.say("; ")
    values = heads["entropy_ratio"]
    least = int(np.nanargmin(values))
    draft.say("the smallest is that of head {head} with ", head=_name(heads, least))
    return draft.say("{least:percent}.", least=float(values[least])).done()


def _shares(draft: Draft, values: FloatArray, ends: Ends) -> None:
    for end, (layer, rows) in zip(("first", "last"), ends, strict=True):
        own = values[rows]
        draft.say("" if end == "first" else " and ")
        draft.say("{mean:percent}", f"{end}_", mean=float(own.mean()))
        draft.say(" of uniform attention's" if end == "first" else "").say(
            " in layer {layer:count}", f"{end}_", layer=layer
        )
        ends_in_words = " (single heads {least:percent} to {most:percent})"
        draft.say(ends_in_words, f"{end}_", least=float(own.min()), most=float(own.max()))


def frequencies(run: RunFiles) -> Sentence | None:
    """Say in how many layers attention lowers the stream's highest frequency, and how high heads reach."""
    rows = [row for row in table_rows(run, "spectrum.csv") if row["mask"] == "none" and row["profile"] == "diagonal"]
    before, after = (_highest(rows, series) for series in ("stream_before", "stream_after"))
    common = sorted(before.keys() & after.keys())
    if not common:
        return None
    lower = sum(after[layer] < before[layer] for layer in common)
    draft = Draft("frequencies", judged_images(run))
    draft.say(
        "Attention is called a low-pass filter: in {lower:count} of {layers:count layer} ",
        lower=lower,
        layers=len(common),
    )
    draft.say(
        "the stream holds less of the highest spatial frequency after attention than before it (log amplitude minus "
        "that at frequency 0)"
    )
    deltas = {layer: after[layer] - before[layer] for layer in common}
    least, most = min(deltas, key=lambda layer: deltas[layer]), max(deltas, key=lambda layer: deltas[layer])
    draft.say(
        "; the change is lowest in layer {least_layer:count} ({least:change}) ", least_layer=least, least=deltas[least]
    )
    return draft.say(
        "and highest in layer {most_layer:count} ({most:change}).", most_layer=most, most=deltas[most]
    ).done()


def _highest(rows: list[Row], series: str) -> dict[int, float]:
    """Return by layer the delta log amplitude of a series at its highest frequency, where it is a number."""
    found: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row["series"] == series:
            layer, point = int(row["layer"]), (float(row["frequency"]), float(row["delta_log_amplitude"]))
            found[layer] = max(found.get(layer, point), point)
    return {layer: delta for layer, (_, delta) in found.items() if math.isfinite(delta)}


def similarity(run: RunFiles) -> Sentence | None:
    """Say how alike heads of a layer are beside the floor of different images, and which two are nearest."""
    arrays = run.arrays("similarity.npz")
    measure = next((name for name in MEASURES if name in arrays and np.isfinite(_pairs(arrays, name)).any()), None)
    if measure is None:
        return None
    layer, values = arrays["layer"], _pairs(arrays, measure)
    within = np.isfinite(values) & (layer[:, None] == layer[None, :])
    draft = Draft("similarity", judged_images(run))
    named = title(measure, str(arrays.get("sampling", "tokens")))
    draft.say("How alike are heads? By {measure} ", measure=named)
    if within.any():
        draft.say(
            "{mean:ratio} on average of {pairs:count pair} of one layer",
            mean=float(values[within].mean()),
            pairs=int(within.sum()),
        )
        floor = arrays.get(f"{measure}_floor")
        if floor is not None and np.isfinite(floor[within]).any():
            draft.say(" (the same heads on different images: {floor:ratio})", floor=float(np.nanmean(floor[within])))
        draft.say("; ")
    first, second = (int(place) for place in np.unravel_index(int(np.nanargmax(values)), values.shape))
    names = {"one": _name(arrays, first), "other": _name(arrays, second)}
    draft.say("the nearest two of those compared are head {one} and head {other} with ", **names)
    draft.say("{nearest:ratio}", nearest=float(values[first, second]))
    if f"{measure}_low" in arrays:
        limits = {f"nearest_{end}": float(arrays[f"{measure}_{end}"][first, second]) for end in ("low", "high")}
        draft.interval(limits, "nearest", "ratio")
    alike = "a rotation and a factor" if measure in ROTATED else "a linear map"
    return draft.say(". A value of 1 means the same up to {alike}.", alike=alike).done()


def _pairs(arrays: dict[str, FloatArray], measure: str) -> FloatArray:
    """Return a matrix `[heads, heads]` with each pair once, above the diagonal; NaN elsewhere.

    Of PWCCA, which is not symmetric, both directions of a pair count with their mean.
    """
    both = (arrays[measure] + arrays[measure].T) / 2
    return np.where(np.triu(np.ones(both.shape, dtype=bool), 1), both, np.nan)


def scores(run: RunFiles) -> Sentence | None:
    """Say which score predicts best what single heads cost, under each ablation, beside their depth."""
    rows = [row for row in table_rows(run, "importance.csv") if row["target"] == "nll_rise" and row["scope"] == "all"]
    rows = [row for row in rows if not math.isnan(float(row["spearman"]))]
    kinds = list(dict.fromkeys(str(row["ablation"]) for row in rows))
    main = main_ablation(run)
    kinds.sort(key=lambda kind: kind != main)
    if not kinds:
        return None
    draft = Draft("scores", judged_images(run))
    draft.say("Which score predicts what a head costs (rank correlation with the NLL rise, of either sign)? ")
    for place, kind in enumerate(kinds, start=1):
        _best(draft.say(". " if place > 1 else ""), [row for row in rows if row["ablation"] == kind], kind, f"{place}_")
    return flattered(draft.say(". The best is chosen after the fact, so it is flattered."), run).done()


def _best(draft: Draft, rows: list[Row], kind: str, prefix: str) -> None:
    """Say the best score under one ablation, with the ceiling and depth."""
    scored = [row for row in rows if row["score"] != "depth"]
    depth = next((row for row in rows if row["score"] == "depth"), None)
    draft.say("Under {kind} ablation ", kind=kind)
    if scored:
        best = max(scored, key=lambda row: abs(float(row["spearman"])))
        draft.say("{score} with ", score=str(best["score"])).say(
            "{spearman:ratio}", prefix, spearman=float(best["spearman"])
        )
        judged = ", of the judged images themselves" if best["rows"] == "judged" else ""
        draft.interval(best, "spearman", "ratio", prefix, judged)
        draft.say(", best of {scores:count score}", prefix, scores=len(scored))
        ceiling = float(best["ceiling"])
        known = "the true order itself would reach about {ceiling:ratio}"
        draft.say(f" ({'no ceiling is known' if math.isnan(ceiling) else known})", prefix, ceiling=ceiling)
    if depth is not None:
        draft.say(", beside " if scored else "").say("depth with {depth:ratio}", prefix, depth=float(depth["spearman"]))
        draft.interval(
            {"depth_low": depth["spearman_low"], "depth_high": depth["spearman_high"]}, "depth", "ratio", prefix
        )
