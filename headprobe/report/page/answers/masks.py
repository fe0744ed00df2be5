"""Sentences about `masks.csv`: the whole model, whole layers, single heads, and other masks."""

import math
from collections.abc import Sequence
from itertools import pairwise
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
    heads = [*single_heads(masked(run, kind)).values()]
    told = len(heads) > 1 and _some_unclear(heads)  # what so many images can find is said once, of the heads
    _significance(draft.say(". "), [*by_layer.values()], images, "layer", power=not told)
    if len(heads) < 2 and any(not math.isnan(float(row["bh_q"])) for row in by_layer.values()):
        draft.say(Q_IN_WORDS)
    return draft.done()


Q_IN_WORDS = " Here q is the p of the test of top-1 accuracy, corrected for the number of masks tested together."
"""Said once on a page: of the heads where there are some."""


def _some_unclear(rows: Sequence[Row]) -> bool:
    """Return whether some of the tested masks do not differ from the whole model."""
    return any(float(row["bh_q"]) >= SIGNIFICANT_Q for row in rows)


def _drop(draft: Draft, row: Row, prefix: str = "") -> Draft:
    """Say a mask's drop with its interval."""
    draft.say("{drop_pp:points} points", prefix, drop_pp=float(row["drop_pp"]))
    return draft.interval(row, "drop_pp", "points", prefix)


def _significance(draft: Draft, rows: Sequence[Row], images: int, noun: str, power: bool = True) -> None:
    """Say how many masks differ from the whole model, and with `power` what the images could find where some do not."""
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
    if power and significant < tested:
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
        "{resolvable:points} points on in 80% of the cases (taking as many chance flips as the median mask here ",
        resolvable=smallest,
    )
    draft.say("shows, {churn:percent} of images).", churn=churn)


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
    draft.say(_overlap(shown)).say(". In top-1 accuracy they cost, in this order, ")
    for place, row in enumerate(shown, start=1):
        prefix = f"{place}_"
        draft.say(", " if place > 1 else "").say("{drop_pp:points}", prefix, drop_pp=float(row["drop_pp"]))
        if not math.isnan(float(row["bh_q"])):
            draft.say(" (q {q:p})", prefix, q=float(row["bh_q"]))
    draft.say(" points.")
    if any(not math.isnan(float(row["bh_q"])) for row in shown):
        draft.say(Q_IN_WORDS)
    draft.say(" Heads are written LAYER.HEAD, counted from 0; NLL is the negative log-likelihood of the right class.")
    if left_out := len(by_head) - len(ordered):
        draft.say(" {undefined:count head} of them {undefined:has|have} no NLL rise.", undefined=left_out)
    return draft.done()


def _overlap(ordered: Sequence[Row]) -> str:
    """Return what the intervals of the NLL rise leave of an order, from the largest rise to the smallest."""
    pairs = list(pairwise(ordered))
    overlapping = sum(float(low["nll_rise_high"]) >= float(high["nll_rise_low"]) for high, low in pairs)
    if not overlapping:
        return ""
    some = "their" if overlapping == len(pairs) else "some of their"
    return f"; {some} intervals overlap, so that their order is not sure"


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
    narrowest = unflipped_limit(images)
    draft = Draft("useless", images).say("Is a head useless? ")
    if narrowest > SMALL_DROP:
        draft.say(
            "{images:count image} are too few to call any of {heads:count head} useless, ",
            images=images,
            heads=len(rows),
        )
        draft.say("or to rule it out: even where no answer changes, the interval of the drop reaches ")
        draft.say("{narrowest:points} points to both sides.", narrowest=narrowest)
    else:
        _small(draft, rows)
    return _lowest(draft, run).done()


def _small(draft: Draft, rows: Sequence[Row]) -> None:
    """Say for how many heads the whole interval of the drop is small."""
    small = sum(float(row["drop_low_pp"]) >= -SMALL_DROP and float(row["drop_high_pp"]) <= SMALL_DROP for row in rows)
    whole = "whole 95% interval of the drop lies within 1 point of no drop"
    if small:
        draft.say(f"For {{small:count}} of {{heads:count head}} the {whole}. ", small=small, heads=len(rows))
        draft.say("Each of these can go alone at little cost; of several together other masks must tell.")
    else:
        draft.say(f"Of {{heads:count head}} no head's {whole}, ", heads=len(rows))
        draft.say("so that none can be called useless on these images.")


def _lowest(draft: Draft, run: RunFiles) -> Draft:
    """Say which head has the lowest NLL rise."""
    by_head = single_heads(masked(run, main_ablation(run)))
    rises = {head: float(row["nll_rise"]) for head, row in by_head.items()}
    rises = {head: rise for head, rise in rises.items() if not math.isnan(rise)}
    if not rises:
        return draft
    layer, head = least = min(rises, key=lambda one: rises[one])
    draft.say(" The lowest NLL rise is that of head {head} with ", head=f"{layer}.{head}")
    draft.say("{nll_rise:nats} nats", nll_rise=rises[least])
    return draft.interval(by_head[least], "nll_rise", "nats").say(".")


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
        draft.say("The largest drops of {masks:count mask}: top-1 accuracy drops by ", masks=len(rows))
    else:
        draft.say("Top-1 accuracy drops by ")
    for place, row in enumerate(shown, start=1):
        prefix = f"{place}_"
        draft.say("; by " if place > 1 else "")
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
