"""Sentences about `masks.csv`: the whole model, whole layers, single heads, and other masks."""

import math
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from headprobe.report.page.answers.selected import (
    FIRST,
    SIGNIFICANT_Q,
    churn_of,
    fill,
    largest_first,
    main_ablation,
    masked,
    resolvable,
    single_heads,
    whole_layers,
)
from headprobe.report.page.answers.wording import Draft, Sentence, judged_images
from headprobe.run.load import Row, RunFiles

SHOWN_LAYERS, SHOWN_HEADS, SHOWN_MASKS = 3, 5, 3
"""How many a sentence names, those with the largest drops or rises."""

SMALL_DROP = 1.0
"""Percentage points: a mask whose drop surely lies within them, upwards and downwards, costs little."""


def baseline(run: RunFiles) -> Sentence:
    """Say how many images the whole model has right.

    The interval is Wilson's (1927, Journal of the American Statistical Association 22, 209-212).
    """
    row, images = run.masks[0], judged_images(run)
    draft = Draft("baseline", images)
    if not images:
        return draft.say("No image of {data} was scored.", data=data_in_words(run)).done()
    right, classes = int(row["top1_count"]), int(run.record["data"].get("chosen_among") or 0)
    limits = stats.binomtest(right, images).proportion_ci(method="wilson")
    draft.say("With all its heads, {model} puts ", model=model_in_words(run))
    draft.say("{right:count} of {images:count image} of ", right=right, images=images)
    draft.say("{data} into the right ", data=data_in_words(run))
    if classes:
        draft.say("one of {classes:count class}", classes=classes)
    else:
        draft.say("class")
    draft.say(": top-1 accuracy {top1:percent}", top1=float(row["top1"]))
    return draft.interval({"top1_low": limits.low, "top1_high": limits.high}, "top1", "percent").say(".").done()


def model_in_words(run: RunFiles) -> str:
    """Return the model's name as a reader knows it."""
    model = run.record["model"]
    return str(model.get("title") or model["name"])


def data_in_words(run: RunFiles) -> str:
    """Return which images: the name of the data set or of its folder, and the split."""
    data = run.record["data"]
    path = str(data.get("path") or "the data")
    name = (Path(path).name if data.get("local") else path) or path
    return f"{name} (split {data['split']})" if data.get("split") else name


def layers(run: RunFiles) -> Sentence | None:
    """Say which whole layers cost most, and how many differ from the whole model."""
    kind, images = main_ablation(run), judged_images(run)
    by_layer = whole_layers(run, masked(run, kind))
    if len(by_layer) < 2 or not images:
        return None
    numbers = {id(row): layer for layer, row in by_layer.items()}
    draft = Draft("layers", images)
    fill(draft.say("Without all heads of one layer ("), run, kind, FIRST)
    draft.say("), top-1 accuracy drops most")
    for place, row in enumerate(largest_first([*by_layer.values()], "drop_pp")[:SHOWN_LAYERS], start=1):
        draft.say(", then" if place > 1 else "").say(" for layer {layer:count}", f"{place}_", layer=numbers[id(row)])
        _drop(draft.say(" by "), row, f"{place}_")
    _significance(draft.say(". "), [*by_layer.values()], images, "layer")
    return draft.done()


def _drop(draft: Draft, row: Row, prefix: str = "") -> Draft:
    """Say a mask's drop with its interval."""
    draft.say("{drop_pp:points} points", prefix, drop_pp=float(row["drop_pp"]))
    return draft.interval(row, "drop_pp", "points", prefix)


def _significance(draft: Draft, rows: Sequence[Row], images: int, noun: str) -> None:
    """Say how many masks differ from the whole model, and what the images could resolve where some do not."""
    q_values = [q for row in rows if not math.isnan(q := float(row["bh_q"]))]
    tested, significant = len(q_values), sum(q < SIGNIFICANT_Q for q in q_values)
    if not tested:
        draft.say("No q was computed, as the masks were named one by one.")
        return
    if significant:
        draft.say("{significant:count} of {tested:count {noun}} ", significant=significant, tested=tested, noun=noun)
        draft.say("{number:differs|differ} from the whole model in top-1 accuracy (q below 0.05).", number=significant)
    else:
        draft.say("None of {tested:count {noun}} differs measurably from the whole model ", tested=tested, noun=noun)
        draft.say("in top-1 accuracy (smallest q {smallest_q:p}).", smallest_q=min(q_values))
    if significant < tested:
        _resolved(draft.say(" "), rows, images)


def _resolved(draft: Draft, rows: Sequence[Row], images: int) -> None:
    """Say the smallest true drop that so many images would find under one such mask."""
    churn = churn_of(rows, images)
    smallest = resolvable(images, churn)
    if math.isnan(smallest):
        draft.say("So many images ({images:count}) are too few to find any drop.", images=images)
        return
    draft.say("With {images:count image}, a single test finds true drops from ", images=images)
    draft.say(
        "{resolvable:points} points on in 80% of the cases, if as many images flip by chance as under ",
        resolvable=smallest,
    )
    draft.say("these masks ({churn:percent}, median).", churn=churn)


