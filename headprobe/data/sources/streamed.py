"""Local Parquet files and hub datasets alike, read as a stream through Hugging Face `datasets`."""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, IterableDataset, Value
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from headprobe.data.sources.safety import safe_text
from headprobe.data.sources.source import Chunk, LabelColumn, Request, Source
from headprobe.errors import RunError, UsageError

# What datasets and pyarrow raised on files with damaged bytes.
DAMAGE = (TypeError, KeyError, IndexError, AttributeError, NotImplementedError, OverflowError, MemoryError)


# What a broken file, or a server that stopped answering, raised (ArrowInvalid is a ValueError).
READ_ERRORS = (
    pa.ArrowException,
    DatasetsError,
    HfHubHTTPError,
    OSError,
    ValueError,
    RuntimeError,
    *DAMAGE,
    EOFError,
    tarfile.TarError,  # an archive that was cut off on its way
)


class StreamedSource(Source):
    """An `IterableDataset`; each of its shards is a unit.

    Args:
        stream: The dataset.
        names: Name of the file behind each shard.
        sizes: Rows in each shard, if known.
        images: Rows in all shards, if known.
        request: What the user wants to open.
        identity: What identifies the data.

    Raises:
        UsageError: A column is missing or of the wrong kind.
        RunError: The number of shards is not what the files promise.
    """

    def __init__(
        self,
        stream: IterableDataset,
        names: Sequence[str],
        sizes: list[int] | None,
        images: int | None,
        request: Request,
        identity: dict[str, Any],
    ) -> None:
        features = stream.features or _features_of_first_row(stream)
        check_columns(features, request)
        self.labels = label_column(features[request.label_column], request)

        # Only these two columns leave the reader, and images leave it as bytes.
        self._stream = stream.select_columns([request.image_column, request.label_column]).decode(False)
        self._columns = (request.image_column, request.label_column)

        self._names = list(names)
        self.units = len(self._names)
        self.unit_sizes = sizes
        self.images = sum(sizes) if sizes is not None else images
        self.identity = identity
        if stream.num_shards != self.units:
            raise RunError(
                f"{request.path} was cut into {stream.num_shards} parts where its files hold {self.units}; "
                "use --data.unit file"
            )

    def unit_name(self, unit: int) -> str:
        """Return the name of the file that a unit is read from."""
        return self._names[unit]

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time.

        Raises:
            RunError: The unit cannot be read.
        """
        try:
            yield from self._chunks(unit, rows)
        except READ_ERRORS as error:
            raise self.explain_read(error, unit) from None

    def explain_read(self, error: Exception, unit: int) -> RunError:
        """Return the message, with the remedy, for an error in the middle of a unit."""
        trouble = f"{self._names[unit]} (unit {unit}) cannot be read: {safe_text(error)}"
        return RunError(f"{trouble}. Mend the file, then run the same command again to resume")

    def _chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        image_column, label_column = self._columns
        shard = self._stream.shard(num_shards=self.units, index=unit, contiguous=True)
        # iter(shard) would split the unit once more inside a DataLoader worker, and silently lose rows.
        for columns in shard.iter(batch_size=rows):
            images = columns[image_column]
            labels = columns.get(label_column) or [None] * len(images)
            yield Chunk(images, labels, [_row_name(self._names[unit], cell) for cell in images])


def check_columns(features: Mapping[str, object], request: Request) -> None:
    """Check that the image and the label column exist.

    Raises:
        UsageError: One of them does not; the message lists the columns found.
    """
    for option, column in (("image_column", request.image_column), ("label_column", request.label_column)):
        if column not in features:
            found = ", ".join(features)
            raise UsageError(
                f"{request.path} has the columns {found}: set --data.{option} to one of them, got {column}"
            )


def label_column(feature: object, request: Request) -> LabelColumn:
    """Return how a column labels images.

    Raises:
        UsageError: It holds neither classes, nor whole numbers, nor text.
    """
    if isinstance(feature, ClassLabel):
        return LabelColumn("class", tuple(feature.names)) if feature.names else LabelColumn("number")
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype.startswith(("int", "uint")):
        return LabelColumn("number")
    if dtype in ("string", "large_string"):
        return LabelColumn("text")
    raise UsageError(
        f"--data.label_column must name a column of class numbers or names, got {request.label_column} ({feature})"
    )


def _features_of_first_row(stream: IterableDataset) -> dict[str, Any]:
    """Return the columns of a dataset that does not describe them itself, such as an archive of images."""
    kinds = {bool: "bool", int: "int64", str: "string", float: "float64"}
    row: dict[str, Any] = next(iter(stream), {})
    return {column: Value(kinds.get(type(cell), "binary")) for column, cell in row.items()}


def _row_name(unit_name: str, cell: object) -> str:
    """Return a unit's name with the image's own path, if its cell has one."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{unit_name} ({path})" if path else unit_name
