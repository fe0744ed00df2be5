"""Parquet footers: what each file of a dataset holds, known without reading an image.

A footer gives the rows of each row group, which become units, and the columns, which must be alike in all files.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from headprobe.data.sources.source import Request, UnitRule, file_name, safe_text
from headprobe.errors import RunError

TAIL_BYTES = 8  # a Parquet file ends in its footer, the footer's length (4 bytes, little endian) and "PAR1"


# What damaged footers raised; a name that is no text gives a UnicodeDecodeError, which is a ValueError.
FOOTER_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


INTEGER_CELLS, TEXT_CELLS = "numbers", "text"  # what a column holds, as messages say it


@dataclass(frozen=True)
class Footer:
    """The footer of one file.

    Attributes:
        name: Name of the file, without its folder.
        size: Bytes of the file.
        groups: Rows of each row group.
        digest: SHA-256 of the footer.
        schema: Its columns.
    """

    name: str
    size: int
    groups: tuple[int, ...]
    digest: str
    schema: pa.Schema = field(compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Rows in the whole file."""
        return sum(self.groups)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the file, for the run's key."""
        return {"name": self.name, "size": self.size, "rows": self.rows, "footer_sha256": self.digest}


def read_footer(path: str) -> Footer:
    """Read the footer of a local or a hub file.

    Raises:
        RunError: The file cannot be read, or is not a whole Parquet file.
    """
    name = file_name(path)
    try:
        with fsspec.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()

            size = file.seek(0, 2)
            file.seek(size - TAIL_BYTES)
            length = int.from_bytes(file.read(4), "little")
            file.seek(size - TAIL_BYTES - length)
            digest = hashlib.sha256(file.read(length)).hexdigest()
            groups = _group_sizes(metadata)
    except FOOTER_ERRORS as error:
        raise RunError(
            f"{name} cannot be read as Parquet: {safe_text(error)}. Replace it and run the same command again to resume"
        ) from None
    return Footer(name, size, groups, digest, schema)


def _group_sizes(metadata: Any) -> tuple[int, ...]:
    """Return the rows of each row group; readers believe this number, and would leave out rows beyond it silently.

    Raises:
        ValueError: What the footer says elsewhere does not agree with it.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    # A column of single values has one per row; lists have any number.
    flat = [index for index in range(metadata.num_columns) if not metadata.schema.column(index).max_repetition_level]

    for number, group in enumerate(groups):
        values = {group.num_rows, *(group.column(index).num_values for index in flat)}
        if len(values) > 1 or min(values) < 0:
            raise ValueError(f"row group {number} has {', '.join(map(str, sorted(values)))} rows at the same time")

    rows = tuple(group.num_rows for group in groups)
    if sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, and it says {metadata.num_rows}")
    return rows


def plan_units(footers: Sequence[Footer], rule: UnitRule) -> tuple[list[str], list[int]]:
    """Return the name and the number of rows of every unit, in the order in which `datasets` numbers its shards."""
    if rule == "file":
        return [footer.name for footer in footers], [footer.rows for footer in footers]

    names: list[str] = []
    sizes: list[int] = []
    for footer in footers:
        names += [f"{footer.name} row group {group}" for group in range(len(footer.groups))]
        sizes += footer.groups
    return names, sizes


def label_digest(files: Sequence[str], column: str) -> str | None:
    """Return the SHA-256 of all labels of local files: labels can change while size and footer stay the same.

    None where a file's labels cannot be read; the error is shown when the run comes to that unit.
    """
    digest = hashlib.sha256()
    try:
        for file in files:
            labels = pq.ParquetFile(file).read(columns=[column])
            digest.update(repr([chunk.to_pylist() for chunk in labels.columns]).encode())
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    return digest.hexdigest()


def check_one_schema(footers: Sequence[Footer], request: Request) -> None:
    """Check that every file holds images and labels of the same kind and the same class names as the first one.

    `datasets` would silently fill what one of them lacks with None. Files without rows may hold what they like.

    Raises:
        RunError: One does not; the message names the file and what it has.
    """
    filled = [footer for footer in footers if footer.rows]
    if not filled:
        return
    for column in request.columns.values():
        first = _content(filled[0], column)
        for footer in filled[1:]:
            difference = _difference(_content(footer, column), first, column == request.label_column)
            if difference:
                raise RunError(
                    f"{footer.name} differs from {filled[0].name} in the column {column}: replace it, or give "
                    f"--data.path files that agree, got {difference}"
                )


@dataclass(frozen=True)
class _Content:
    """What a column holds, in words for messages, and its class names."""

    kind: str
    class_names: tuple[str, ...] = ()


def _content(footer: Footer, column: str) -> _Content:
    """Return what a column holds; 32 or 64 bits, or bytes in a struct or not, are no difference."""
    indices = footer.schema.get_all_field_indices(column)
    if len(indices) != 1:
        return _Content("no such column" if not indices else f"{len(indices)} columns of that name")
    kind = footer.schema.field(indices[0]).type
    if pa.types.is_integer(kind):
        return _Content(INTEGER_CELLS, _class_names(footer, column))
    kinds = pa.types
    if kinds.is_struct(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind):
        return _Content("bytes")
    if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return _Content(TEXT_CELLS)
    return _Content(str(kind))


def _difference(here: _Content, first: _Content, labels: bool) -> str:
    """Return how a column differs from the first file's, in words; empty if it does not."""
    if here.kind != first.kind:
        # Labels as text are read as numbers where the first file has numbers; text that is no label ends its unit.
        readable = labels and {here.kind, first.kind} == {INTEGER_CELLS, TEXT_CELLS}
        return "" if readable else f"{here.kind} instead of {first.kind}"
    if len(here.class_names) != len(first.class_names):
        return f"{len(here.class_names)} class names instead of {len(first.class_names)}"
    for number, (name, wanted) in enumerate(zip(here.class_names, first.class_names, strict=True)):
        if name != wanted:
            return f"{name!r} as class {number} instead of {wanted!r}"
    return ""


def _class_names(footer: Footer, column: str) -> tuple[str, ...]:
    import datasets  # not at module level: the bundled digits are opened without

    try:
        feature = datasets.Features.from_arrow_schema(footer.schema).get(column)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{footer.name} describes its columns in no readable way: {reason}. Replace it") from None
    return tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ()
