"""From a dataset's labels to the model's class numbers, without trusting that two numberings happen to agree."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headprobe.data.labels.class_map import BY_NAME, IDENTITY, UNKNOWN, ClassMap, check_different, word_for
from headprobe.data.labels.class_order import (
    composed,
    count_of,
    in_order,
    order_in_doubt,
    places_of,
    plain,
    plain_places,
)
from headprobe.data.labels.imagenet_names import ImageNetNames
from headprobe.data.sources.source import LabelColumn, some
from headprobe.errors import UsageError
from headprobe.text import counted

# What a label column without class names holds, for messages.
_KINDS = {"number": "plain numbers without class names", "text": "texts"}

MODEL_NAMES = "by name, the model names its classes"
BY_POSITION = "by position, the dataset's k-th class is the model's k-th"


def imagenet_names(classes: int) -> ImageNetNames | None:
    """Return the names of a model's classes if an ImageNet list has as many classes."""
    from timm.data import infer_imagenet_subset  # timm costs seconds to import, `--help` does not need it

    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else ImageNetNames(subset)


NOT_NEEDED = "labels are not read: nothing classifies (--model.classifier none)"

UNLABELLED = -1
"""Class of a row without a label, where none is needed; data sets write -1 for it too."""


class LabelError(ValueError):
    """One label that cannot be used; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Numbering:
    """Which class of the model each class of the dataset is.

    Attributes:
        to_model: Model class by dataset class number, `UNKNOWN` for a number that is no class; empty where labels are
            text.
        by_name: Model class by the text of the label; empty where labels are numbers.
        classes: Number of classes of the model.
        names: Dataset name of each model class, "" where the dataset has none; None if the dataset names no classes.
        matched: How the classes were matched, in words.
        doubtful: Whether another way to match them is as plausible as this one.
        by_plain_name: The same but for case, `_` and `-`, where the texts are a list of the model's names.
        unlabelled: Whether a row without a label, or with -1, is of class `UNLABELLED`; else it is an error.
        left_out: Model classes whose images are not used.
        strangers: Dataset class numbers, of the split that calibrates, of classes that the judged split has not; their
            images are of class `UNLABELLED`.
    """

    to_model: tuple[int, ...]
    by_name: dict[str, int]
    classes: int
    names: list[str] | None
    matched: str = ""
    doubtful: bool = False
    by_plain_name: dict[str, int] = field(default_factory=dict)
    unlabelled: bool = False
    left_out: frozenset[int] = frozenset()
    strangers: frozenset[int] = frozenset()

    def class_of(self, text: str) -> int | None:
        """Return the model class of a label that is a text, None if it has none."""
        found = self.by_name.get(text)
        return self.by_plain_name.get(plain(composed(text))) if found is None else found

    def __call__(self, label: object) -> int:
        """Return the model class of a cell of the label column.

        Raises:
            LabelError: It has none, or one that is left out.
        """
        found = self._number(label)
        if found in self.left_out:
            raise LabelError(f"{name_of(found, self.names)} has no calibration image")
        return found

    def _number(self, label: object) -> int:
        missing = label is None or label != label  # NaN, an empty cell of pandas
        if self.unlabelled and (missing or label == UNLABELLED):
            return UNLABELLED
        if missing:
            raise LabelError("there is no label in this row")
        if isinstance(label, str) and not self.by_name and label.isdecimal():  # numbers as texts, with `identity`
            label = int(label)
        if isinstance(label, str):
            found = self.class_of(label)
            if found is None:
                where = "among the model's class names" if self.matched == MODEL_NAMES else "in the class map"
                raise LabelError(f"label {label!r} is not {where}")
            return found
        if isinstance(label, float) and label.is_integer():  # so pandas writes numbers where a cell is empty
            label = int(label)
        if not isinstance(label, int) or isinstance(label, bool):
            raise LabelError(f"label {label!r} is not a whole number")
        if label in self.strangers:
            return UNLABELLED
        inside = 0 <= label < len(self.to_model)
        if not inside and UNKNOWN not in self.to_model:
            raise LabelError(f"label {label} outside 0..{len(self.to_model) - 1}")
        if not inside or self.to_model[label] == UNKNOWN:
            raise LabelError(f"label {label} is not in the class map")
        return self.to_model[label]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the class of every label."""
        content = json.dumps(
            [self.to_model, sorted(self.by_name.items()), self.classes, self.names, bool(self.by_plain_name)]
        )
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def valid_classes(self) -> list[int] | None:
        """Sorted model classes that the dataset has, None if it has them all."""
        present = sorted({*self.to_model, *self.by_name.values()} - {UNKNOWN})
        return present if len(present) < self.classes else None


def name_of(number: int, names: Sequence[str] | None) -> str:
    """Return the name of a class in words, or its number where it has none."""
    return f"class {names[number] if names and names[number] else number}"


