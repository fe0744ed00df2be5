"""The numbering of a dataset whose own classes are those that are chosen among: its classifier is fitted on it."""

from collections.abc import Mapping, Sequence
from typing import Any

from headprobe.data.labels.class_map import IDENTITY, ClassMap
from headprobe.data.labels.numbering import Numbering, from_map, name_of, number_by
from headprobe.data.sources.source import LabelColumn, Source, some
from headprobe.errors import UsageError
from headprobe.text import counted

OWN = "the dataset's own, which the classifier is fitted on"

_JOINED = " / "
"""What `number_by` puts between the names of classes that a map joins."""


def number_own(column: LabelColumn, class_map: ClassMap | None, asked: int | None) -> Numbering:
    """Return the numbering of the data's own classes, perhaps joined by a class map.

    Any order is right, as the classifier is fitted on the same numbers.

    Args:
        column: How the dataset labels its images.
        class_map: What the user gave: which classes are joined, and their numbers.
        asked: The number of classes that the user gave (--model.num_classes), None for none.

    Raises:
        UsageError: Nothing says how many classes there are, or the options do not fit the data.
    """
    if class_map is None and column.names is not None:
        _refuse_others(len(column.names), asked)
        return number_by(column.names, range(len(column.names)), len(column.names), OWN)
    if class_map is None or (class_map.origin == IDENTITY and column.names is None):
        if column.kind == "text" or asked is None:
            raise UsageError(_unknown(column))
        return number_by(None, range(asked), asked, f"{OWN}, {asked} by --model.num_classes")
    classes = asked or _classes_of(class_map, column)
    _refuse_gaps(class_map, classes)
    return from_map(column, classes, class_map)


def refuse_other_numbers(numbering: Numbering, own: Sequence[str], class_map: ClassMap, fitted: bool) -> None:
    """Refuse a class map under which classes of the data are others than the classifier says.

    Args:
        numbering: Of the data that are judged.
        own: Names of the classifier's classes, joined ones with ` / ` between them.
        class_map: What the user gave.
        fitted: Whether an earlier run fitted the classifier, with a class map of its own; else a file names its rows.

    Raises:
        UsageError: With the first class of the data that is another one.
    """
    before = {name: number for number, joined in enumerate(own) for name in joined.split(_JOINED) if name}
    now = dict(numbering.by_name)
    now |= {name: k for k, joined in enumerate(numbering.names or ()) for name in joined.split(_JOINED) if name}
    for name, number in now.items():
        if before.get(name, number) != number:
            why = (
                "the classifier of --calibration-file was fitted with another --data.class_map: give that one, or fit "
                "anew without --calibration-file"
                if fitted
                else "the file of --model.classifier names its classes, and the class map says otherwise: leave "
                "--data.class_map or the names in the file out"
            )
            raise UsageError(
                f"{why}, got {class_map.origin}, in which {name} is class {number} where it was class {before[name]}"
            )


def refuse_other_map(
    numbering: Numbering,
    source: Source,
    own: Sequence[str],
    class_map: ClassMap,
    fitted: bool,
    fitted_on: Mapping[str, Any],
) -> None:
    """Refuse a class map under which the classes of a classifier of an earlier run, or of a file, are others.

    Args:
        numbering: Of the data that are judged.
        source: Of the same data.
        own: Names of the classifier's classes, joined ones with ` / ` between them.
        class_map: What the user gave.
        fitted: Whether an earlier run fitted the classifier.
        fitted_on: The identity of the data that it was fitted on; nothing where that is not known.

    Raises:
        UsageError: With the first class that was another one, or with both where labels are plain numbers.
    """
    refuse_other_numbers(numbering, own, class_map, fitted)
    nameless = source.labels.kind == "number" and not any(own)
    if nameless and fitted_on.get("files") == source.identity["files"]:
        before = fitted_on.get("class_map")
        if before is not None and before != class_map.digest:
            raise UsageError(
                "the classifier of --calibration-file was fitted on these files with another --data.class_map: "
                f"give that one, or fit anew without --calibration-file, got {class_map.origin}"
            )


def refuse_unseen(
    unseen: Sequence[int], present: Sequence[int], class_names: Sequence[str] | None, skips: bool
) -> None:
    """Refuse to leave classes out that a fitted classifier does not know.

    Args:
        unseen: Those without a calibration image.
        present: Classes that are chosen among.
        class_names: Names of all classes, None where they have none.
        skips: Whether images that cannot be used are to be skipped.

    Raises:
        UsageError: They are not, or fewer than two classes are left.
    """
    gone = sorted(set(unseen) & set(present))
    names = some([name_of(number, class_names) for number in gone])
    of_all = f"{len(gone):,} of {counted(len(present), 'class')}"
    remedy = (
        "take more calibration images (--data.calibration_images, --data.calibration split:NAME), join classes "
        "(--data.class_map)"
    )
    if gone and not skips:
        raise UsageError(
            f"{of_all} have no calibration image, so the classifier does not know them: {remedy}, or give "
            f"--data.on_bad_image skip to leave their images out of all numbers, got {names}"
        )
    if len(present) - len(gone) < 2:
        raise UsageError(
            f"{of_all} have no calibration image, and there must be two classes to choose among: {remedy}, got {names}"
        )


def _classes_of(class_map: ClassMap, column: LabelColumn) -> int:
    """Return how many classes a class map makes."""
    if class_map.length is not None:
        return class_map.length
    if class_map.entries is not None:
        values = class_map.entries.values() if isinstance(class_map.entries, dict) else class_map.entries
        return 1 + max(values, default=-1)
    names: Sequence[str] = column.names or ()
    if class_map.origin == IDENTITY and names and all(name.isdecimal() for name in names):
        return 1 + max(map(int, names))
    return len(names)


def _refuse_gaps(class_map: ClassMap, classes: int) -> None:
    """Refuse a file that joins classes and skips a number: perhaps it counts from 1, or is another model's."""
    entries = class_map.entries
    if entries is None or class_map.lists_model:
        return
    values = set(entries.values() if isinstance(entries, dict) else entries)
    missing = [number for number in range(classes) if number not in values]
    if missing:
        raise UsageError(
            f"{class_map.origin}: a classifier that is fitted has the classes that the file numbers, 0 to "
            f"{classes - 1}, and no entry is {missing[0]}: count them without gaps, from 0, got "
            f"{counted(len(values), 'class')}"
        )


def _refuse_others(there: int, asked: int | None) -> None:
    if asked is not None and asked != there:
        raise UsageError(
            f"the classifier is fitted on the dataset's own {counted(there, 'class')}: leave --model.num_classes out, "
            f"or join classes with --data.class_map, got {asked}"
        )


def _unknown(column: LabelColumn) -> str:
    if column.kind == "text":
        return (
            "the dataset's labels are texts, and a classifier is fitted on classes that are known before: give "
            "--data.class_map a file {class name: number}, got none"
        )
    return (
        "the dataset's labels are plain numbers without class names, so nothing says how many classes the classifier "
        "has: give --model.num_classes N for labels 0 to N - 1, or --data.class_map a file {number: class}, got none"
    )
