"""Sentences about sets: random heads, indices, pairs, and what each head is worth as one of all."""

import math
from collections.abc import Sequence

from headprobe.masks.ablations import LINEAR, MEAN, ZERO
from headprobe.report.page.answers.selected import (
    MEAN_OF,
    SIGNIFICANT_Q,
    fill,
    largest_first,
    main_ablation,
    masked,
    single_heads,
)
from headprobe.report.page.answers.wording import Draft, Sentence, flattered, judged_images, listed, table_rows
from headprobe.run.curves import ONE_MORE_ORDER
from headprobe.run.index_null import FEWEST_DRAWS
from headprobe.run.load import Row, RunFiles

RANDOM = "random"
"""The mean of all random orders in `curves.csv` and `orders.csv`."""

SHOWN_PLAYERS = 5


def random_heads(run: RunFiles) -> Sentence | None:
    """Say what half of the heads cost when they are drawn at random."""
    kind, total = main_ablation(run), sum(run.record["model"]["heads_per_layer"])
    points = [row for row in table_rows(run, "curves.csv") if (row["order"], row["ablation"]) == (RANDOM, kind)]
    if not points:
        return None
    row = min(points, key=lambda point: abs(2 * int(point["heads_removed"]) - total))
    draft = Draft("random", judged_images(run))
    draft.say("{removed:count} of {heads:count head} ", removed=int(row["heads_removed"]), heads=total)
    fill(draft.say("removed at random ("), run, kind, MEAN_OF).say(") cost ")
    draft.say("{drop_pp:points} points of top-1 accuracy on average of ", drop_pp=float(row["drop_pp"]))
    draft.say("{orders:count random order}; ", orders=int(row["orders"]))
    low, high = float(row["drop_low_pp"]), float(row["drop_high_pp"])
    if math.isnan(low):
        draft.say("where another random order would lie is not defined.")
    elif row["interval"] == ONE_MORE_ORDER:
        draft.say("another random order would lie between {drop_low_pp:points} and ", drop_low_pp=low)
        draft.say("{drop_high_pp:points} points with 95%.", drop_high_pp=high)
    else:
        draft.say("they range from {drop_low_pp:points} to ", drop_low_pp=low)
        draft.say("{drop_high_pp:points} points.", drop_high_pp=high)
    return draft.done()


def indices(run: RunFiles) -> Sentence | None:
    """Say whether the same index in every layer differs from one random head of each layer."""
    kind = main_ablation(run)
    rows = [row for row in table_rows(run, "index_null.csv") if row["ablation"] == kind]
    rows = [row for row in rows if row["quantity"] == "nll_rise" and int(row["draws"])]
    if not rows:
        return None
    draft = Draft("index", judged_images(run))
    fewest, count = min(int(row["draws"]) for row in rows), len(rows)
    draft.say("Does the same head index in every layer belong together? Beside {draws:count draw} ", draws=fewest)
    draft.say("of one random head per layer, ")
    if not (with_q := [row for row in rows if not math.isnan(float(row["bh_q"]))]):
        draft.say("{indices:count} {indices:index|indices} cannot be tested: ", indices=count)
        return draft.say("a p needs {needed:count draw}.", needed=FEWEST_DRAWS).done()
    least = min(1.0, len(with_q) * max(float(row["p_smallest"]) for row in with_q))
    hopeless = least >= SIGNIFICANT_Q
    significant = [row for row in with_q if float(row["bh_q"]) < SIGNIFICANT_Q]
    first = min(with_q, key=lambda row: (float(row["p"]), -float(row["value"])))
    if significant:
        names = listed([str(row["mask"]) for row in significant])
        draft.say("{significant:count} of ", significant=len(significant))
        draft.say("{indices:count} {indices:index|indices} ", indices=len(with_q))
        draft.say("{number:differs|differ} by NLL rise (q below 0.05): {names}.", number=len(significant), names=names)
    else:
        draft.say(
            "none of {indices:count} {indices:index|indices} differs by NLL rise (q below 0.05)", indices=len(with_q)
        )
        if hopeless:
            draft.say(", which so many draws could not show for a single index: ")
            draft.say("{least_q:p} is the least q", least_q=least)
        draft.say(".")
    draft.say(" The smallest p is {p:p} with q {bh_q:p}, ", p=float(first["p"]), bh_q=float(first["bh_q"]))
    draft.say("of {mask}: {value:nats} nats against ", mask=str(first["mask"]), value=float(first["value"]))
    draft.say(
        "{draws_mean:nats} on average of the draws, 95% of which lie from ", draws_mean=float(first["draws_mean"])
    )
    draft.say(
        "{draws_low:nats} to {draws_high:nats}.",
        draws_low=float(first["draws_low"]),
        draws_high=float(first["draws_high"]),
    )
    if significant or not hopeless:
        draft.say(" So many draws allow a single index a q of {least_q:p} at best.", least_q=least)
    return draft.done()


