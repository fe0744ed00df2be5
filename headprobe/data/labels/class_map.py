"""A class map: which class of the model each class of the dataset is, as the user says it."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headprobe.data.labels.class_order import ORDERS_OF, composed, count_of, in_order, order_in_doubt, places_of
from headprobe.data.sources.source import LabelColumn, some
from headprobe.errors import UsageError
from headprobe.text import counted

IDENTITY = "identity"
WORDS = (IDENTITY, *ORDERS_OF)
"""What may stand in place of a file."""

UNKNOWN = -1
"""Stands for the model class of a number that a class map does not name."""

MOST_NUMBERS = 10_000_000  # so many places are kept in memory

BY_NAME = "{class name: model class} or the model's class names in its order"
"""The two forms of a file that depend on no order of the dataset."""


@dataclass(frozen=True)
class ClassMap:
    """The content of a class-map file, or one of `WORDS`.

    Attributes:
        entries: Model class by dataset class: a list in the dataset's order, or an object by name or number. None for
            a word.
        origin: File name, or the word.
        lists_model: Whether the file names the model's classes in its order: its keys are never numbers of the dataset.
        length: How many names such a list has, None where it says the number of each.
        as_names: The same file read as the names of the model's classes, where a text file holds numbers alone.
    """

    entries: list[int] | dict[str, int] | None
    origin: str
    lists_model: bool = False
    length: int | None = None
    as_names: dict[str, int] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the content, whatever the file's layout."""
        content = self.origin if self.entries is None else self.entries
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def says(self) -> str:
        """How it matches classes, for the run's decisions."""
        if self.entries is not None:
            return f"by class map {self.origin}"
        if self.origin == IDENTITY:
            return "the dataset's numbers are the model's (--data.class_map identity)"
        return f"by position, the names in {ORDERS_OF[self.origin]} (--data.class_map {self.origin})"

    def by_name(self, classes: int) -> dict[str, int]:
        """Return the model class of each label text.

        Raises:
            UsageError: The file names no classes, or not those of the model.
        """
        found = self.entries if isinstance(self.entries, dict) else self.as_names
        if found is None:
            got = f"the word {self.origin}" if self.entries is None else "a list of numbers"
            raise UsageError(f"{self.origin}: labels that are texts need a file with {BY_NAME}, got {got}")
        self._check_length(classes, len(found) if found is self.as_names else self.length)
        self._check_range(found.values(), classes)
        return found

    def by_number(self, column: LabelColumn, classes: int) -> list[int]:
        """Return the model class of each dataset class, in the dataset's order.

        Where labels are plain numbers, those that a file by number does not name have `UNKNOWN`: they are no classes.

        Raises:
            UsageError: A class is missing, or one is named that the dataset does not have; or what the map says depends
                on the order of the dataset's names, which nothing says.
        """
        names = column.names
        if self.entries is None:
            return self._identity(column, classes) if self.origin == IDENTITY else self._by_order(column, classes)
        if isinstance(self.entries, list):
            return self._list(self.entries, column, classes)
        if names is None and self.lists_model:
            raise UsageError(
                f"{self.origin}: class names say nothing about labels that are plain numbers: give the model class of "
                f"each number, or the word {IDENTITY} if they are the model's own, got {some(list(self.entries))}"
            )
        self._check_length(classes, self.length)
        self._check_range(self.entries.values(), classes)
        return self._object(self.entries, column)

    # -- words -----------------------------------------------------------------------------------------------------

    def _identity(self, column: LabelColumn, classes: int) -> list[int]:
        """Return the numbers of the dataset, or the names of its classes where all of these are numbers."""
        names = column.names
        if names is None:
            return list(range(classes))
        if len(names) > classes:
            raise UsageError(f"--data.class_map {IDENTITY} needs at most {classes} dataset classes, got {len(names)}")
        if all(name.isdecimal() for name in names):
            numbers = [int(name) for name in names]
            check_different(names)
            if max(numbers) >= classes:
                raise UsageError(
                    f"--data.class_map {IDENTITY}: the model's classes are 0..{classes - 1}, got {max(numbers)}"
                )
            return numbers
        if not column.numbered and len(names) != classes:
            raise UsageError(
                f"--data.class_map {IDENTITY}: folders have numbers only where their names are numbers, and these are "
                f"{len(names)} of the model's {classes} classes: give a file with {BY_NAME}, got {some(names)}"
            )
        self._check_one_order(column)
        return list(range(len(names)))

    def _by_order(self, column: LabelColumn, classes: int) -> list[int]:
        """Return the place of each name in the order that the word names."""
        names = column.names
        if names is None:
            what = "texts" if column.kind == "text" else "plain numbers without class names"
            raise UsageError(f"--data.class_map {self.origin} sorts class names, and the labels are {what}, got none")
        if len(names) != classes:
            raise UsageError(
                f"--data.class_map {self.origin} needs as many dataset classes as the model has, {classes}: give a "
                f"file with {BY_NAME}, got {len(names)} ({some(names)})"
            )
        doubt = order_in_doubt(names)
        if self.origin == "natural" and doubt.startswith("timm"):
            raise UsageError(f"--data.class_map natural: {doubt}: give a file with {BY_NAME}, got natural")
        ordered = in_order(names, self.origin)
        return [ordered.index(name) for name in names]

    # -- files -----------------------------------------------------------------------------------------------------

    def _list(self, entries: list[int], column: LabelColumn, classes: int) -> list[int]:
        names = column.names
        if names is None:
            self._check_range(entries, classes)
            return entries
        as_names = self._as_names(names, classes)
        if as_names is not None and as_names != entries:
            if len(entries) == len(names) and max(entries) < classes:
                raise UsageError(
                    f"{self.origin}: these numbers are names of the dataset's classes too, so they may be the model's "
                    f"class names in its order or the model class of each dataset class: give {BY_NAME} as JSON, with "
                    f"names in quotes, got {some([str(entry) for entry in entries])}"
                )
            return as_names

        if len(entries) != len(names):
            raise UsageError(
                f"{self.origin}: must have one line for each of the dataset's "
                f"{count_of(len(names))}, got {len(entries)}"
            )
        self._check_range(entries, classes)
        # The same list, had the names been sorted as timm does.
        natural = dict(zip(in_order(names, "natural"), entries, strict=True))
        if [natural[name] for name in names] != entries:
            self._check_one_order(column)
        return entries

    def _as_names(self, names: Sequence[str], classes: int) -> list[int] | None:
        """Return the model class of each dataset class if numbers are names of the model's classes; None if not."""
        if self.as_names is None or len(self.as_names) != classes or not self.as_names.keys() >= set(names):
            return None
        return [self.as_names[name] for name in names]

    def _object(self, entries: dict[str, int], column: LabelColumn) -> list[int]:
        names = column.names
        if names is not None and self.lists_model:
            places = places_of(names, list(entries))
            if None not in places:
                return [list(entries.values())[place] for place in places if place is not None]
        numbers = self._numbered(entries, column)
        count = len(names) if names is not None else max(numbers, default=-1) + 1
        if names is None and 0 < count <= MOST_NUMBERS:
            return [numbers.get(number, UNKNOWN) for number in range(count)]
        if names is None:
            raise UsageError(
                f"{self.origin}: labels that are plain numbers must be below {MOST_NUMBERS:,}: count the classes from "
                f"0, got {count - 1}"
            )
        missing = [names[number] for number in range(count) if number not in numbers]
        if missing or not count:
            known = {composed(name) for name in names}
            others = [key for key in entries if composed(key) not in known]
            raise UsageError(
                f"{self.origin}: must name every class of the dataset"
                + (f" (it names {some(others)}, which the dataset does not have)" if others else "")
                + ("; to give names with numbers, write {class name: model class} as JSON" if _pairs(others) else "")
                + f", got none for {missing[:5]}"
            )
        return [numbers[number] for number in range(count)]

    def _numbered(self, entries: dict[str, int], column: LabelColumn) -> dict[int, int]:
        """Return model classes by dataset number; an entry such as "7" is looked up as a name before as a number.

        A name that the dataset does not have is another class of the model.
        """
        names = column.names
        numbers: dict[int, int] = {}
        positions = {composed(name): number for number, name in enumerate(names or ())}
        # Where names are numbers, each key is a name.
        count = names is None or not (self.lists_model or all(name.isdecimal() for name in names))
        for key, value in entries.items():
            number = positions.get(composed(key), -1)
            if number < 0 and count and (names is None or key.isdecimal()):
                number = self._number(key, column)
            if number in numbers:
                raise UsageError(f"{self.origin}: each class may stand once, got {key} again")
            if number >= 0:
                numbers[number] = value
        return numbers

    def _number(self, key: str, column: LabelColumn) -> int:
        """Return the number of the dataset's class that a key is."""
        if not key.isdecimal() or (column.names is not None and int(key) >= len(column.names)):
            raise UsageError(f"{self.origin}: the dataset has no such class, got {key}")
        self._check_one_order(column)
        return int(key)

    def _check_range(self, values: Iterable[int], classes: int) -> None:
        for value in values:
            if not 0 <= value < classes:
                raise UsageError(f"{self.origin}: model classes must be in 0..{classes - 1}, got {value}")

    def _check_length(self, classes: int, length: int | None) -> None:
        if length is not None and length != classes:
            raise UsageError(
                f"{self.origin}: a list of class names must name each of the model's {classes} classes in its order "
                f"(or be an object {{class name: model class}}), got {counted(length, 'name')}"
            )

    def _check_one_order(self, column: LabelColumn) -> None:
        """Refuse what counts class folders where these have two orders."""
        doubt = "" if column.numbered or column.names is None else order_in_doubt(column.names)
        if doubt:
            what = f"--data.class_map {IDENTITY}" if self.entries is None else self.origin
            raise UsageError(
                f"{what}: nothing says in which order the dataset's classes are counted, {doubt}: give "
                + ("--data.class_map sorted or natural, or " if self.entries is None else "")
                + f"a file with {BY_NAME}, got {_form(self.entries)}"
            )