def number_labels(
    column: LabelColumn,
    classes: int,
    class_map: ClassMap | None,
    model_names: Sequence[str] | None = None,
    trains: bool = False,
) -> Numbering:
    """Decide which class of the model each class of the dataset is.

    A class map decides, if there is one, then the model's own class names. A model with as many classes as ImageNet or
    one of its larger lists is taken for a model of that list: names are looked up, WordNet ids and words alike. For
    another model a dataset with as many named classes is taken as it is, but for class folders whose names torchvision
    and timm sort in different orders.

    Args:
        column: How the dataset labels its images.
        classes: Classes of the model.
        class_map: What the user gave, None for nothing.
        model_names: Names of the model's classes ("" for one without), None where it does not name them.
        trains: Whether the model is made from these data, so that any order is right.

    Raises:
        UsageError: None of these holds, or the class map does not fit; the message names both numbers of classes.
    """
    if column.kind == "none":
        return Numbering((), {}, 0, None, NOT_NEEDED, unlabelled=True)
    if class_map is not None:
        return from_map(column, classes, class_map)
    if model_names is not None and any(model_names):
        numbering = _by_model_names(column, classes, model_names)
        if numbering is not None:
            return numbering
    names = column.names
    if names is None:
        raise UsageError(
            f"the dataset's labels are {_KINDS[column.kind]}, so nothing says which of the model's {classes} classes "
            "they are: give --data.class_map a file"
            + (", or the word identity if they are the model's own numbers" if column.kind == "number" else "")
            + ", got none"
        )

    imagenet = imagenet_names(classes)
    if len(names) == classes and all(name.isdecimal() for name in names):
        if len(set(map(int, names))) < len(names):
            check_different(names)
        _check_numbers(names)
        if imagenet is None or int(names[-1]) == classes - 1:  # 1 to 1000 is another numbering of ImageNet's
            return number_by(names, range(classes), classes, BY_POSITION)
    if imagenet is not None and len(names) <= classes:
        return number_by(names, imagenet.match(names, word_for(column, classes)), classes, imagenet.says(names))
    if len(names) != classes:
        raise UsageError(
            f"the dataset has {count_of(len(names))} and the model {classes}: give --data.class_map a file that says "
            f"which is which, a model of {count_of(len(names))}, or another --data.path, got {some(names)}"
        )
    return _by_position(column, names, trains)


def _by_position(column: LabelColumn, names: Sequence[str], trains: bool) -> Numbering:
    """Return the numbering of as many classes as the model has, if their order is sure.

    Raises:
        UsageError: These are class folders, and the order of their names is not the same for torchvision and timm.
    """
    doubt = "" if trains else order_in_doubt(names)
    if doubt and not column.numbered:
        raise UsageError(
            f"nothing says in which order the model has its classes, {doubt}: give --data.class_map sorted (by "
            f"characters), natural (timm's), or a file with {BY_NAME}, got none"
        )
    # The data's own numbers: as a rule the model was trained on the same. Where they are just the names sorted by
    # characters, the data may have been made from class folders, and the model with timm's numbers of these.
    doubtful = bool(doubt) and list(names) == in_order(names, "sorted")
    matched = BY_POSITION
    if doubtful:
        matched += f" and the data's own order is taken: {doubt} (--data.class_map natural if the model has that)"
    return number_by(names, range(len(names)), len(names), matched, doubtful)


def of_other_split(
    judged: Numbering, column: LabelColumn, other: LabelColumn, class_map: ClassMap | None, restrict: bool
) -> Numbering:
    """Return the numbering of the split that calibrates, whose images may have no label, as constants need none.

    Each split counts its own classes, so those of the other are found by name: its first folder may be another class.

    Args:
        judged: The numbering of the split that is judged.
        column: How that one labels its images.
        other: How the split that calibrates does.
        class_map: What the user gave; a file may name classes that only the other split has.
        restrict: Whether the model chooses among the classes of the judged split only.
    """
    numbering = replace(judged, unlabelled=True)
    if column.names is None or other.names is None or column.names == other.names:
        return numbering  # texts and plain numbers mean the same in every split
    known = {composed(name): number for name, number in zip(column.names, judged.to_model, strict=True)}
    if class_map is not None and isinstance(class_map.entries, dict) and not all(map(str.isdecimal, other.names)):
        of_map = {composed(name): number for name, number in class_map.entries.items() if not name.isdecimal()}
        known = of_map | known
    among = set(judged.to_model) if restrict else set(range(judged.classes))
    found = [number if number in among else UNKNOWN for number in (known.get(composed(name)) for name in other.names)]
    strangers = frozenset(number for number, of_model in enumerate(found) if of_model == UNKNOWN)
    return replace(numbering, to_model=tuple(found), strangers=strangers)