def linear_replacement(run: RunFiles) -> Sentence | None:
    """Say how much of the rise under zero is left when single heads are replaced by a linear prediction."""
    for row in table_rows(run, "ablations.csv"):
        key = row["test_family"], row["ablation_a"], row["ablation_b"], row["quantity"]
        if key == ("each:head", ZERO, LINEAR, "nll_rise"):
            return _linear(run, row)
    return None


def _linear(run: RunFiles, row: Row) -> Sentence | None:
    """Return the sentence; none where a mask broke the model, so that its rise is not a number."""
    zero, linear = float(row["sum_a"]), float(row["sum_b"])
    if not math.isfinite(zero) or not math.isfinite(linear):
        return None
    draft = Draft("linear", judged_images(run))
    draft.say("Set to zero one at a time, {masks:count head} raise the NLL by ", masks=int(row["masks"]))
    draft.say("{sum_a:nats} nats in sum", sum_a=zero).interval(row, "sum_a", "nats")
    _mean(draft, run)
    draft.say("; replaced by a linear prediction from the heads that their layer keeps, by {sum_b:nats}", sum_b=linear)
    draft.interval(row, "sum_b", "nats").say(".")
    if zero > 0 and 0 <= linear <= zero:
        draft.say(" So {kept:percent} of the rise under zero is left; the rest ", kept=linear / zero)
        draft.say("can be read off their means and their neighbours.")
    draft.say(" The difference is {b_minus_a:nats} nats", b_minus_a=float(row["b_minus_a"]))
    draft.interval(row, "b_minus_a", "nats").say(".")
    by_head = single_heads(masked(run, LINEAR))
    names = {id(one): f"{layer}.{head}" for (layer, head), one in by_head.items()}
    if costly := largest_first([*by_head.values()], "nll_rise")[:1]:
        draft.say(" Replaced so, head {head} costs most, ", head=names[id(costly[0])])
        draft.say("{worst:nats} nats", worst=float(costly[0]["nll_rise"]))
        ends = {f"worst_{end}": costly[0][f"nll_rise_{end}"] for end in ("low", "high")}
        draft.interval(ends, "worst", "nats").say(".")
    return flattered(draft, run).done()


def _mean(draft: Draft, run: RunFiles) -> None:
    """Say the sum of the rises under mean ablation, which is between, where it was measured."""
    for row in table_rows(run, "ablations.csv"):
        for side in "ab":
            if (row["test_family"], row[f"ablation_{side}"], row["quantity"]) == ("each:head", MEAN, "nll_rise"):
                draft.say("; set to their mean, by {mean:nats}", mean=float(row[f"sum_{side}"]))
                ends = {f"mean_{end}": row[f"sum_{side}_{end}"] for end in ("low", "high")}
                draft.interval(ends, "mean", "nats")
                return


def ablations_agree(run: RunFiles) -> Sentence | None:
    """Say whether single heads rank alike under each two ablations."""
    rows = [row for row in table_rows(run, "ablations.csv") if row["quantity"] == "nll_rise"]
    rows = [row for row in rows if row["test_family"] == "each:head" and not math.isnan(float(row["spearman"]))]
    if not rows:
        return None
    draft = Draft("ablations", judged_images(run))
    draft.say("Do kinds of ablation rank single heads alike? Rank correlation of their NLL rises: ")
    for place, row in enumerate(rows, start=1):
        prefix = f"{place}_"
        draft.say("; " if place > 1 else "")
        draft.say(
            "{first} and {second} {spearman:ratio}",
            prefix,
            first=str(row["ablation_a"]),
            second=str(row["ablation_b"]),
            spearman=float(row["spearman"]),
        )
        draft.interval(row, "spearman", "ratio", prefix)
    return draft.say(".").done()


