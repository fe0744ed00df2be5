"""What every kind of dataset looks like to the stream: units that can be read on their own, in a fixed order."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from headprobe.errors import UsageError

UnitRule = Literal["auto", "file", "row_group"]


PREFERRED_SPLITS = ("validation", "val", "valid", "test")


MOST_BYTES = 2**28  # of one image file


@dataclass(frozen=True)
class Request:
    """What the user wants to open.

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
class Chunk:
    """Consecutive rows of a unit, undecoded.

    Attributes:
        images: Cells of the image column, with an `Unreadable` for each image that cannot be read.
        labels: Cells of the label column.
        sources: Where each row is from, for messages.
    """

    images: list[Any]
    labels: list[Any]
    sources: list[str]


@dataclass(frozen=True)
class Unreadable:
    """Stands where an image's bytes should be; the reason is shown to the user."""

    reason: str


class Source(ABC):
    """A dataset split, cut into units.

    Attributes:
        units: How many units there are; they are numbered from 0.
        unit_sizes: Rows in each unit, None where only reading the data would show them.
        images: Rows in all units together, None where only reading the data would show them.
        labels: How the images are labelled.
        identity: What identifies the data (revision, files, digests), for the run's key; JSON values only.
    """

    units: int
    unit_sizes: list[int] | None
    images: int | None
    labels: LabelColumn
    identity: dict[str, Any]

    @abstractmethod
    def unit_name(self, unit: int) -> str:
        """Return the name of the file (and the rows in it) that a unit is read from."""

    @abstractmethod
    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time (the last chunk may be shorter).

        Raises:
            RunError: The unit cannot be read; the message names the file.
        """


def choose_split(wanted: str, there: list[str], path: str) -> str:
    """Return the split to evaluate on: the wanted one, else the first of the usual names, else the only one.

    Args:
        wanted: The split that the user named, empty for none.
        there: Splits of the dataset.
        path: The dataset, for messages.

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
    """Return the labels of the first `rows` rows, all from the first unit that has any.

    Raises:
        RunError: The unit cannot be read.
    """
    for unit in range(source.units):
        chunk = next(source.chunks(unit, rows), None)
        if chunk is not None:
            return chunk.labels
    return []


def file_name(path: str) -> str:
    """Return the last name in a path or address: messages and keys never hold a machine's folders."""
    return path.replace(os.sep, "/").rstrip("/").rsplit("/", 1)[-1]
