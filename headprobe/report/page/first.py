"""The first screen: model and data in a line, the answer in sentences, a table of what was measured; and the last."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from scipy.stats import binomtest

from headprobe.run.load import Row, RunFiles
from headprobe.text import counted


class Fact(NamedTuple):
    """A cell of the summary."""

    name: str  #: what was measured
    value: str  #: the number
    detail: str = ""  #: its interval, or what it is of


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: its model, and its directory where several have the same."""
    titles = [model_of(run) for run in runs]
    often = Counter(titles)
    return [
        f"{title} ({run.path.name})" if often[title] > 1 else title for title, run in zip(titles, runs, strict=True)
    ]


def model_of(run: RunFiles) -> str:
    """Return what titles call a run's model. Runs of before have only a name."""
    model = run.record["model"]
    return str(model.get("title", model["name"]))


def data_of(run: RunFiles) -> str:
    """Return the data in a line: which they are, how many images judged, and how many chose."""
    data = run.record.get("data") or {}
    where = str(data.get("path", "unknown data"))
    split = f" ({data['split']})" if data.get("split") else ""
    judged = counted(int(run.masks[0]["images"]), "image")
    return f"{where}{split}, {judged} judged" + (f"; constants {run.fitted_in_words}" if run.fitted_in_words else "")


def facts_of(run: RunFiles) -> list[Fact]:
    """Return the summary of a run: the baseline, the images, the heads, and the largest drops that were measured."""
    baseline = run.masks[0]
    images, right = int(baseline["images"]), int(baseline["top1_count"])
    heads = [int(number) for number in run.record["model"]["heads_per_layer"]]
    limits = binomtest(right, images).proportion_ci(method="wilson") if images else None
    return [
        Fact("Baseline top-1", f"{100 * right / images:.1f}%" if images else "none", _percent(limits)),
        Fact("Images judged", f"{images:,}"),
        Fact("Heads", f"{sum(heads):,}", f"in {counted(len(heads), 'layer')}"),
        Fact("Masks scored", f"{len({str(row['mask']) for row in run.masks[1:]}):,}", _ablations(run)),
        *_largest(run),
    ]


def _percent(limits: Any) -> str:
    """Return Wilson's interval of the accuracy in words."""
    return f"95% interval {100 * limits.low:.1f} to {100 * limits.high:.1f}" if limits is not None else ""


def _ablations(run: RunFiles) -> str:
    """Return the ablations of a run."""
    return ", ".join(dict.fromkeys(str(row["ablation"]) for row in run.masks[1:]))


LARGEST = {
    "by_layer": "Largest drop, one layer",
    "by_index": "Largest drop, one index",
    "by_head": "Largest drop, one head",
}
"""Curves whose largest drop the summary shows."""


def _largest(run: RunFiles) -> Iterator[Fact]:
    """Yield the largest drop of each kind of set under the first ablation."""
    if len(run.masks) < 2:
        return
    first = [row for row in run.masks[1:] if row["ablation"] == run.masks[1]["ablation"] and not row["draw"]]
    for curve, name in LARGEST.items():
        rows = [row for row in first if _kind(run, str(row["mask"])) == curve]
        if len(rows) > 1:
            yield Fact(name, *_drop(max(rows, key=lambda row: float(row["drop_pp"]))))


def _kind(run: RunFiles, mask: str) -> str:
    """Return which kind of set a mask is."""
    return "by_head" if len(run.heads[mask]) == 1 else run.curves[mask][0]


def _drop(row: Row) -> tuple[str, str]:
    """Return a drop in points, and the mask with the drop's interval."""
    low, high = float(row["drop_low_pp"]), float(row["drop_high_pp"])
    return f"{float(row['drop_pp']):.1f} points", f"{row['mask']}: {low:.1f} to {high:.1f}"


def first_screen(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return for each run what the first screen and the end of the page write."""
    return [_first(run, name) for run, name in zip(runs, names_of(runs), strict=True)]


def _first(run: RunFiles, name: str) -> dict[str, Any]:
    """Return one run's texts."""
    return {
        "name": name,
        "data": data_of(run),
        "sentences": [],
        "notices": [],
        "provenance": [],
        "command": str(run.record.get("command", "")),
        "facts": {fact.name: fact for fact in facts_of(run)},
    }
