"""What every kind of dataset looks like to the stream: units that can be read on their own, in a fixed order.

`open_source` finds out what kind of place `--data.path` names and opens it. Files outside of a dataset are never read,
and no error shows a secret.
"""

import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headprobe.errors import UsageError
from headprobe.text import SHORTEST_TOKEN, Decision, without_secrets

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
        labelled: Whether labels are read; without, images need none and folders are no classes.
    """

    path: str
    name: str | None = None
    split: str = ""
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    unit: UnitRule = "auto"
    sizes: bool = False
    labelled: bool = True

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the option that names them."""
        images = {"image_column": self.image_column}
        return {**images, "label_column": self.label_column} if self.labelled else images

    @property
    def shown(self) -> str:
        """The path for messages: as the user wrote it, or the folder's own name where that says nothing (`.`)."""
        last = file_name(self.path)
        return local_name(self.path) if last in ("", ".", "..") and self.path else self.path


@dataclass(frozen=True)
class LabelColumn:
    """How a dataset labels its images.

    Attributes:
        kind: `class` for numbered classes with names, `number` for bare whole numbers, `text` for names alone, `none`
            where labels are not read.
        names: Class names by number; None unless `kind` is `class`.
        numbered: Whether the data themselves number the classes (a hub's ClassLabel). If not, only the sorted order of
            the names does, as in class folders.
        decimal: Whether texts are whole numbers, each written in one way (`007`).
    """

    kind: Literal["class", "number", "text", "none"]
    names: tuple[str, ...] | None = None
    numbered: bool = False
    decimal: bool = False


NOT_READ = LabelColumn("none")
"""Of images that are judged without labels."""

UNLABELLED_TOO = "--model.classifier none needs no labels"
"""What refusals of data without labels add: masks are then judged by the model's feature."""


def no_labels(request: Request, kind: object, where: str = "") -> UsageError:
    """Return the message for a label column of a kind that cannot say classes."""
    remedy = ""
    if "bool" in str(kind):
        remedy = "; make True and False the numbers 1 and 0 first, as astype(int) of pandas does"
    elif "decimal" in str(kind):
        remedy = "; make decimals whole numbers first, as astype(int) of pandas does"
    return UsageError(
        f"--data.label_column must name a column of class numbers or names{where}{remedy}, got {request.label_column} "
        f"({kind})"
    )


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
        decisions: What was decided about the data while opening them.
        shuffled: Whether the rows of a unit stand in an order that has nothing to do with their classes: its first rows
            are as good a part of it as any others.
    """

    units: int
    unit_sizes: list[int] | None
    images: int | None
    labels: LabelColumn
    identity: dict[str, Any]
    decisions: Sequence[Decision] = ()
    shuffled: bool = False

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


def local_name(path: str | Path) -> str:
    """Return the name of a file or folder on this machine, also where the path is `.`, `..` or ends in them."""
    return file_name(os.path.abspath(Path(path).expanduser())) or os.sep


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- what is never read, and never shown -------------------------------------------------------------------------------
def check_inside(files: Sequence[str], root: str, path: str) -> None:
    """Check that a dataset is made of its own files: its README.md can name others, on this machine or elsewhere.

    Args:
        files: Absolute paths or addresses with forward slashes, as `datasets` resolved them.
        root: What each of them must begin with: the folder, or the dataset's address.
        path: The dataset as the user wrote it.

    Raises:
        UsageError: A file lies somewhere else.
    """
    for file in files:
        steps = file.removeprefix(root).replace("\\", "/").split("/")
        if not file.startswith(root) or ".." in steps or "::" in file:
            raise outside(path)


def outside(path: str) -> UsageError:
    """Return the refusal of a dataset that names files outside of itself."""
    return UsageError(
        f"--data.path names a dataset whose README.md (data_files or data_dir) asks for files outside of it, and these "
        f"are never read: name the place where they lie, got {without_secrets(path)}"
    )


def safe_text(error: BaseException) -> str:
    """Return the text of another library's error on one line, without a token or a signed address.

    The name of its class stands for an empty text.
    """
    text = " ".join(str(error).split()).rstrip(".")
    token = _stored_token()
    if len(token) >= SHORTEST_TOKEN:
        text = text.replace(token, "...")
    return without_secrets(text) or type(error).__name__


def _stored_token() -> str:
    from huggingface_hub import get_token  # only where something went wrong

    try:
        return get_token() or ""
    except OSError:  # `hf auth login` keeps the token in a file, and HF_HOME may name a place that is no folder
        return ""


# -- opening -----------------------------------------------------------------------------------------------------------


BUNDLED_DATA = "digits"  # a folder of the package
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(request: Request) -> Source:
    """Open the bundled digits, a local folder, Parquet files, or a hub dataset, in this order of preference.

    Raises:
        UsageError: There is nothing at that path, or not what the user wants.
        RunError: It is there and cannot be read.
    """
    path = request.path
    local = _local(path)
    if path == BUNDLED_DATA and Path(path).is_dir() and not Path(path).samefile(local):
        raise UsageError(
            f"--data.path {path} means the bundled images, and there is a folder of that name here: write ./{path} for "
            f"the folder, or run elsewhere for the bundled images, got {path}"
        )
    if request.revision is not None and is_local(path):
        raise UsageError(f"--data.revision is for hub datasets; {path} is on this machine, got {request.revision}")

    # Each kind of source imports this file, and `datasets` takes a second to import: only what is needed is loaded.
    if path == BUNDLED_DATA:
        from headprobe.data.sources.bundled import open_bundled

        if bundled := open_bundled(request, local):
            return bundled
    if local.is_dir():
        return _open_folder(request, local)
    if is_local(path):
        if not path.endswith(".parquet"):
            from headprobe.data.sources.other_places import open_other_file

            if other := open_other_file(request, local):
                return other
        from headprobe.data.sources.streamed import open_parquet_files

        return open_parquet_files(request, str(local))
    if not HUB_ID.fullmatch(path) or path.endswith(".parquet"):
        raise UsageError(f"--data.path names no file or folder here and is no hub id (owner/name), got {path}")
    from headprobe.data.sources.hub import open_hub

    return open_hub(request)


def _open_folder(request: Request, folder: Path) -> Source:
    if request.split == ".":  # the folders are classes, whatever else lies beside or in them
        from headprobe.data.sources.folder import open_image_folder

        return open_image_folder(request, folder)
    if _holds_parquet(folder):
        from headprobe.data.sources.streamed import open_data_folder

        return open_data_folder(request, folder)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        from headprobe.data.sources.saved import open_saved

        return open_saved(request, folder)
    from headprobe.data.sources.folder import open_image_folder

    return open_image_folder(request, folder)


def is_local(path: str) -> bool:
    """Return whether a path names something on this machine: a folder, a file or a glob."""
    return _local(path).exists() or glob.has_magic(path)


def _local(path: str) -> Path:
    return Path(__file__).parents[1] / BUNDLED_DATA if path == BUNDLED_DATA else Path(path).expanduser()


def _holds_parquet(folder: Path) -> bool:
    if any(file.name != "metadata.parquet" and file.name[0] != "." for file in folder.glob("*.parquet")):
        return True
    from headprobe.data.sources.listing import holds_parquet

    # Three levels, as the hub's layouts have: walking through a whole folder of images would take long.
    return holds_parquet(folder, levels=3)