def costly_heads(run: RunFiles) -> Sentence | None:
    """Say which single heads cost most, by NLL rise."""
    kind, images = main_ablation(run), judged_images(run)
    by_head = single_heads(masked(run, kind))
    if len(by_head) < 2 or not images:
        return None
    names = {id(row): f"{layer}.{head}" for (layer, head), row in by_head.items()}
    ordered = largest_first([*by_head.values()], "nll_rise")
    if not ordered:
        return None
    shown = ordered[:SHOWN_HEADS]
    draft = Draft("heads", images)
    fill(draft.say("Taken away alone ("), run, kind, FIRST)
    draft.say("), ")
    draft.say(
        "{shown:count head} of {heads:count} {shown:costs|cost} most by NLL rise: ",
        shown=len(shown),
        heads=len(by_head),
    )
    for place, row in enumerate(shown, start=1):
        prefix = f"{place}_"
        draft.say("; " if place > 1 else "").say("head {head} by ", head=names[id(row)])
        draft.say("{nll_rise:nats} nats", prefix, nll_rise=float(row["nll_rise"]))
        draft.interval(row, "nll_rise", "nats", prefix)
    draft.say(". In top-1 accuracy they cost, in this order, ")
    for place, row in enumerate(shown, start=1):
        prefix = f"{place}_"
        draft.say(", " if place > 1 else "").say("{drop_pp:points}", prefix, drop_pp=float(row["drop_pp"]))
        if not math.isnan(float(row["bh_q"])):
            draft.say(" (q {q:p})", prefix, q=float(row["bh_q"]))
    draft.say(" points. Heads are written LAYER.HEAD, counted from 0; NLL is the negative log-likelihood of the right class.")
    if left_out := len(by_head) - len(ordered):
        draft.say(" {undefined:count head} of them {undefined:has|have} no NLL rise.", undefined=left_out)
    return draft.done()


def heads_that_differ(run: RunFiles) -> Sentence | None:
    """Say how many single heads differ from nothing, by drop and by NLL rise."""
    kind, images = main_ablation(run), judged_images(run)
    rows = [*single_heads(masked(run, kind)).values()]
    if len(rows) < 2 or not images:
        return None
    above = sum(float(row["nll_rise_low"]) > 0 for row in rows)
    below = sum(float(row["nll_rise_high"]) < 0 for row in rows)
    draft = Draft("heads_tested", images)
    _significance(draft.say("Heads alone: "), rows, images, "head")
    draft.say(
        " NLL sees smaller effects: its 95% interval lies above 0 for {above:none} of {heads:count head}",
        above=above,
        heads=len(rows),
    )
    draft.say(" and below 0 for {below:none} (not corrected for their number).", below=below)
    return draft.done()


def useless_heads(run: RunFiles) -> Sentence | None:
    """Say for how many heads the drop surely is small, and whether the images could tell at all."""
    kind, images = main_ablation(run), judged_images(run)
    rows = [*single_heads(masked(run, kind)).values()]
    if len(rows) < 2 or not images:
        return None
    small = sum(float(row["drop_low_pp"]) >= -SMALL_DROP and float(row["drop_high_pp"]) <= SMALL_DROP for row in rows)
    narrowest = unflipped_limit(images)
    draft = Draft("useless", images)
    draft.say(
        "Is a head useless? For {small:none} of {heads:count head} the whole 95% interval ",
        small=small,
        heads=len(rows),
    )
    draft.say("of the drop lies within 1 point of no drop. ")
    if narrowest > SMALL_DROP:
        draft.say(
            "{images:count image} cannot show that: even where no answer changes, the interval reaches ", images=images
        )
        draft.say("{narrowest:points} points to both sides, so no head can be called useless.", narrowest=narrowest)
    elif small:
        draft.say("Each of these can go alone at little cost; of several together other masks must tell.")
    else:
        draft.say("None can be called useless on these images.")
    return draft.done()


def unflipped_limit(images: int) -> float:
    """Return how far the interval of a drop reaches where no image flips, points: `100 z^2 / (n + z^2)`."""
    square = float(stats.norm.isf(0.025)) ** 2
    return 100 * square / (images + square)


def other_masks(run: RunFiles) -> Sentence | None:
    """Say the largest drops where neither layers nor heads were measured one by one."""
    kind, images = main_ablation(run), judged_images(run)
    rows = masked(run, kind)
    if not rows or not images or len(whole_layers(run, rows)) > 1 or len(single_heads(rows)) > 1:
        return None
    shown = largest_first([*rows.values()], "drop_pp")[:SHOWN_MASKS]
    draft = Draft("masks", images)
    if len(rows) > 1:
        draft.say("The largest drops of {masks:count mask}: ", masks=len(rows))
    for place, row in enumerate(shown, start=1):
        prefix = f"{place}_"
        draft.say("top-1 accuracy drops by " if place == 1 else "; by ")
        _drop(draft, row, prefix)
        draft.say(" without the heads of {mask} ", mask=str(row["mask"]))
        draft.say("({heads:count head}, ", prefix, heads=int(row["heads_masked"]))
        fill(draft, run, kind, FIRST).say(", ")
        tested = "mcnemar_p" if math.isnan(float(row["bh_q"])) else "bh_q"
        draft.say("{name} {value:p})".replace("value", tested), prefix, name=tested[-1], **{tested: float(row[tested])})
    if any(math.isnan(float(row["bh_q"])) or float(row["bh_q"]) >= SIGNIFICANT_Q for row in shown):
        _resolved(draft.say(". "), [*rows.values()], images)
        return draft.done()
    return draft.say(".").done()
