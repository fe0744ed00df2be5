"""The class-map file: which class of the model each class of the dataset is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headprobe.errors import UsageError

IDENTITY = "identity"


CLASS_MAP_FORMS = (
    "a JSON or YAML list of model classes, an object {dataset class: model class}, or a text file with one per line, "
    f"or the word {IDENTITY}"
)


@dataclass(frozen=True)
class ClassMap:
    """The content of a class-map file.

    Attributes:
        entries: Model class by dataset class: a list in the dataset's order, or an object by name or number. None for
            `identity`: the dataset's numbers (its classes' names, where these are numbers) are the model's.
        origin: File name, for messages.
    """

    entries: list[int] | dict[str, int] | None
    origin: str

    @property
    def digest(self) -> str:
        """SHA-256 of the content, whatever the file's layout."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()

    def check_range(self, classes: int) -> None:
        """Check that every entry is a class of the model.

        Raises:
            UsageError: One is not.
        """
        values = self.entries.values() if isinstance(self.entries, dict) else self.entries or []
        for value in values:
            if not 0 <= value < classes:
                raise UsageError(f"{self.origin}: model classes must be in 0..{classes - 1}, got {value}")

    def by_name(self) -> dict[str, int]:
        """Return the model class of each label text.

        Raises:
            UsageError: The file is no object with names.
        """
        if not isinstance(self.entries, dict):
            raise UsageError(f"{self.origin}: labels that are texts need an object {{label: model class}}, got a list")
        return self.entries

    def by_number(self, names: Sequence[str] | None, classes: int) -> list[int]:
        """Return the model class of each dataset class, in the dataset's order.

        Raises:
            UsageError: A class is missing, or one is named that the dataset does not have.
        """
        if self.entries is None:
            return self._identity(names, classes)
        if isinstance(self.entries, list):
            if names is not None and len(self.entries) != len(names):
                raise UsageError(
                    f"{self.origin}: must have one line for each of the dataset's {len(names)} classes, "
                    f"got {len(self.entries)}"
                )
            return self.entries

        numbers = self._numbered(self.entries, names)
        count = len(names) if names is not None else max(numbers, default=-1) + 1
        missing = [names[number] if names else str(number) for number in range(count) if number not in numbers]
        if missing or not count:
            raise UsageError(f"{self.origin}: must name every class of the dataset, got none for {missing[:5]}")
        return [numbers[number] for number in range(count)]

    def _identity(self, names: Sequence[str] | None, classes: int) -> list[int]:
        """Return the numbers of the dataset, or the names of its classes where all of these are numbers."""
        if names is not None and len(names) > classes:
            raise UsageError(f"--data.class_map {IDENTITY} needs at most {classes} dataset classes, got {len(names)}")
        if names is not None and all(name.isdecimal() for name in names):
            numbers = [int(name) for name in names]
            if max(numbers) >= classes:
                raise UsageError(
                    f"--data.class_map {IDENTITY}: the model's classes are 0..{classes - 1}, got {max(numbers)}"
                )
            return numbers
        return list(range(classes if names is None else len(names)))

    def _numbered(self, entries: dict[str, int], names: Sequence[str] | None) -> dict[int, int]:
        """Return model classes by dataset number; an entry such as "7" is looked up as a name before as a number."""
        numbers: dict[int, int] = {}
        positions = {name: number for number, name in enumerate(names or ())}
        for key, value in entries.items():
            number = positions.get(key, int(key) if key.isdecimal() else -1)
            if number < 0 or (names is not None and number >= len(names)):
                raise UsageError(f"{self.origin}: the dataset has no such class, got {key}")
            if number in numbers:
                raise UsageError(f"{self.origin}: each class may stand once, got {key} again")
            numbers[number] = value
        return numbers


def read_class_map(path: str) -> ClassMap:
    """Read a class-map file by its suffix: `.json`, `.yaml`, `.yml`, anything else is text; or the word `identity`.

    Raises:
        UsageError: The file is not there or does not hold a class map.
    """
    if path == IDENTITY:
        return ClassMap(None, IDENTITY)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        content = _parse(text, Path(path).suffix.lower())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--data.class_map must be {CLASS_MAP_FORMS}: {reason}, got {path}") from None
    return ClassMap(_checked(content, path), Path(path).name)


def _parse(text: str, suffix: str) -> object:
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_without_repeats)
    if suffix in (".yaml", ".yml"):
        return yaml.safe_load(text)
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())  # without comments
    return [int(line) for line in lines if line]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice; JSON would keep the last value and silently drop the others."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a class stands twice")
    return content


def _checked(content: object, path: str) -> list[int] | dict[str, int]:
    """Check that a file holds a list of whole numbers, or an object of them, and return it with texts as keys."""
    if not isinstance(content, (list, dict)) or not content:
        raise UsageError(f"--data.class_map must be {CLASS_MAP_FORMS}, got {path}")

    for value in content.values() if isinstance(content, dict) else content:
        if not isinstance(value, int) or isinstance(value, bool):  # a bool is an int
            raise UsageError(f"{Path(path).name}: model classes must be whole numbers, got {value!r}")
    if isinstance(content, list):
        return content
    for key in content:
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise UsageError(f"{Path(path).name}: classes must be names or numbers (quote it), got {key!r}")
    return {str(key): value for key, value in content.items()}
