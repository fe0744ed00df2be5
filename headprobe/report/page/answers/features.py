"""Sentences about runs without labels: how far masks move the pooled feature."""

from collections.abc import Mapping

from headprobe.report.page.answers.masks import data_in_words, model_in_words
from headprobe.report.page.answers.selected import (
    FIRST,
    fill,
    largest_first,
    main_ablation,
    masked,
    single_heads,
    whole_layers,
)
from headprobe.report.page.answers.wording import Draft, Sentence, judged_images
from headprobe.run.load import Row, RunFiles

MOVED = "feature_distance"

SHOWN = 3
"""How many layers or heads a sentence names, those that move the feature most."""


def moved(run: RunFiles) -> Sentence:
    """Say what was measured: no accuracy, but features of how many images."""
    images = judged_images(run)
    draft = Draft("moved", images)
    draft.say("No label was read. Each mask is judged by how far it moves the pooled feature of ")
    draft.say("{model} on {images:count image} of ", model=model_in_words(run), images=images)
    draft.say("{data}: the mean distance from the unmasked feature, ", data=data_in_words(run))
    return draft.say("as a part of that feature's length, image by image.").done()


def layers(run: RunFiles) -> Sentence | None:
    """Say which whole layers move the feature most."""
    rows = whole_layers(run, masked(run, main_ablation(run)))
    return _most(run, "moved_layers", "all heads of one layer", {f"layer {layer}": row for layer, row in rows.items()})


def heads(run: RunFiles) -> Sentence | None:
    """Say which single heads move the feature most."""
    rows = single_heads(masked(run, main_ablation(run)))
    named = {f"head {layer}.{head}": row for (layer, head), row in rows.items()}
    return _most(run, "moved_heads", "one head", named)


def _most(run: RunFiles, key: str, what: str, rows: Mapping[str, Row]) -> Sentence | None:
    """Say which of some masks move the feature most, and which one least."""
    ordered = largest_first([*rows.values()], MOVED)
    if len(ordered) < 2:
        return None
    names = {id(row): name for name, row in rows.items()}
    draft = Draft(key, judged_images(run))
    fill(draft.say("Without {what} (", what=what), run, main_ablation(run), FIRST)
    draft.say("), the feature moves most")
    for place, row in enumerate(ordered[:SHOWN], start=1):
        draft.say(", then" if place > 1 else "").say(" for {name} by ", name=names[id(row)])
        _distance(draft, row, f"{place}_")
    least = ordered[-1]
    draft.say("; least of {masks:count} for {name} by ", masks=len(ordered), name=names[id(least)])
    return _distance(draft, least, "least_").say(".").done()


def _distance(draft: Draft, row: Row, prefix: str) -> Draft:
    draft.say("{feature_distance:ratio}", prefix, feature_distance=float(row[MOVED]))
    return draft.interval(row, MOVED, "ratio", prefix)
