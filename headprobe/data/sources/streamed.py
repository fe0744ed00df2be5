"""What is read as a stream through Hugging Face `datasets`: local Parquet files here, and hub datasets in `hub`."""

import glob
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import ClassLabel, IterableDataset, Value
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from headprobe.data.sources.footer import check_one_schema, label_digest, plan_units, read_footer
from headprobe.data.sources.source import (
    NOT_READ,
    UNLABELLED_TOO,
    Chunk,
    LabelColumn,
    Request,
    Source,
    UnitRule,
    check_inside,
    choose_split,
    file_name,
    no_labels,
    safe_text,
)
from headprobe.errors import RunError, UsageError
from headprobe.text import Decision

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
        self.labels = label_column(features[request.label_column], request) if request.labelled else NOT_READ

        # Only these columns leave the reader, and images leave it as bytes.
        self._stream = stream.select_columns([*request.columns.values()]).decode(False)
        self._columns = (request.image_column, request.label_column)

        self._names = list(names)
        self.units = len(self._names)
        self.unit_sizes = sizes
        self.images = sum(sizes) if sizes is not None else images
        self.identity = identity
        if stream.num_shards != self.units:
            raise RunError(
                f"{request.shown} was cut into {stream.num_shards} parts where its files hold {self.units}; "
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
    for option, column in request.columns.items():
        if column not in features:
            found = ", ".join(features)
            without = f" ({UNLABELLED_TOO})" if option == "label_column" else ""
            raise UsageError(
                f"{request.shown} has the columns {found}: set --data.{option} to one of them{or_classes(request)}"
                f"{without}, got {column}"
            )


def or_classes(request: Request) -> str:
    """Return what else to do where a stray file makes a folder of class folders look like something else."""
    return " (or give --data.split . if its folders are the classes)" if Path(request.path).is_dir() else ""


def label_column(feature: object, request: Request) -> LabelColumn:
    """Return how a column labels images.

    Raises:
        UsageError: It holds neither classes, nor whole numbers, nor text.
    """
    if isinstance(feature, ClassLabel):
        return LabelColumn("class", tuple(feature.names), numbered=True) if feature.names else LabelColumn("number")
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype.startswith(("int", "uint", "float")):  # pandas writes whole numbers as 1.0 where a cell is empty
        return LabelColumn("number")
    if dtype in ("string", "large_string", "string_view"):
        return LabelColumn("text")
    raise no_labels(request, feature)


def _features_of_first_row(stream: IterableDataset) -> dict[str, Any]:
    """Return the columns of a dataset that does not describe them itself, such as an archive of images."""
    kinds = {bool: "bool", int: "int64", str: "string", float: "float64"}
    row: dict[str, Any] = next(iter(stream), {})
    return {column: Value(kinds.get(type(cell), "binary")) for column, cell in row.items()}


def _row_name(unit_name: str, cell: object) -> str:
    """Return a unit's name with the image's own path, if its cell has one."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{unit_name} ({path})" if path else unit_name


# -- files on this machine ---------------------------------------------------------------------------------------------


ROWS_PER_READ = 128  # given explicitly: datasets takes the first row group's size, and fails where that is 0


class LocalSource(StreamedSource):
    """Parquet files on this machine; their footers promise how many rows each unit has."""

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time.

        Raises:
            RunError: The unit cannot be read, or has more or fewer rows than its file's footer says.
        """
        promised = self.unit_sizes[unit] if self.unit_sizes is not None else None
        if promised == 0:  # a file without rows may lack the columns
            return

        given = 0
        for chunk in super().chunks(unit, rows):
            given += len(chunk.images)
            if promised is not None and given > promised:
                break
            yield chunk

        if promised is not None and given != promised:
            raise RunError(
                f"{self.unit_name(unit)} (unit {unit}) is damaged: its footer promises {promised} rows, and there are "
                f"{'fewer' if given < promised else 'more'}. Replace the file, then run the same command again "
                "to resume"
            )


def open_data_folder(request: Request, folder: Path) -> Source:
    """Open a folder of Parquet files or tars, which `datasets` sorts into splits by name or by the folder's README.md.

    Raises:
        UsageError: The folder, the split or a column is not there.
        RunError: A file is broken.
    """
    stop_download_counts()
    root = folder.resolve()
    if glob.has_magic(str(root)):  # datasets takes a folder's name for a pattern, and escapes do not help
        raise UsageError(
            f"a folder of Parquet files or tars, and those around it, may have no [, * or ? in its name: rename it, or "
            f"give --data.path one file, got {root}"
        )
    files: dict[str, list[str]] = {}
    try:
        builder = datasets.load_dataset_builder(str(root), request.name)
        for name, found in (builder.config.data_files or {}).items():
            files[str(name)] = [str(file) for file in found]
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loading script, which is not run
        if not (files := _without_own(root)):
            raise _explain(error, request) from None
    files = _without_own(root, files) or files
    split = choose_split(request.split, list(files), request.shown)
    check_inside(files[split], f"{root.as_posix()}/", request.shown)
    if all(file.endswith(".tar") for file in files[split]):
        from headprobe.data.sources.saved import open_tars  # it imports this file

        return open_tars(request, files[split], split)
    others = [file for file in files[split] if not file.endswith(".parquet")]
    if others:
        raise UsageError(
            f"--data.path must hold Parquet files alone, where it holds any: give it their glob "
            f"('{folder}/*.parquet'), or --data.split . if its folders are the classes, got {file_name(others[0])}"
        )
    source = _open_files(files[split], split, request)
    source.decisions = _missing_parts(files[split])
    return source


def _without_own(root: Path, files: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """Return a folder's Parquet files as one split if headprobe's results came among them.

    So `datasets` has files that name no split; where files name one, it takes them alone, and this is no question.

    Args:
        root: The folder.
        files: What `datasets` found; None where it failed.

    Returns:
        The split and its files; nothing where no results are among them.
    """
    if files is not None and all(Path(file).parent == root for found in files.values() for file in found):
        return {}
    from headprobe.data.sources.listing import is_own_file

    found = [file.as_posix() for file in sorted(root.glob("**/*.parquet")) if file.is_file()]
    among = found if files is None else list(chain.from_iterable(files.values()))
    if not any(is_own_file(file, root) for file in among):
        return {}
    return {"train": [file for file in found if not is_own_file(file, root)]}


def open_parquet_files(request: Request, pattern: str) -> Source:
    """Open one Parquet file, or all that match a glob, as a single split.

    Raises:
        UsageError: No file matches, the request names a split, or a column is not there.
        RunError: A file is broken.
    """
    return _open_files(files_of(request, pattern), "test", request)


def files_of(request: Request, pattern: str) -> list[str]:
    """Return the absolute paths of one file, or of all that match a glob, in the order of their names.

    Raises:
        UsageError: No file matches, or the request names a split.
    """
    if request.split:
        raise UsageError(f"--data.split has no meaning where --data.path names files, got {request.split}")
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UsageError(f"no file matches --data.path, got {request.shown}")
    return [Path(file).resolve().as_posix() for file in files]


PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(-\w+)?\.parquet")  # the hub's names of a split's files


def _missing_parts(files: Sequence[str]) -> list[Decision]:
    """Say that parts of a split are not here, where the names of the others say how many there are."""
    parts = [found for file in files if (found := PART.fullmatch(file_name(file)))]
    whole = {(found[1], int(found[3])) for found in parts}
    missing = sum(number for _, number in whole) - len(parts)
    if missing <= 0:
        return []
    text = f"{len(parts)} of {len(parts) + missing} files are here, by their names ({file_name(files[0])}, ...)"
    return [Decision("parts of the split", text, shown=True)]


def _open_files(files: list[str], split: str, request: Request) -> Source:
    rule: UnitRule = "row_group" if request.unit == "auto" else request.unit
    footers = [read_footer(file) for file in files]
    if not sum(footer.rows for footer in footers):
        raise UsageError(f"{request.shown} has no rows at all, got {len(footers)} empty files")
    check_one_schema(footers, request)

    stop_download_counts()
    wanted = [*request.columns.values()]
    there = set(footers[0].schema.names)
    try:
        stream = datasets.load_dataset(
            "parquet",
            # datasets reads a file's name as a glob
            data_files={split: [glob.escape(file) for file in files]},
            split=split,
            streaming=True,
            batch_size=ROWS_PER_READ,
            # Other columns are not even read, and may differ; a column that is missing is explained by StreamedSource.
            columns=wanted if there.issuperset(wanted) else None,
        )
        stream = stream.reshard() if rule == "row_group" else stream
    except (OSError, ValueError, *DAMAGE) as error:
        raise _explain(error, request) from None

    names, sizes = plan_units(footers, rule)
    identity = {
        "split": split,
        "revision": None,
        "unit": rule,
        "files": [footer.identity() for footer in footers],
        "labels_sha256": label_digest(files, request.label_column) if request.labelled else None,
    }
    return LocalSource(stream, names, sizes, sum(sizes), request, identity)


def stop_download_counts() -> None:
    """Keep `datasets` from counting on a server that local files are opened: offline it waits up to 5 seconds."""
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _explain(error: Exception, request: Request) -> UsageError | RunError:
    # The errors of datasets are OSErrors too, but only the system's own have a number.
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(f"datasets cannot use its folder: {safe_text(error)}. Set HF_HOME to a folder you can write to")
    return UsageError(
        f"--data.path holds no Parquet dataset: {safe_text(error)}{or_classes(request)}, got {request.shown}"
    )
