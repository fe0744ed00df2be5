"""What differs between two runs: whether they judged the very same images, and what a reader must know besides."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headprobe.metrics.arrays import IntArray
from headprobe.run.load import SAME, RunFiles, calibration_of

OF_THE_MODEL = ("transform", "class_map", "classes_sha256", "restrict_classes", "chosen_among")
"""What `data` of run.json says of how a model takes the images: it may differ where the images are the same."""

ONE_FOR_ALL = ("precision", "on_bad_image")


def not_the_same_rows(first: RunFiles, second: RunFiles, images: IntArray, other_images: IntArray) -> str:
    """Return why two runs did not judge the very same images, as far as their files tell; nothing where they did.

    Args:
        first: A run.
        second: Another one.
        images: Images of each group of the first that could be read, `[groups]`.
        other_images: The same of the second.
    """
    one, other = (_judged(run.record.get("data") or {}) for run in (first, second))
    if first.path.resolve() != second.path.resolve():
        if not (_identified(one) and _identified(other)):
            return "run.json does not say which images these were: an older release wrote it"
        if differ := [name for name in _names(one, other) if one.get(name) != other.get(name)]:
            return f"they judged other images ({_in_words(differ, one, other)})"
    if not np.array_equal(images, other_images):
        return f"not the same images could be read ({int(images.sum()):,} and {int(other_images.sum()):,})"
    return ""


def _judged(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies the images that judged: where others calibrated, or the same, all of them did."""
    rule = str((data.get("rows") or {}).get("rule", SAME))
    return {**data, "rows": None if rule == SAME or rule.startswith("split:") else data["rows"]}


def _identified(data: Mapping[str, Any]) -> bool:
    """Return whether a run's data are known by more than where they were."""
    return bool(data.get("files") or data.get("labels_sha256") or data.get("revision"))


def _names(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what identifies images; local ones are the same wherever they lie."""
    local = bool(one.get("local") and other.get("local"))
    left_out = {*OF_THE_MODEL, *(["path"] if local else [])}
    return [name for name in dict.fromkeys([*one, *other]) if name not in left_out]


def _in_words(names: list[str], one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the first short thing that differs, with both values; long ones, as of files, by name alone."""
    for name in ("path", "split", "max_images", "rows", "images"):
        if one.get(name) != other.get(name):
            return f"{name}: {_short(one.get(name))} and {_short(other.get(name))}"
    return f"other {names[0]}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("rule", "other"))
    return "all" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def differences(first: Mapping[str, Any], second: Mapping[str, Any], fitted: bool) -> list[str]:
    """Return what differs between two runs that can be compared all the same, a sentence each.

    Args:
        first: `run.json` of a run.
        second: `run.json` of the other.
        fitted: Whether constants are compared that were fitted on images.
    """
    models, data = [one["model"] for one in (first, second)], [one.get("data") or {} for one in (first, second)]
    said = _models(*models) + _choices(*data)
    if fitted and calibration_of(first) != calibration_of(second):
        rules = " and ".join(calibration_of(one) or "nothing" for one in (first, second))
        said.append(f"constants were fitted on other kinds of rows: {rules}")
    if (
        any("resample" in str(one.get("ablation")) for one in (first, second))
        and first["ablation"] != second["ablation"]
    ):
        said.append(
            f"other draws: {first['ablation']} and {second['ablation']}; a mask counts with the mean of its own"
        )
    codes = [(one.get("versions") or {}).get("headprobe_source") for one in (first, second)]
    if codes[0] != codes[1]:
        said.append("other code of headprobe (versions in run.json)")
    for name in ONE_FOR_ALL:
        if first.get(name) != second.get(name):
            said.append(f"other {name}: {first.get(name)} and {second.get(name)}")
    return said


def _models(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    said = []
    if _title(one) != _title(other):
        said.append(f"other models: {_title(one)} and {_title(other)}")
    elif one.get("weights_sha256") != other.get("weights_sha256"):
        said.append(f"other weights of {_title(one)}")
    if bool(one.get("inner_norm")) != bool(other.get("inner_norm")):
        said.append("in one of the models a norm over all heads rescales the others when one is masked")
    if one.get("classifier") != other.get("classifier"):
        said.append(f"other classifiers: {_classifier(one)} and {_classifier(other)}")
    return said


def _choices(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return how the choice of a class and the preparation of images differ."""
    said = []
    among = [data.get("chosen_among") for data in (one, other)]
    if among[0] != among[1]:
        said.append(
            f"other choices: predictions are among {_short(among[0])} and {_short(among[1])} classes, and fewer are "
            "easier; --data.restrict_classes false chooses among all"
        )
    elif one.get("classes_sha256") != other.get("classes_sha256"):
        said.append("other classes: labels mean other numbers of the model")
    if one.get("transform") != other.get("transform"):
        said.append("images are prepared in other ways (transform in run.json)")
    return said


def _title(model: Mapping[str, Any]) -> str:
    return str(model.get("title", model["name"]))


def _classifier(model: Mapping[str, Any]) -> str:
    about = model.get("classifier")
    if isinstance(about, Mapping):
        return str(about.get("kind", about.get("name", "other")))
    return str(about or "the model's own")
