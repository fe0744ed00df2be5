"""The sentence about orders of scores: how many heads can go, in the best of them."""

import math
import re
from collections.abc import Sequence

from headprobe.masks.ablations import LINEAR
from headprobe.report.page.answers.selected import MEAN_OF, fill, main_ablation
from headprobe.report.page.answers.wording import Draft, Sentence, flattered, judged_images, table_rows
from headprobe.run.load import Row, RunFiles


def removable(run: RunFiles) -> Sentence | None:
    """Say how many heads can go for 1 point in the best order of a score, under linear replacement if measured."""
    rows = [row for row in table_rows(run, "orders.csv") if _SCORED.fullmatch(str(row["order"]))]
    kind = LINEAR if any(row["ablation"] == LINEAR for row in rows) else main_ablation(run)
    rows = [row for row in rows if row["ablation"] == kind and not math.isnan(float(row["area"]))]
    if not rows:
        return None
    widest = max(int(row["most_removed"]) for row in rows)  # areas to another end are not comparable
    rows = [row for row in rows if int(row["most_removed"]) == widest]
    best = max(rows, key=lambda row: float(row["area"]))
    draft = Draft("removable", judged_images(run))
    fill(draft.say("Removed {order} (", order=_in_words(str(best["order"]))), run, kind, MEAN_OF).say("), ")
    _how_many(run, draft, best)
    _beside_others(draft, rows, best)
    return flattered(draft, run, "order of heads" in (run.record.get("decisions") or {})).done()


def _how_many(run: RunFiles, draft: Draft, best: Row) -> None:
    """Say how many heads can go for 1 point in the best order, and what they cost."""
    count, heads = int(best["removable_1pp"]), sum(run.record["model"]["heads_per_layer"])
    key = best["order"], best["ablation"], count
    point = next(
        (
            row
            for row in table_rows(run, "curves.csv")
            if (row["order"], row["ablation"], row["heads_removed"]) == key and count
        ),
        None,
    )
    draft.say("{removable_1pp:none} of {heads:count head} ", removable_1pp=count, heads=heads)
    if point is None:
        draft.say("can go for 1 point of top-1 accuracy.")
        return
    draft.say("{removable_1pp:costs|cost} ", removable_1pp=count)
    draft.say("{drop_pp:points} points of top-1 accuracy", drop_pp=float(point["drop_pp"]))
    draft.interval(point, "drop_pp", "points").say(", the most heads that cost at most 1 point")
    if not math.isnan(float(best["removable_1pp_surely"])):
        draft.say(
            "; by the upper limit of the interval {surely:none} can go for 1 point",
            surely=int(best["removable_1pp_surely"]),
        )
    draft.say(".")


def _beside_others(draft: Draft, rows: Sequence[Row], best: Row) -> None:
    """Say which orders were compared, how they were, and which are worse than random ones."""
    if len(rows) > 1:
        draft.say(
            " Of {orders:count order} by scores, this has the largest area under its accuracy curve, ", orders=len(rows)
        )
    else:
        draft.say(" Only {orders:count order} by a score was measured; the area under its accuracy curve is ", orders=1)
    draft.say("{area:ratio}", area=float(best["area"])).interval(best, "area", "ratio")
    if not math.isnan(float(best["minus_random"])):
        draft.say(", {minus_random:change} beside that of random orders", minus_random=float(best["minus_random"]))
        draft.interval(best, "minus_random", "ratio")
    draft.say("; {counts:count size} of sets {counts:was|were} measured.", counts=int(best["counts"]))
    if len(rows) > 1:
        draft.say(" The best was picked on the judged images, which flatters it.")
    worse = [row for row in rows if float(row["minus_random_high"]) < 0]
    for place, row in enumerate(sorted(worse, key=lambda row: -float(row["minus_random"])), start=1):
        lead = " Worse than random orders, by their areas, " + ("is " if len(worse) == 1 else "are ")
        draft.say(lead if place == 1 else " and " if place == len(worse) else ", ")
        draft.say("{order} with ", order=_in_words(str(row["order"])))
        draft.say("{minus_random:change}", f"worse_{place}_", minus_random=float(row["minus_random"]))
        draft.interval(row, "minus_random", "ratio", f"worse_{place}_")
    draft.say("." if worse else "")


_SCORED = re.compile(r"grow_(?P<column>.+)_(?P<end>least|most)(?P<anew>_rescored)?")
"""Orders by a column, without fixed clauses beside them."""


def _in_words(order: str) -> str:
    """Return an order as in a sentence: `least gradient_abs first`."""
    found = _SCORED.fullmatch(order)
    if not found:
        return order
    return f"{found['end']} {found['column']} first" + ", scored anew on the way" * (found["anew"] is not None)
