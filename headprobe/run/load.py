"""Reads the files of a finished run, of any day and on any machine: needs numpy alone."""

import csv
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import NONE
from headprobe.mixture import SCHEMA, refuse_mixture, refuse_newer
from headprobe.run.columns import COLUMNS, Kind
from headprobe.text import counted, first_line

Cell = str | int | float

PRUNED = "pruned.json"
"""What `prune` adds to the folder of its run: the smaller model, its cost, and the sets that it was chosen from."""

Row = dict[str, Cell]
"""A row of a table, by column; an empty cell is NaN."""

Columns = dict[str, NDArray[Any]]
"""A table by column."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a finished run, read back.

    Attributes:
        path: Its directory.
        masks: Rows of `masks.csv`, the baseline first; an empty cell is NaN.
        heads: For every mask its heads as (layer, head).
        curves: For every mask the curve that it is on, such as `by_layer`, and its step there.
        record: `run.json`.
    """

    path: Path
    masks: list[Row]
    heads: dict[str, list[tuple[int, int]]]
    curves: dict[str, tuple[str, int]]
    record: dict[str, Any]

    @property
    def labelled(self) -> bool:
        """Whether images were judged by their labels; else by the model's feature alone."""
        return "top1" in self.masks[0]

    @property
    def calibration(self) -> str:
        """Which images fitted constants: `half`, `same`, `split:NAME`, `other`; nothing where nothing was fitted."""
        return calibration_of(self.record)

    @property
    def fitted_in_words(self) -> str:
        """Which images fitted the constants, for titles; nothing where nothing was fitted."""
        rule, number = self.calibration, int(self.record.get("calibration_images") or 0)
        if rule in ("", SAME):
            return JUDGED_ON_SAME if rule else ""
        if rule == OTHER:
            return f"fitted on {number:,} of other data"
        return f"fitted on {counted(number, 'other')} ({rule})"

    def table(self, name: str) -> Columns | None:
        """Return a table such as `heads.csv` by column, an empty cell being NaN; None where there is no such file.

        Raises:
            RunError: It is cut off, or not headprobe's.
        """
        path = self.path / name
        if not path.is_file():
            return None
        with naming(path):
            rows = list(_rows(path))
        return {column: np.array([row[column] for row in rows]) for column in (rows[0] if rows else ())}

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of a file such as `similarity.npz`, without its `schema`; none where there is no such file.

        Raises:
            UsageError: A newer headprobe wrote it.
            RunError: It is cut off, or not headprobe's.
        """
        return self._content(name, _arrays)

    def document(self, name: str) -> dict[str, Any]:
        """Return a JSON file such as `pruned.json`, without its `schema`; nothing where there is no such file.

        Raises:
            UsageError: A newer headprobe wrote it.
            RunError: It is cut off, or not headprobe's.
        """
        return self._content(name, lambda path: dict(json.loads(path.read_text(encoding="utf-8"))))

    def _content(self, name: str, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return what `read` gives of a file, without its `schema`; nothing where there is no such file."""
        path = self.path / name
        if not path.is_file():
            return {}
        with naming(path):
            found = read(path)
        schema = found.pop("schema", None)
        _check_schema(schema.item() if isinstance(schema, np.ndarray) else schema, path)
        return found

    def described(self, name: str) -> dict[str, Columns]:
        """Return a table about heads for each model: `baseline`, `masked` and their `change`, where they are there.

        Args:
            name: `heads` or `spectrum`: the tables are `NAME.csv` and `NAME_change.csv`.
        """
        found: dict[str, Columns] = {}
        models = self.table(f"{name}.csv")
        if models:
            baseline = models["mask"] == NONE
            found["baseline"] = {column: values[baseline] for column, values in models.items()}
            if not baseline.all():
                found["masked"] = {column: values[~baseline] for column, values in models.items()}
        change = self.table(f"{name}_change.csv")
        return found if change is None else found | {"change": change}


