"""Parquet files on this machine: a folder laid out like a hub dataset, one file, or a glob; streamed by row group."""

import glob
from collections.abc import Iterator
from pathlib import Path

import datasets

from headprobe.data.sources.footer import check_one_schema, label_digest, plan_units, read_footer
from headprobe.data.sources.safety import check_inside, safe_text
from headprobe.data.sources.source import Chunk, Request, Source, UnitRule, choose_split, file_name
from headprobe.data.sources.streamed import DAMAGE, StreamedSource
from headprobe.errors import RunError, UsageError

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


def open_parquet_folder(request: Request, folder: Path) -> Source:
    """Open a folder of Parquet files, which `datasets` sorts into splits by name or by the folder's README.md.

    Raises:
        UsageError: The folder, the split or a column is not there.
        RunError: A file is broken.
    """
    _stop_download_counts()
    root = folder.resolve()
    try:
        builder = datasets.load_dataset_builder(str(root), request.name)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loading script, which is not run
        raise _explain(error, request) from None

    files: dict[str, list[str]] = {}
    for name, found in (builder.config.data_files or {}).items():
        files[str(name)] = [str(file) for file in found]
    split = choose_split(request.split, list(files), request.path)
    others = [file for file in files[split] if not file.endswith(".parquet")]
    if others:
        raise UsageError(f"--data.path must hold Parquet files, got {file_name(others[0])}")
    check_inside(files[split], f"{root.as_posix()}/", request.path)
    return _open_files(files[split], split, request)


def open_parquet_files(request: Request, pattern: str) -> Source:
    """Open one Parquet file, or all that match a glob, as a single split.

    Raises:
        UsageError: No file matches, the request names a split, or a column is not there.
        RunError: A file is broken.
    """
    if request.split:
        raise UsageError(f"--data.split has no meaning where --data.path names files, got {request.split}")
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UsageError(f"no file matches --data.path, got {request.path}")
    return _open_files([Path(file).resolve().as_posix() for file in files], "test", request)


def _open_files(files: list[str], split: str, request: Request) -> Source:
    rule: UnitRule = "row_group" if request.unit == "auto" else request.unit
    footers = [read_footer(file) for file in files]
    if not sum(footer.rows for footer in footers):
        raise UsageError(f"{request.path} has no rows at all, got {len(footers)} empty files")
    check_one_schema(footers, request)

    _stop_download_counts()
    wanted = [request.image_column, request.label_column]
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
        "labels_sha256": label_digest(files, request.label_column),
    }
    return LocalSource(stream, names, sizes, sum(sizes), request, identity)


def _stop_download_counts() -> None:
    """Keep `datasets` from counting on a server that local files are opened: offline it waits up to 5 seconds."""
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _explain(error: Exception, request: Request) -> UsageError | RunError:
    # The errors of datasets are OSErrors too, but only the system's own have a number.
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(f"datasets cannot use its folder: {safe_text(error)}. Set HF_HOME to a folder you can write to")
    return UsageError(f"--data.path holds no Parquet dataset: {safe_text(error)}, got {request.path}")
