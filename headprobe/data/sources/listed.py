"""Images beside a list of their names and labels: `metadata.csv` and the like as `datasets` reads them, or a table.

The rows of the list are the images: one whose file is not there is a bad image, and files without a row are counted.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from headprobe.data.sources.folder import FolderSource, ImageFiles, left_out, open_class_folders
from headprobe.data.sources.layout import THE_FOLDER_ITSELF, check_classes, names_split
from headprobe.data.sources.listing import leads_out, list_images, metadata_files, stamp
from headprobe.data.sources.source import (
    NOT_READ,
    PREFERRED_SPLITS,
    UNLABELLED_TOO,
    LabelColumn,
    Request,
    Source,
    local_name,
    no_labels,
    safe_text,
    some,
)
from headprobe.errors import UsageError
from headprobe.text import Decision, counted

SPLIT_COLUMNS = frozenset(
    {"split", "splits", "subset", "usage", "set", "fold", "partition", "phase", "data set", "dataset"}
)
FILE_NAME = "file_name"  # the column that `datasets` looks for


def open_metadata(request: Request, root: Path, split: str) -> Source:
    """Open a folder with a metadata file, in the split's own folder or above it.

    A metadata file without a column of file names describes something else: then folders are the classes.

    Raises:
        UsageError: There are two metadata files, or one that does not say what is needed.
    """
    for place, within in ((root / split, ""), (root, split)):
        found = metadata_files(place)
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise UsageError(f"{local_name(place)} has several files of metadata: keep one of them, got {names}")
        if found and FILE_NAME in (table := read_table(found[0], FILE_NAME)).column_names:
            return _open(request, root, found[0], table, FILE_NAME, split, within)

    listing = list_images(root / split, root)
    if not listing.images:
        raise UsageError(
            f"the file of metadata in {local_name(root / split)} must have a column {FILE_NAME}, with the path of each "
            f"image in the folder, and columns are parted by commas: rename the one that it has, got the columns "
            f"{_columns(root / split) or _columns(root)}"
        )
    check_classes(listing, request, root, split)
    source = open_class_folders(root / split, split, listing)
    unread = Decision("metadata", f"not read: it has no column {FILE_NAME}; the folders are the classes", shown=True)
    source.decisions = [*source.decisions, unread]
    return source


def _columns(place: Path) -> str:
    """Return the columns of the file of metadata in a folder, "" where there is none."""
    found = metadata_files(place)
    return some(read_table(found[0], FILE_NAME).column_names) if found else ""


def open_table(request: Request, file: Path) -> Source:
    """Open the images that a CSV, TSV, JSON, or JSON lines file lists, by their paths from its folder.

    Raises:
        UsageError: It cannot be read, or lacks a column; the message lists the columns found.
    """
    if request.split:
        raise UsageError(f"--data.split has no meaning where --data.path names a file, got {request.split}")
    table = read_table(file, request.image_column)
    names = FILE_NAME if FILE_NAME in table.column_names else request.image_column
    return _open(request, file.parent, file, table, names, "", "")


def _open(request: Request, root: Path, file: Path, table: pa.Table, names: str, split: str, within: str) -> Source:
    """Return the images that a table lists.

    Args:
        request: What the user wants to open.
        root: Folder that images may not lie outside of.
        file: The table's file; its paths begin in its folder.
        table: The table.
        names: Its column of file names.
        split: Name of the split, "" for none.
        within: Folder beside the file whose images are wanted, "" for all.
    """
    found = ", ".join(table.column_names)
    for option, column in {**request.columns, "image_column": names}.items():
        if column not in table.column_names:
            folders = (
                f" (or give --data.split {THE_FOLDER_ITSELF} if folders are the classes)" if names == FILE_NAME else ""
            )
            without = f" ({UNLABELLED_TOO})" if option == "label_column" else ""
            raise UsageError(
                f"{file.name} has the columns {found}: set --data.{option} to one of them{folders}{without}, got "
                f"{column}"
            )

    labels = _labels(table, file, request) if request.labelled else _Labels(NOT_READ, [None] * len(table))
    rows = list(zip(_paths(table[names], file), labels.cells, strict=True))
    if not within:
        within = _split_of_rows([path for path, _ in rows], file)
        split = split or within
    rows = [(path, label) for path, label in rows if not within or path.startswith(f"{within}/")]
    if not rows:
        raise UsageError(
            f"{file.name} lists no image in {within or local_name(root)}: change --data.split, got none there"
        )
    twice = [path for path, times in Counter(path for path, _ in rows).items() if times > 1]
    if twice:
        raise UsageError(f"{file.name} lists an image twice: remove one of the rows, got {twice[0]}")

    stamps = {path: _stamp(file.parent / path, root) for path, _ in rows}
    if not any(stamps.values()):
        raise UsageError(
            f"none of the images that {file.name} lists is there: its column {names} must have the path of each from "
            f"{local_name(file.parent)}, with its suffix, got {rows[0][0]}"
        )
    digest = hashlib.sha256(json.dumps(sorted(rows), default=str).encode("utf-8", "surrogateescape")).hexdigest()
    images = ImageFiles(file.parent, split, stamps, dict(rows), labels.column, {"labels_sha256": digest})
    return FolderSource(images, [*_decisions(file, root, within, stamps), *_splits(table, file)])


def _splits(table: pa.Table, file: Path) -> list[Decision]:
    """Say that a column names the splits of the rows, all of which are scored."""
    found = []
    for column in table.column_names:
        if not _is_text(table[column].type) or column.strip().lower() not in SPLIT_COLUMNS:
            continue
        names = sorted({cell for cell in table[column].to_pylist() if cell})
        if len(names) > 1 and all(map(names_split, names)):
            text = (
                f"{file.name} has a column {column} with {some(names)}: the rows of all of them are scored; keep those "
                "that you want in a list of their own"
            )
            found.append(Decision("splits of the list", text, shown=True))
    return found


def _decisions(file: Path, root: Path, within: str, stamps: dict[str, str]) -> list[Decision]:
    listing = list_images(file.parent / within, root)
    there = {f"{within}/{path}" if within else path for path in (*listing.images, *listing.loose)}
    more = sorted(there - stamps.keys())
    text = f"{file.name} says which images there are and what they are"
    found = [Decision("labels", text), *left_out(listing)]
    if more:
        unlisted = f"{counted(len(more), 'image')} that {file.name} does not list, first {more[0]}"
        found.append(Decision("images left out", unlisted, shown=True))
    return found


class _Labels:
    """A column of labels and what is in it."""

    def __init__(self, column: LabelColumn, cells: list[Any]) -> None:
        self.column = column
        self.cells = cells


def _labels(table: pa.Table, file: Path, request: Request) -> _Labels:
    column = table[request.label_column]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        padded = _padded(file, request.label_column)
        if padded:
            texts = {text for text in padded if text}
            return _Labels(LabelColumn("text", decimal=len(set(map(int, texts))) == len(texts)), padded)
        names = _class_names(table, request.label_column)
        return _Labels(
            LabelColumn("class", names, numbered=True) if names else LabelColumn("number"), column.to_pylist()
        )
    if pa.types.is_floating(kind):  # pandas writes whole numbers so where a cell is empty
        cells = column.to_pylist()
        if all(cell is None or cell != cell or cell.is_integer() for cell in cells):
            return _Labels(LabelColumn("number"), cells)
    if _is_text(kind):
        return _Labels(LabelColumn("text"), column.to_pylist())
    raise no_labels(request, kind, f" in {file.name}")


def _padded(file: Path, column: str) -> list[str | None]:
    """Return the labels of a CSV or TSV file as they stand there if one begins with a zero (`007`), else nothing."""
    if file.suffix.lower() not in (".csv", ".tsv"):
        return []
    texts = [text or None for text in read_table(file, column)[column].to_pylist()]
    return texts if any(text and len(text) > 1 and text[0] == "0" for text in texts) else []


def _class_names(table: pa.Table, column: str) -> tuple[str, ...]:
    """Return the class names of a column that `datasets` wrote as a ClassLabel."""
    try:
        feature = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, ValueError, TypeError):
        return ()


def _is_text(kind: pa.DataType) -> bool:
    views = getattr(pa.types, "is_string_view", None)  # of newer pyarrow
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or (views and views(kind)))


def _paths(column: pa.ChunkedArray, file: Path) -> list[str]:
    """Return the paths in a column, with forward slashes and without `./`.

    Raises:
        UsageError: One is empty, or leads out of the folder.
    """
    if not _is_text(column.type):
        raise UsageError(f"{file.name} must name image files by text, got {column.type} in that column")
    paths = []
    for row, cell in enumerate(column.to_pylist()):
        path = PurePosixPath((cell or "").replace("\\", "/"))
        if not path.parts:
            raise UsageError(f"{file.name} has no file name in row {row} (from 0): remove the row, got {cell!r}")
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise UsageError(
                f"{file.name} lists a file outside of its folder, and these are never read: move the images beside it, "
                f"got {cell}"
            )
        paths.append(str(path))
    return paths


def _split_of_rows(paths: Sequence[str], file: Path) -> str:
    """Return the usual split where a list names images of several (`train/1.png`, `test/1.png`), else "".

    Raises:
        UsageError: They are splits, and none of them is usual.
    """
    first = sorted({path.split("/", 1)[0] if "/" in path else "" for path in paths})
    if not all(map(names_split, first)):
        return ""
    usual = [name for split in PREFERRED_SPLITS for name in first if name.lower() == split]
    if usual or len(first) == 1:
        return (usual or first)[0]
    raise UsageError(f"{file.name} lists images of several splits: choose --data.split from {some(first)}, got none")


def _stamp(path: Path, root: Path) -> str:
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), "")):
        raise leads_out(os.path.relpath(path, root))
    return stamp(path)


def read_table(file: Path, text_column: str) -> pa.Table:
    """Read a table by its suffix.

    Args:
        file: CSV with a first line of column names, TSV, JSON lines, a JSON list of objects, or Parquet.
        text_column: A column whose cells are text, also where all look like numbers (000123).

    Raises:
        UsageError: It cannot be read.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={name: pa.string() for name in {FILE_NAME, text_column}}
                ),
            )
        if suffix == ".parquet":
            return pq.read_table(file)
        if suffix == ".json" and file.read_bytes().lstrip()[:1] == b"[":
            return pa.Table.from_pylist(json.loads(file.read_bytes()))
        return pyarrow.json.read_json(file)
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--data.path must name a table with a first line of column names: {safe_text(error)}, got {file.name}"
        ) from None
