"""The first screen: model and data in a line, the answer in sentences, a table of what was measured; and the last."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from scipy.stats import binomtest

from headprobe.masks.ablations import FITTED
from headprobe.report.page.answer import Sentence, answer, notices, provenance
from headprobe.report.page.answers.selected import main_ablation
from headprobe.report.page.answers.wording import MINUS, listed
from headprobe.run.importance import single_head_masks
from headprobe.run.load import OTHER, SAME, Row, RunFiles, main_cost
from headprobe.text import counted


class Fact(NamedTuple):
    """A cell of the summary."""

    name: str  #: what was measured
    value: str  #: the number
    detail: str = ""  #: its interval, or what it is of


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: its model and, where several have the same, as much of its path as is needed."""
    titles = [model_of(run) for run in runs]
    often = Counter(titles)
    paths = [run.path.resolve().parts for run in runs]
    for parts in range(1, max(map(len, paths)) + 1):
        tails = ["/".join(path[-parts:]) for path in paths]
        names = [f"{title} ({tail})" if often[title] > 1 else title for title, tail in zip(titles, tails, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def model_of(run: RunFiles) -> str:
    """Return what titles call a run's model. Runs of before have only a name."""
    model = run.record["model"]
    return str(model.get("title", model["name"]))


def data_of(run: RunFiles) -> str:
    """Return the data in a line: which they are, how many images judged, and how many chose."""
    data = run.record.get("data") or {}
    where = str(data.get("path", "unknown data"))
    split = f" ({data['split']})" if data.get("split") else ""
    parts = [f"{where}{split}: {_judged(run)} judged", _chose(run), _size(run)]
    return "; ".join(part for part in parts if part)


def _judged(run: RunFiles) -> str:
    """Return how many images judged; of how many where `--data.max_images` left some out and the files tell."""
    data, images = run.record.get("data") or {}, int(run.masks[0]["images"])
    rows = [file.get("rows") if isinstance(file, dict) else None for file in data.get("files") or []]
    known = sum(int(row) for row in rows if row is not None)
    if data.get("max_images") is None or None in rows or known <= images:
        return counted(images, "image")
    return f"{images:,} of {counted(known, 'image')}"


def _chose(run: RunFiles) -> str:
    """Return which images fitted constants, scored heads and so chose orders; nothing where nothing was."""
    if run.calibration in ("", SAME, OTHER):
        return f"constants {run.fitted_in_words}" if run.fitted_in_words else ""
    kinds = {str(row["ablation"]).partition(":")[0] for row in run.masks[1:]}
    did = ["fitted constants"] if kinds & FITTED else []
    did += ["scored heads"] if (run.path / "scores.csv").is_file() else []
    did += (
        ["chose the orders by score"]
        if any("grow:calibration:" in str(s) for s in run.record.get("specs") or [])
        else []
    )
    others = counted(int(run.record.get("calibration_images") or 0), "other")
    return f"{others} {listed(did or ['were kept to calibrate'])}"


def _size(run: RunFiles) -> str:
    """Return the size of the images as the model gets them, and its patches, where the record has them."""
    model = run.record["model"]
    size = (model.get("data_config") or {}).get("input_size") or []
    patch = (model.get("options") or {}).get("patch_size")
    if len(size) != 3:
        return ""
    pixels = f"{size[1]} x {size[2]} pixels"
    fits = isinstance(patch, int) and patch > 0 and not (size[1] % patch or size[2] % patch)
    return pixels + (f" in {size[1] // patch} x {size[2] // patch} patches" if fits else "")


def facts_of(run: RunFiles) -> list[Fact]:
    """Return the summary of a run: the baseline, the images, the heads, and the largest drops that were measured."""
    baseline = run.masks[0]
    images, right = int(baseline["images"]), int(baseline.get("top1_count", 0))
    heads = [int(number) for number in run.record["model"]["heads_per_layer"]]
    limits = binomtest(right, images).proportion_ci(method="wilson") if images and run.labelled else None
    top1 = Fact("Baseline top-1", f"{100 * right / images:.1f}%" if images else "none", _percent(limits))
    return [
        top1 if run.labelled else Fact("Judged by", "features", "no classifier, no labels"),
        Fact("Images judged", f"{images:,}"),
        Fact("Heads", f"{sum(heads):,}", f"in {counted(len(heads), 'layer')}"),
        Fact("Masks scored", f"{len({str(row['mask']) for row in run.masks[1:]}):,}", _ablations(run)),
        *_largest(run),
    ]


def _percent(limits: Any) -> str:
    """Return Wilson's interval of the accuracy in words."""
    return f"95% interval {_points(100 * limits.low)} to {_points(100 * limits.high)}" if limits is not None else ""


def _points(value: float) -> str:
    """Return a number with one decimal, and the minus of prose; what rounds to 0 has no sign."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", MINUS)


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
    """Yield the largest drop of each kind of set, under the ablation that the sentences are about."""
    if len(run.masks) < 2 or not run.masks[0]["images"]:
        return
    kind = main_ablation(run)
    several = len({row["ablation"] for row in run.masks[1:]}) > 1
    first = [row for row in run.masks[1:] if row["ablation"] == kind and not row["draw"]]
    alone = set(single_head_masks(run.masks, run.heads).values())
    for curve, name in LARGEST.items():
        rows = [row for row in first if (row["mask"] in alone if curve == "by_head" else _curve(run, row) == curve)]
        if len(rows) > 1:
            largest = max(rows, key=lambda row: float(row[main_cost(row)]))
            value, detail = _drop(largest) if run.labelled else _moved(largest)
            called = name if run.labelled else name.replace("drop", "shift")
            yield Fact(called, value, f"{detail}, {kind}" if several else detail)


def _curve(run: RunFiles, row: Row) -> str:
    """Return the curve that a row's mask is on."""
    return run.curves[str(row["mask"])][0]


def _drop(row: Row) -> tuple[str, str]:
    """Return a drop in points, and the mask with the drop's interval."""
    low, high = float(row["drop_low_pp"]), float(row["drop_high_pp"])
    return f"{_points(float(row['drop_pp']))} points", f"{row['mask']}: {_points(low)} to {_points(high)}"


def _moved(row: Row) -> tuple[str, str]:
    """Return how far the feature moves as a part of its length, and the mask with the interval."""
    middle, low, high = (float(row[f"feature_distance{end}"]) for end in ("", "_low", "_high"))
    return f"{middle:.2f} of its length", f"{row['mask']}: {low:.2f} to {high:.2f}"


# -- the answer --

SHORT = (
    *("moved", "moved_layers", "moved_heads"),
    *("layers", "heads", "heads_tested", "useless", "random", "removable", "linear", "index", "distance", "scores"),
)
"""Sentences of the answer that the first screen begins with; all others stand below it."""

FEWEST = 6
"""With fewer of them others stand beside them."""

_END = re.compile(r"(?<=[.?!]) (?=[A-Z])|(?<=[?]) (?=[0-9])")
"""Where a sentence ends; numbers and names of heads have no blank after their points."""


class Said(NamedTuple):
    """A sentence of the answer as the page writes it."""

    key: str
    lead: str  #: the question that it answers, where it has one
    text: str


def _with_lead(key: str, text: str) -> Said:
    """Return a sentence with its question apart."""
    lead, *rest = _END.split(text, maxsplit=1)
    return Said(key, lead, rest[0]) if rest and lead.endswith("?") else Said(key, "", text)


def short_answer(sentences: Sequence[Sentence]) -> list[Said]:
    """Return the beginning of the sentences that matter most: what was measured, without what else is known of it."""
    first = [sentence for sentence in sentences if sentence.key in SHORT]
    others = [sentence for sentence in sentences if sentence.key not in SHORT][: max(0, FEWEST - len(first))]
    chosen = [sentence for sentence in sentences if sentence in first or sentence in others]
    said = [_with_lead(sentence.key, sentence.text) for sentence in chosen]
    return [one._replace(text=_END.split(one.text, maxsplit=1)[0]) for one in said]


def first_screen(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return for each run what the first screen and the end of the page write."""
    return [_first(run, name) for run, name in zip(runs, names_of(runs), strict=True)]


def _first(run: RunFiles, name: str) -> dict[str, Any]:
    """Return one run's texts."""
    sentences, known = answer(run), dict(provenance(run))
    return {
        "name": name,
        "data": data_of(run),
        "short": short_answer(sentences),
        "sentences": [_with_lead(sentence.key, sentence.text) for sentence in sentences],
        "notices": notices(run),
        "command": known.pop("command", ""),
        "provenance": list(known.items()),
        "facts": {fact.name: fact for fact in facts_of(run)},
    }
