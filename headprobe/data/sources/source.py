"""What every kind of dataset looks like to the stream: units that can be read on their own, in a fixed order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from headprobe.errors import UsageError

UnitRule = Literal["auto", "file", "row_group"]


@dataclass(frozen=True)
class Unreadable:
    """Stands where an image's bytes should be and cannot be had; the reason is shown to the user."""

    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a unit, undecoded: cells of the image column, of the label column, and each row's origin.

    The cell of a single image that cannot be read is an `Unreadable`.
    """

    images: list[Any]
    labels: list[Any]
    sources: list[str]


@dataclass(frozen=True)
class LabelColumn:
    """How a dataset labels its images.

    Attributes:
        kind: `class` for numbered classes with names, `number` for bare whole numbers, `text` for names alone.
        names: Class names by number; None unless `kind` is `class`.
    """

    kind: Literal["class", "number", "text"]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Request:
    """What the user asked to open.

    Attributes:
        path: Hub id, local folder, Parquet file or glob.
        name: Configuration of a hub dataset.
        split: Split, or empty for the default one.
        revision: Branch, tag or commit of a hub dataset.
        image_column: Column of images.
        label_column: Column of labels.
        unit: What a unit is.
        sizes: Whether the number of rows of each unit is needed even if finding it takes requests.
    """

    path: str
    name: str | None = None
    split: str = ""
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    unit: UnitRule = "auto"
    sizes: bool = False


class Source(ABC):
    """A dataset split, cut into units.

    Attributes:
        units: How many units there are; they are numbered from 0.
        unit_sizes: Rows in each unit, None where only reading the data would tell.
        images: Rows in all units together, None where only reading the data would tell.
        labels: How the images are labelled.
        facts: What identifies the data (revision, files, digests), for the run's key; JSON values only.
    """

    units: int
    unit_sizes: list[int] | None
    images: int | None
    labels: LabelColumn
    facts: dict[str, Any]

    @abstractmethod
    def unit_name(self, unit: int) -> str:
        """Name the file (and part of it) that a unit is read from."""

    @abstractmethod
    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time (the last chunk may be shorter).

        Raises:
            RunError: The unit cannot be read; the message names the file.
        """


PREFERRED_SPLITS = ("validation", "val", "valid", "test")


def choose_split(wanted: str, there: list[str], path: str) -> str:
    """Pick the split to evaluate on.

    Raises:
        UsageError: The split does not exist, or the default is not clear.
    """
    if wanted:
        if wanted not in there:
            raise UsageError(f"{path} has no such split: choose --data.split from {', '.join(there)}, got {wanted}")
        return wanted
    for name in PREFERRED_SPLITS:
        if name in there:
            return name
    if len(there) == 1:
        return there[0]
    raise UsageError(f"{path} has no validation or test split: choose --data.split from {', '.join(there)}, got none")


def first_labels(source: Source, rows: int = 32) -> list[Any]:
    """Read the labels of the first rows of the first unit that has any.

    Raises:
        RunError: The unit cannot be read.
    """
    chunks = (next(source.chunks(unit, rows), None) for unit in range(source.units))
    return next((chunk.labels for chunk in chunks if chunk is not None), [])


def file_name(path: str) -> str:
    """Return the last part of a path or address: messages and keys never hold a machine's folders."""
    return path.rstrip("/").rsplit("/", 1)[-1]


MOST_BYTES = 2**28