def interactions(run: RunFiles) -> Sentence | None:
    """Say how many pairs cost something else together than the sum of their parts, by NLL rise."""
    kind = main_ablation(run)
    rows = [
        row for row in table_rows(run, "interactions.csv") if (row["ablation"], row["quantity"]) == (kind, "nll_rise")
    ]
    rows = [row for row in rows if row["kind"] == "pairwise" and not math.isnan(float(row["bh_q"]))]
    if not rows:
        return None
    real = [row for row in rows if float(row["bh_q"]) < SIGNIFICANT_Q]
    more = [row for row in real if float(row["interaction"]) > 0]
    draft = Draft("interactions", judged_images(run))
    draft.say("Do parts stand in for each other? Of {pairs:count} {what} ", pairs=len(rows), what=_pairs(rows))
    fill(draft.say("("), run, kind, MEAN_OF).say("), ")
    if not real:
        smallest = min(float(row["bh_q"]) for row in rows)
        draft.say("none has an NLL rise measurably other than the sum of its parts (smallest q {q:p}).", q=smallest)
        return draft.done()
    draft.say(
        "{more:count} {more:costs|cost} more together than the sum of both, as where one stands in for the other, ",
        more=len(more),
    )
    draft.say("and {less:count} less (by NLL rise, q below 0.05). ", less=len(real) - len(more))
    largest = max(real, key=lambda row: abs(float(row["interaction"])))
    draft.say("The largest difference is that of {mask}: ", mask=str(largest["mask"]))
    draft.say("{both:nats} nats together, ", both=float(largest["rise_both"]))
    draft.say("{sum:nats} in sum, ", sum=float(largest["rise_a"]) + float(largest["rise_b"]))
    draft.say("{interaction:nats} between them", interaction=float(largest["interaction"]))
    return draft.interval(largest, "interaction", "nats").say(".").done()


def _pairs(rows: Sequence[Row]) -> str:
    """Return what pairs are of."""
    heads = all(not math.isnan(float(row[name])) for row in rows for name in ("head_a", "head_b"))
    layers = all(not math.isnan(float(row[name])) for row in rows for name in ("layer_a", "layer_b"))
    noun = "pair" if len(rows) == 1 else "pairs"
    return f"{noun} of {'heads' if heads else 'heads or layers' if layers else 'sets of heads'}"


def shapley(run: RunFiles) -> Sentence | None:
    """Say which heads, or layers, are worth most as one of all."""
    kind = main_ablation(run)
    rows = [row for row in table_rows(run, "shapley.csv") if (row["ablation"], row["quantity"]) == (kind, "nll_rise")]
    players = "heads" if any(row["players"] == "heads" for row in rows) else "layers"
    rows = [row for row in rows if row["players"] == players and math.isfinite(float(row["value"]))]
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: -float(row["value"]))
    draft = Draft("shapley", judged_images(run))
    fill(draft.say("As one of all (Shapley values: the mean over orders of removal, "), run, kind, MEAN_OF).say("), ")
    draft.say("worth most are ")
    for place, row in enumerate(ordered[:SHOWN_PLAYERS], start=1):
        draft.say("; " if place > 1 else "")
        if players == "heads":
            draft.say("head {head}", head=f"{row['layer']}.{row['head']:.0f}")
        else:
            draft.say("layer {layer:count}", f"{place}_", layer=int(row["layer"]))
        draft.say(" with ")
        draft.say("{value:nats} nats", f"{place}_", value=float(row["value"]))
        draft.interval(row, "value", "nats", f"{place}_")
    total = sum(float(row["value"]) for row in rows)
    draft.say(
        ". All {count:count} add up to {total:nats} nats, the rise without any head", count=len(rows), total=total
    )
    unclear = sum(float(row["value_low"]) <= 0 <= float(row["value_high"]) for row in rows)
    return draft.say("; for {unclear:count} of them the interval holds 0.", unclear=unclear).done()
