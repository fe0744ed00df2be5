"""A model that is really smaller: what it lost, how fast it is, the point that was chosen, what was folded."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from headprobe.masks.ablations import LINEAR, ZERO
from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import LOSSES, SCRIPTS, by_column, head_name, of_runs
from headprobe.run.load import PRUNED, RunFiles

SPEED = "speed_batch_"
"""How columns of the curve begin that hold latencies of sets: the batch size follows, and `_least`, `_most`."""


def pruned(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the smaller models, from `pruned.json` and `masks.csv`."""
    found = of_runs(runs, _pruned)
    if found is None:
        return None
    return Section(
        key="pruned",
        title="The smaller model",
        short="Smaller",
        look_at=(
            "What the model lost by the heads that are gone for good (the ring), what fewer or more of them would have "
            "cost, and how much faster it is really."
        ),
        definition=(
            "The smaller model's logits are the masked model's, so it loses what the mask loses, paired with the whole "
            "model on the same images, with a 95% interval; the speed is the median of the ratios of latencies in "
            "interleaved pairs, its bar the smallest and the largest."
        ),
        link="prune.md#what-happens",
        data={"runs": found},
        sources=(PRUNED, "masks.csv", "masks.json"),
        scripts=SCRIPTS,
    )


def _pruned(run: RunFiles) -> dict[str, Any] | None:
    made = run.document(PRUNED)
    if not made:
        return None
    mask, chosen_by = made["mask"], made.get("chosen_by", {})
    gone = {int(layer): heads for layer, heads in mask["masked_heads"].items()}
    count = sum(map(len, gone.values()))
    calibration = made["calibration"] or {}
    return {
        "heads": sum(mask["heads_per_layer"]),
        "heads_per_layer": mask["heads_per_layer"],
        "gone": [head_name(layer, head) for layer, heads in gone.items() for head in heads],
        "count": count,
        "ablation": made["ablation"],
        "folded": _folded(made, gone),
        "fitted_on": calibration.get("images"),
        "most_pp": chosen_by.get("keep_top1_pp"),
        "wanted": {"speed": chosen_by.get("speed"), "batch": chosen_by.get("batch")},
        "sets": _sets(run, made["curve"], count),
        "speeds": _speeds(made, count),
        **{name: made["cost"][name] for name in ("parameters", "multiply_adds", "device")},
        "proof": made["proof"],
    }


def _folded(made: Mapping[str, Any], gone: Mapping[int, Sequence[int]]) -> list[str]:
    """Return of each layer what stands for its heads that are gone; nothing where all are left."""
    mask, refitted = made["mask"], (made["calibration"] or {}).get("refitted")
    hit = sorted(gone)
    found = []
    for layer, heads in enumerate(mask["heads_per_layer"]):
        if layer not in gone:
            found.append("")
        elif len(gone[layer]) == heads:
            found.append("the layer is a bias")
        elif made["ablation"] == ZERO:
            found.append("nothing folded")
        elif made["ablation"] == LINEAR:
            found.append("weight and bias" + (", refitted" if refitted and layer != hit[0] else ""))
        else:
            found.append("bias")
    return found


def _sets(run: RunFiles, curve: Mapping[str, Sequence[float]], count: int) -> dict[str, Any]:
    """Return what each judged set lost, from the fewest heads up, and whether the sequence of tests came to it."""
    known = {int(heads): place for place, heads in enumerate(curve.get("heads", ()))}
    rows = []
    for row in run.masks[1:]:
        heads = len(run.heads[str(row["mask"])])
        tests = {
            name: curve[name][known[heads]] if name in curve and heads in known else np.nan
            for name in ("limit_pp", "tested")
        }
        rows.append({**row, "heads": heads, **tests, "chosen": int(heads == count)})
    rows.sort(key=lambda row: row["heads"])
    return by_column(rows, ("heads", "images", "top1", "nll", *LOSSES, "limit_pp", "tested", "chosen"))


def _speeds(made: Mapping[str, Any], count: int) -> dict[str, list[float]]:
    """Return how many times faster sets are: those that were tried, then the chosen one, which was measured again."""
    curve, rows = made["curve"], []
    for name in curve:
        if name.startswith(SPEED) and name.removeprefix(SPEED).isdigit():
            ends = (curve[f"{name}_least"], curve[f"{name}_most"])
            batch = int(name.removeprefix(SPEED))
            tried = zip(curve["heads"], curve[name], *ends, strict=True)
            rows += [(heads, batch, *speeds, *[np.nan] * 4, 0) for heads, *speeds in tried]
    for one in made["cost"]["latencies"]:
        ratios = [before / after for before, after in zip(one["before"], one["after"], strict=True)]
        times = (1000 * median(one["before"]), 1000 * median(one["after"]))
        pairs = (len(ratios), one.get("passes", 1))  # older files: one
        rows.append((count, one["batch"], median(ratios), min(ratios), max(ratios), *times, *pairs, 1))
    columns = tuple(f"speed{end}" for end in ("", "_least", "_most"))
    names = ("heads", "batch", *columns, "ms_before", "ms_after", "pairs", "passes", "chosen")
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