def main_cost(row: Row) -> str:
    """Return the column of `masks.csv` that masks are ranked by: the drop, or without labels the feature's distance."""
    return "drop_pp" if "drop_pp" in row else "feature_distance"


SAME, OTHER = "same", "other"
"""Rules of calibration: the same images fit and judge; constants of an earlier run on other data."""

JUDGED_ON_SAME = "judged on the images that fitted the constants"
"""What titles say of a run with `--data.calibration same`."""


def calibration_of(record: Mapping[str, Any]) -> str:
    """Return which images fitted constants, by a run's record: `half`, `same`, `split:NAME`, `other`, or nothing."""
    if not record.get("calibration"):  # the rows may be cut though nothing was fitted
        return ""
    rows = (record.get("data") or {}).get("rows") or {}
    return str(rows.get("rule", OTHER))


def load_files(path: str | Path) -> RunFiles:
    """Read a run's directory, as in `lightning_logs/version_0`.

    Raises:
        UsageError: There is no finished run, `run.json` is of another run than the tables beside it, or files are of a
            newer headprobe or of one that is too old.
    """
    refuse_mixture(Path(path))
    return read_files(path)


def read_files(path: str | Path) -> RunFiles:
    """Read a directory that this process has just written, which needs no check.

    Raises:
        UsageError: There is no finished run, or its files are of another form.
    """
    directory = Path(path)
    try:
        return _read(directory)
    except NotADirectoryError as error:
        raise UsageError(
            f"{str(path)!r} is a file: give the directory of a finished run, such as lightning_logs/version_0"
        ) from error
    except FileNotFoundError as error:
        raise UsageError(
            f"{str(path)!r} is not the directory of a finished run: {Path(error.filename).name} is missing; "
            "give one such as lightning_logs/version_0"
        ) from error
    except UsageError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the files of this run are not as headprobe writes them now ({type(error).__name__}: {error}): an older "
            f"release wrote them, or they were changed; run it again, got {str(path)!r}"
        ) from error


def _read(directory: Path) -> RunFiles:
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    masks = json.loads((directory / "masks.json").read_text(encoding="utf-8"))
    rows = list(_rows(directory / "masks.csv"))
    _check_schema(masks.pop("schema", None), directory / "masks.json")
    heads: dict[str, list[tuple[int, int]]] = {}
    curves: dict[str, tuple[str, int]] = {}
    for name, mask in masks.items():
        heads[name] = [(int(layer), head) for layer, own in mask["masked_heads"].items() for head in own]
        curves[name] = (mask["curve"], mask["step"])
    return RunFiles(directory, rows, heads, curves, record)


def _check_schema(schema: object, path: Path) -> None:
    if schema != SCHEMA:
        refuse_newer(schema, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what reading a broken file raises into one message with its name.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        yield
    except (csv.Error, EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(
            f"{path.name} cannot be read, as it is cut off or not headprobe's ({reason}); the command in the run's "
            f"run.json makes it again, got {str(path)!r}"
        ) from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


def _rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table, each cell in the type of its column.

    Raises:
        ValueError: A row has too few cells or too many, as where the file is cut off.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not table.fieldnames:
            raise ValueError("there is no line with the names of the columns")
        for row in table:
            if None in row or None in row.values():  # what `csv` makes of too many cells, and of too few
                raise ValueError(f"line {table.line_num} has not {len(table.fieldnames)} cells")
            yield {name: _cell(name, text) for name, text in row.items()}


def _cell(name: str, text: str) -> Cell:
    column = COLUMNS.get(name)
    if column is None or column.kind is Kind.FLOAT:  # written with full precision: read back to the last bit
        return float(text) if text else math.nan
    if column.kind is Kind.TEXT:
        return text
    # Beside an empty cell numbers of dims are written as floats, such as 16.0.
    return int(float(text)) if text else math.nan  # a whole layer has no number of a head
