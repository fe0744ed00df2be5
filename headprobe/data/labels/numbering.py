"""From a dataset's labels to the model's class numbers, without trusting that two numberings happen to agree."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from headprobe.data.labels.class_map import ClassMap
from headprobe.data.labels.imagenet_names import ImageNetNames, some
from headprobe.data.sources.source import LabelColumn
from headprobe.errors import UsageError


# What a label column without class names holds, for messages.
def imagenet_names(classes: int) -> ImageNetNames | None:
    """Return the names of a model's classes if an ImageNet list has as many classes."""
    from timm.data import infer_imagenet_subset  # timm costs seconds to import, `--help` does not need it

    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else ImageNetNames(subset)


_KINDS = {"number": "plain numbers without class names", "text": "texts"}


class LabelError(ValueError):
    """One label that cannot be used; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Numbering:
    """Which class of the model each class of the dataset is.

    Attributes:
        to_model: Model class by dataset class number; empty where labels are text.
        by_name: Model class by the text of the label; empty where labels are numbers.
        classes: Number of classes of the model.
        names: Dataset name of each model class, "" where the dataset has none; None if the dataset names no classes.
    """

    to_model: tuple[int, ...]
    by_name: dict[str, int]
    classes: int
    names: list[str] | None

    def __call__(self, label: object) -> int:
        """Return the model class of a cell of the label column.

        Raises:
            LabelError: It has none.
        """
        if label is None:
            raise LabelError("there is no label in this row")
        if isinstance(label, str):
            if label not in self.by_name:
                raise LabelError(f"label {label!r} is not in the class map")
            return self.by_name[label]
        if not isinstance(label, int) or isinstance(label, bool):
            raise LabelError(f"label {label!r} is not a whole number")
        if not 0 <= label < len(self.to_model):
            raise LabelError(f"label {label} outside 0..{len(self.to_model) - 1}")
        return self.to_model[label]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the class of every label."""
        content = json.dumps([self.to_model, sorted(self.by_name.items()), self.classes, self.names])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def valid_classes(self) -> list[int] | None:
        """Sorted model classes that the dataset has, None if it has them all."""
        present = sorted({*self.to_model, *self.by_name.values()})
        return present if len(present) < self.classes else None


def number_labels(column: LabelColumn, classes: int, class_map: ClassMap | None) -> Numbering:
    """Decide which class of the model each class of the dataset is.

    A class map decides, if there is one. A model with as many classes as ImageNet or one of its larger lists is taken
    for a model of that list: names are looked up, WordNet ids and words alike. For another model a dataset with as many
    named classes is taken as it is.

    Args:
        column: How the dataset labels its images.
        classes: Classes of the model.
        class_map: What the user gave, None for nothing.

    Raises:
        UsageError: None of these holds, or the class map does not fit; the message names both numbers of classes.
    """
    if class_map is not None:
        return _from_map(column, classes, class_map)
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
        _check_numbers(names)
        if imagenet is None or int(names[-1]) == classes - 1:  # 1 to 1000 is another numbering of ImageNet's
            return _numbering(names, range(classes), classes)
    if imagenet is not None and len(names) <= classes:
        return _numbering(names, imagenet.match(names), classes)
    if len(names) != classes:
        raise UsageError(
            f"the dataset has {len(names)} classes and the model {classes}: give --data.class_map a file that says "
            f"which is which, a model of {len(names)} classes, or another --data.path, got {some(names)}"
        )
    return _numbering(names, range(classes), classes)


def _numbering(names: Sequence[str] | None, to_model: Sequence[int], classes: int) -> Numbering:
    """Return a numbering by number, in which a model class with several dataset classes has all their names."""
    named = [""] * classes if names is not None else None
    for name, model_class in zip(names or (), to_model, strict=False):
        if named is not None:
            named[model_class] = f"{named[model_class]} / {name}" if named[model_class] else name
    return Numbering(tuple(to_model), {}, classes, named)


def _check_numbers(names: Sequence[str]) -> None:
    """Refuse names that are numbers sorted as texts (0, 1, 10, 100, ...): their order is not the numbers' own."""
    if list(names) != sorted(names, key=int):
        raise UsageError(
            f"the dataset's classes are named by numbers that stand in the order of texts ({some(names, 3)}): give "
            "--data.class_map identity if the names are the model's class numbers (ImageNet-V2), else a file"
        )


def _from_map(column: LabelColumn, classes: int, class_map: ClassMap) -> Numbering:
    class_map.check_range(classes)
    if column.kind == "text":
        by_name = class_map.by_name()
        names = [""] * classes
        for name, model_class in by_name.items():
            names[model_class] = name
        return Numbering((), by_name, classes, names)
    return _numbering(column.names, class_map.by_number(column.names, classes), classes)
