"""Parquet footers: how many rows each row group holds, without reading an image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from headprobe.data.redact import safe_text
from headprobe.data.source import UnitRule, file_name
from headprobe.errors import RunError

TAIL_BYTES = 8  # a Parquet file ends in its footer, the footer's length (4 bytes, little endian) and "PAR1"

# What damaged footers were seen to raise; names that are no text give a UnicodeDecodeError, which is a ValueError.
FOOTER_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


@dataclass(frozen=True)
class Footer:
    """One file: its name, bytes, rows of each row group, the SHA-256 of its footer, and its columns."""

    name: str
    size: int
    groups: tuple[int, ...]
    digest: str
    schema: pa.Schema = field(compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Rows in the whole file."""
        return sum(self.groups)

    def to_json(self) -> dict[str, Any]:
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
    names = [f"{footer.name} row group {group}" for footer in footers for group in range(len(footer.groups))]
    return names, [rows for footer in footers for rows in footer.groups]


def label_digest(files: Sequence[str], column: str) -> str | None:
    """Return the SHA-256 of all labels of local files: labels can change while size and footer stay the same.

    None where a file's labels cannot be read; that is said where their turn comes.
    """
    digest = hashlib.sha256()
    try:
        for file in files:
            labels = pq.ParquetFile(file).read(columns=[column])
            digest.update(repr([chunk.to_pylist() for chunk in labels.columns]).encode())
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    return digest.hexdigest()