def check_different(names: Sequence[str]) -> None:
    """Refuse names that are numbers where two are the same one (`1` and `01`)."""
    first: dict[int, str] = {}
    for name in names:
        other = first.setdefault(int(name), name)
        if other != name:
            raise UsageError(
                "two of the dataset's classes have one number: rename one, or give --data.class_map a file with "
                f"{BY_NAME}, got {other}, {name}"
            )


def _pairs(lines: Sequence[str]) -> bool:
    """Return whether all names look like lines of a name and a number (`cat 0`, `0,cat`)."""
    return bool(lines) and all(re.fullmatch(r"\d+[\s,;:=]+\S.*|.*\S[\s,;:=]+\d+", line) for line in lines)


def word_for(column: LabelColumn, classes: int) -> str:
    """Return, as the end of a remedy, the word that would be taken for these labels; empty where none would be."""
    names = column.names or ()
    if not column.numbered and len(names) == classes and order_in_doubt(names):
        return ", or the word sorted or natural if the model has these classes in that order"
    try:
        ClassMap(None, IDENTITY).by_number(column, classes)
    except UsageError:
        return ""
    if names and all(name.isdecimal() for name in names):
        return ", or the word identity if their names are the model's own numbers"
    return ", or the word identity if the dataset's k-th class is the model's k-th"


def _form(entries: Sequence[int] | dict[str, int] | None) -> str:
    if entries is None:
        return IDENTITY
    return "an object by number" if isinstance(entries, dict) else "a list of numbers"