def number_by(
    names: Sequence[str] | None, to_model: Sequence[int], classes: int, matched: str, doubtful: bool = False
) -> Numbering:
    """Return a numbering by number, in which a model class with several dataset classes has all their names."""
    named = [""] * classes if names is not None else None
    for name, model_class in zip(names or (), to_model, strict=False):
        if named is not None:
            named[model_class] = f"{named[model_class]} / {name}" if named[model_class] else name
    return Numbering(tuple(to_model), {}, classes, named, matched, doubtful)


def _check_numbers(names: Sequence[str]) -> None:
    """Refuse names that are numbers sorted as texts (0, 1, 10, 100, ...): their order is not the numbers' own."""
    if list(names) != sorted(names, key=int):
        raise UsageError(
            f"the dataset's classes are named by numbers that stand in the order of texts ({some(names, 3)}): give "
            "--data.class_map identity if the names are the model's class numbers (ImageNet-V2), natural or sorted if "
            "its classes are these names in the order of numbers (timm) or of texts (torchvision), else a file, got "
            "none"
        )


def _by_model_names(column: LabelColumn, classes: int, model_names: Sequence[str]) -> Numbering | None:
    """Return the numbering by the names of the model's classes; None where the dataset or the model has no real names.

    Raises:
        UsageError: Some of the dataset's names are none of the model's.
    """
    if len({name for name in model_names if name}) < sum(map(bool, model_names)):
        return None  # two classes of one name
    if column.kind == "text":
        if _are_numbers(model_names):
            return None
        by_name = {name: number for number, name in enumerate(model_names) if name}
        loose = plain_places(by_name)
        return Numbering((), by_name, classes, list(model_names), MODEL_NAMES, by_plain_name=loose)
    names = column.names
    if names is None:
        return None
    places = places_of(names, model_names)
    unknown = [name for name, place in zip(names, places, strict=True) if place is None]
    if not unknown:
        return number_by(names, [place for place in places if place is not None], classes, MODEL_NAMES)
    if _are_numbers(model_names):
        return None
    imagenet = imagenet_names(classes)
    if imagenet is not None:
        return number_by(names, imagenet.match(names, word_for(column, classes)), classes, imagenet.says(names))
    raise UsageError(
        f"the model names its classes ({some(list(filter(None, model_names)))}), and these of the dataset's "
        f"{len(names)} are not among them: give --data.class_map a file {{class name: model class}}"
        f"{word_for(column, classes)}, got "
        f"{some(unknown)}"
    )


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether names only count (`LABEL_0`, `class 1`, `2`), as those that a tool fills in."""
    found = [re.fullmatch(r"(?:label|class)?[ _-]?0*(\d+)", name, re.IGNORECASE) for name in names]
    return all(match is not None and int(match[1]) == number for number, match in enumerate(found))


def check_texts(labels: Sequence[object], numbering: Numbering) -> None:
    """Check that at least one of the first labels of a dataset, if there are any, has a class.

    Raises:
        UsageError: None has: the whole dataset would be read for nothing.
    """
    texts = [label for label in labels if isinstance(label, str)]
    if texts and all(numbering.class_of(label) is None for label in texts):
        raise UsageError(
            f"none of the first {counted(len(texts), 'label')} is a class name that is known, {numbering.matched}: "
            f"give --data.class_map a file with {BY_NAME} (known: {some(list(numbering.by_name))}), "
            f"got {some(list(dict.fromkeys(texts)))}"
        )


PUBLISHED = {"a2d0b3a7d6a8360f": "ImageNet-A", "1bfdbfb1fe9bc564": "ImageNet-R"}
"""Data sets whose authors let a model choose among their own 200 classes, by a digest of these classes of ImageNet."""


def restricted(valid: Sequence[int], classes: int) -> str:
    """Return among which classes the model chooses, in words: of data that have only some of its classes."""
    among = (
        f"chosen among the {len(valid)} classes that the data has, of {classes}; --data.restrict_classes false for all"
    )
    known = PUBLISHED.get(hashlib.sha256(json.dumps(list(valid)).encode()).hexdigest()[:16])
    if known:
        return f"{among} (their choice is how the authors of {known} score it)"
    return f"{among} (as timm's validation chooses; among fewer the choice is easier, and drops differ)"


def from_map(column: LabelColumn, classes: int, class_map: ClassMap) -> Numbering:
    """Return the numbering that a class map says.

    Raises:
        UsageError: It does not fit the dataset or the number of classes.
    """
    if column.kind == "text" and not (column.decimal and class_map.origin == IDENTITY):
        by_name = class_map.by_name(classes)
        names = [""] * classes
        for name, model_class in by_name.items():
            names[model_class] = name
        loose = plain_places(by_name) if class_map.lists_model else {}
        return Numbering((), by_name, classes, names, class_map.says, by_plain_name=loose)
    return number_by(column.names, class_map.by_number(column, classes), classes, class_map.says)
