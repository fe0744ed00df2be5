"""Datasets in files other than Parquet that `datasets` reads on this machine: `save_to_disk`, and WebDataset's tars."""

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from headprobe.data.sources.source import (
    Request,
    Source,
    choose_split,
    file_name,
    outside,
    safe_text,
    some,
)
from headprobe.data.sources.streamed import DAMAGE, ROWS_PER_READ, LocalSource, stop_download_counts
from headprobe.errors import UsageError

MOST_UNITS = 1024


def open_saved(request: Request, folder: Path) -> Source:
    """Open what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        UsageError: It is not whole, it names files outside of itself, or the split or a column is not there.
    """
    if request.unit != "auto":
        raise UsageError(f"--data.unit must be auto where --data.path is a save_to_disk folder, got {request.unit}")
    split = ""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            split = choose_split(request.split, list(splits), request.shown)
            if split != file_name(split) or split in ("", ".", ".."):
                raise outside(request.shown)
        elif request.split:
            raise UsageError(f"--data.split has no meaning where a dataset was saved alone, got {request.split}")
        place = folder / split
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        files = [str(file["filename"]) for file in state["_data_files"]]
        if any(file != file_name(file) or file in ("", ".", "..") for file in files):
            raise outside(request.shown)
        data = datasets.load_from_disk(str(place)).with_format(None)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, *DAMAGE) as error:
        raise UsageError(
            f"{request.shown} cannot be read as a folder of save_to_disk: {safe_text(error)}; save it again, "
            "or give --data.split . if its folders are the classes, got "
            f"{request.shown}"
        ) from None
    if not len(data):
        raise UsageError(f"{request.shown} has no rows at all: choose another --data.split, got {split or 'none'}")

    units = min(MOST_UNITS, -(-len(data) // ROWS_PER_READ))
    sizes = [len(data) // units + (unit < len(data) % units) for unit in range(units)]
    firsts = [sum(sizes[:unit]) for unit in range(units)]
    names = [f"rows {first} to {first + size - 1}" for first, size in zip(firsts, sizes, strict=True)]
    identity = {
        "split": split,
        "revision": None,
        "unit": f"{units} parts",
        "files": [{"name": file, "size": (place / file).stat().st_size} for file in files],
        "rows": len(data),
        "labels_sha256": _label_digest(data, request.label_column) if request.labelled else None,
    }
    return LocalSource(data.to_iterable_dataset(num_shards=units), names, sizes, len(data), request, identity)


def _label_digest(data: datasets.Dataset, column: str) -> str | None:
    if column not in data.column_names:  # LocalSource says so
        return None
    digest = hashlib.sha256()
    for first in range(0, len(data), 10_000):
        digest.update(repr(data.select_columns([column])[first : first + 10_000][column]).encode())
    return digest.hexdigest()


# -- tars --------------------------------------------------------------------------------------------------------------


FIELD = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's: everything from the first dot of the file's own name


def open_tars(request: Request, files: Sequence[str], split: str) -> Source:
    """Open WebDataset's tars on this machine, each of them a unit; `datasets` reads them.

    Args:
        request: What the user wants to open; its columns are endings of names in the tars (`jpg`, `cls`).
        files: Absolute paths of the tars.
        split: Name of the split.

    Raises:
        UsageError: They are archives of something else, or a column is not there.
    """
    if request.unit == "row_group":
        raise UsageError("--data.unit must be file or auto where --data.path names tars, got row_group")
    sizes, contents = [], hashlib.sha256()
    for file in files:
        rows, fields = _survey(file, contents)
        if rows and len(fields) < 2 and request.labelled:
            raise UsageError(
                f"{file_name(file)} holds files without labels beside them ({some(sorted(fields))}): if these lie in "
                f"class folders, unpack it and give --data.path that folder: mkdir FOLDER && tar -xf "
                f"{file_name(file)} -C FOLDER, got {request.shown}"
            )
        sizes.append(rows)
    if not sum(sizes):
        raise UsageError(f"there is nothing in these tars, got {request.shown}")

    stop_download_counts()
    try:
        stream = datasets.load_dataset(
            "webdataset", data_files={split: [glob.escape(file) for file in files]}, split=split, streaming=True
        )
    except (OSError, ValueError, *DAMAGE) as error:
        raise UsageError(
            f"{request.shown} cannot be read as WebDataset's tars: {safe_text(error)}, got {file_name(files[0])}"
        ) from None
    identity = {
        "split": split,
        "revision": None,
        "unit": "file",
        "files": [
            {"name": file_name(file), "size": Path(file).stat().st_size, "rows": rows}
            for file, rows in zip(files, sizes, strict=True)
        ],
        "contents_sha256": contents.hexdigest(),
    }
    return LocalSource(stream, [file_name(file) for file in files], sizes, sum(sizes), request, identity)


def _survey(file: str, contents: Any) -> tuple[int, set[str]]:
    """Return how many rows a tar has, and the endings of the names in it.

    Args:
        file: Path of the tar.
        contents: Digest that takes names, sizes and small files, which labels are.

    Raises:
        UsageError: It is broken.
    """
    rows, last, fields = 0, None, set()
    try:
        with tarfile.open(file) as archive:
            for member, key, ending in _members(archive):
                rows += key != last
                last = key
                fields.add(ending)
                contents.update(f"{member.name}\0{member.size}\n".encode("utf-8", "surrogateescape"))
                content = archive.extractfile(member) if member.size <= 64 else None
                contents.update(content.read() if content else b"")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"--data.path must name whole tars: {safe_text(error)}, got {file_name(file)}") from None
    return rows, fields


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield the files that `datasets` reads, with their row's key and their ending."""
    for member in archive:
        name = FIELD.match(member.name)
        if member.isreg() and name and not file_name(member.name).startswith((".", "__")):
            yield member, name[1], name[2]
