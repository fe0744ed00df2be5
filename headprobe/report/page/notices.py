"""What a reader must know before he believes the numbers of a run: what was left out, and what flatters."""

from collections.abc import Iterator

import numpy as np

from headprobe.masks.ablations import FITTED
from headprobe.report.page.answers.wording import judged_images, listed, table_rows
from headprobe.run.ablations import images_of
from headprobe.run.load import JUDGED_ON_SAME, OTHER, SAME, RunFiles
from headprobe.text import counted, ranges

FEW_IMAGES = 200
"""Below so many images intervals of the NLL may be too narrow, as docs/results.md shows."""

MOST_NAMED = 5

TOLD = (
    "classifier",
    "embedding",
    "weights made to fit",
    "names of classes",
    "options",
    "first layer",
    "image size",
    "norm behind the heads",
    "further attention",
    "resample",
    "optimal",
    "classes",
    "restricted classes",
    "images",
    "calibration",
    "order of heads",
    "few calibration images",
    "unread calibration images",
    "files left out",
    "images left out",
    "images without labels",
    "folders left out",
    "empty classes",
    "metadata",
    "folders in classes",
    "splits of the list",
    "hub cache",
    "parts of the split",
)
"""Decisions that changed which numbers come out and that someone may not expect (docs/decisions.md), in this order."""


def notices(run: RunFiles) -> list[str]:
    """Return what was left out or flatters, as plain text, what matters most first."""
    parts = (_ending, _images, _model, _calibration, _logits, _statistics, _memory, _decisions)
    return [notice for part in parts for notice in part(run)]


def _ending(run: RunFiles) -> Iterator[str]:
    status = run.record.get("status", "done")
    if status != "done":
        yield f"The run ended as {status}: its numbers may not be of all images."


def _images(run: RunFiles) -> Iterator[str]:
    images, bad = judged_images(run), int(run.record.get("bad_images") or 0)
    if bad and run.record.get("on_bad_image") == "wrong":
        yield f"{counted(bad, 'image')} could not be used and {_verb(bad)} as wrong under every mask (bad_images.csv)."
    elif bad:
        yield f"{counted(bad, 'image')} could not be used and {_verb(bad)} nowhere (bad_images.csv)."
    data = run.record["data"]
    if data.get("max_images") is not None and "images" not in run.record.get("decisions", {}):
        yield f"Not all images were scored: --data.max_images {data['max_images']}."
    if images < FEW_IMAGES and run.labelled:
        yield f"{counted(images, 'image')} judged: below {FEW_IMAGES} the intervals of the NLL rise may be too narrow."
    arrays = run.arrays("groups.npz")
    groups = images_of(arrays) if {"images", "feature_images"} & arrays.keys() else None
    if groups is not None and (there := int((groups > 0).sum())) < len(groups):
        yield (
            f"For intervals over differences of masks the images are put into {len(groups)} groups; "
            f"{len(groups) - there} of them got no image, so that {there} count."
        )


def _verb(number: int) -> str:
    return "counts" if number == 1 else "count"


def _model(run: RunFiles) -> Iterator[str]:
    model = run.record["model"]
    decided = str(run.record.get("decisions", {}).get("weights", ""))
    if decided.startswith("random"):
        yield f"The model was never trained: its weights are {decided}."
    elif not decided and model.get("pretrained") is False and model.get("weights") is None:
        yield "The model was never trained: its weights are random."


def _calibration(run: RunFiles) -> Iterator[str]:
    kinds = {str(row["ablation"]) for row in run.masks[1:]}
    fitted = [*sorted(kinds & FITTED), *(["scores"] if (run.path / "scores.csv").is_file() else [])]
    rules = {str(row.get("calibration", "")) for row in run.masks[1:]}  # runs of before have no such column
    if SAME in rules or run.calibration == SAME:
        yield (
            f"What is fitted or chosen ({listed(fitted) or 'orders'}) is {JUDGED_ON_SAME} "
            "(--data.calibration same): it flatters."
        )
    if OTHER in rules or run.calibration == OTHER:
        yield f"What is fitted ({listed(fitted) or 'orders'}) comes from an earlier run on other data."
    rows = table_rows(run, "importance.csv")
    if judged := sorted({str(row["score"]) for row in rows if row["rows"] == "judged"}):
        yield (
            f"{counted(len(judged), 'score')} of importance.csv were measured on the judged images themselves, "
            f"whose noise they may share: {_some(judged)}."
        )


def _some(names: list[str]) -> str:
    """Return the first names, and how many others there are."""
    others = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {others} others" if others > 0 else "")


def _logits(run: RunFiles) -> Iterator[str]:
    broken = [row for row in run.masks if int(row["nonfinite"])]
    if broken:
        most = max(int(row["nonfinite"]) for row in broken)
        names = list(dict.fromkeys(str(row["mask"]) for row in broken))
        what = "logits, which count as wrong," if run.labelled else "features, which are left out,"
        yield (
            f"NaN or infinite {what} in {counted(len(broken), 'row')} of masks.csv "
            f"(at most {counted(most, 'image')}): {_some(names)}."
        )
    if run.labelled:
        yield from _features(run)
    undefined = sum(not np.isfinite(float(row["nll_rise"])) for row in run.masks[1:]) if run.labelled else 0
    if undefined:
        yield f"{counted(undefined, 'row')} of masks.csv {_has(undefined)} no finite NLL rise."


def _features(run: RunFiles) -> Iterator[str]:
    """Say whose features are left out: `nonfinite` of a labelled run is of logits; old runs have no features."""
    arrays = run.arrays("groups.npz")
    if not {"images", "feature_images"} <= arrays.keys():
        return
    left_out = int(arrays["images"].sum()) - arrays["feature_images"].sum(axis=1)  # [1 + variants]
    masks = ["baseline", *(str(row["mask"]) for row in run.masks[1:])]
    broken = [mask for mask, count in zip(masks, left_out, strict=True) if count]
    if broken:
        yield (
            f"Features without a cosine or a distance, which are left out of these, in {counted(len(broken), 'row')} "
            f"of masks.csv (at most {counted(int(left_out.max()), 'image')}): {_some(list(dict.fromkeys(broken)))}."
        )


def _has(number: int) -> str:
    return "has" if number == 1 else "have"


def _statistics(run: RunFiles) -> Iterator[str]:
    for name, reasons in (run.record.get("undefined") or {}).items():
        for reason, layers in reasons.items():
            own = ranges(sorted(layers))
            yield f"{name} is not defined in layer{'s' if len(layers) != 1 else ''} {own}: {reason}."


def _memory(run: RunFiles) -> Iterator[str]:
    budgets = run.record.get("units_by_row_budget") or {}
    if len(budgets) > 1:
        yield "Memory ended during the run: some units were computed with fewer rows at a time; last digits may differ."


def _decisions(run: RunFiles) -> Iterator[str]:
    decisions = run.record.get("decisions") or {}
    for key in TOLD:
        if text := decisions.get(key):
            yield f"{key}: {plain(str(text))}"


HOW_HALVED = ", by a hash of unit and row"
"""Part of a decision that only the provenance tells."""


def plain(decision: str) -> str:
    """Return a decision without what only someone who repeats the run must know."""
    return decision.replace(HOW_HALVED, "")
