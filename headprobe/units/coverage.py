"""Which rows of which units were counted: the proof that every image counts exactly once."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.text import counted, ranges

COVERAGE, SCORES = "coverage", "scores"
"""Names of the sums that every unit has; names of a statistic's sums begin with the statistic's name."""

BadRow = dict[str, Any]
"""A row that could not be used: `unit`, `row` (from 0 inside the unit), `source` and `reason`."""


class Coverage:
    """The rows of finished units, those that could not be used, and the row budget that they were computed with.

    Attributes:
        rows: Rows of each finished unit, good and bad.
        budgets: Row budget of the forward passes of each finished unit; less than the plan's after an out-of-memory.
        bad: Rows that could not be used, in the order of units and rows.
        labels: How the labels of each finished unit lie (`label_sums`).
    """

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.budgets: dict[int, int] = {}
        self.bad: list[BadRow] = []
        self.labels: dict[int, tuple[int, ...]] = {}

    def merge(self, other: "Coverage") -> None:
        """Add other units.

        Raises:
            RunError: A unit is in both.
        """
        twice = sorted(self.rows.keys() & other.rows.keys())
        if twice:
            raise RunError(f"units {ranges(twice)} were counted twice")
        self.rows |= other.rows
        self.budgets |= other.budgets
        self.labels |= other.labels
        self.bad = sorted([*self.bad, *other.bad], key=lambda bad: (bad["unit"], bad["row"]))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return everything as arrays; the bad rows as bytes of JSON."""
        units = sorted(self.rows)
        return {
            "units": np.asarray(units, dtype=np.int64),
            "rows": np.asarray([self.rows[unit] for unit in units], dtype=np.int64),
            "budgets": np.asarray([self.budgets[unit] for unit in units], dtype=np.int64),
            "bad": np.frombuffer(json.dumps(self.bad).encode(), dtype=np.uint8),
            "labels": self.label_sums,
        }

    @property
    def label_sums(self) -> NDArray[np.int64]:
        """How labels lie in each unit, `[units, 5]` (`label_sums`)."""
        sums = [self.labels.get(unit, NO_LABELS) for unit in sorted(self.rows)]
        return np.asarray(sums, dtype=np.int64).reshape(-1, len(NO_LABELS))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return the coverage that `to_arrays` was called on.

        Raises:
            ValueError: The arrays are not those of a coverage.
        """
        # `status` also reads units of an older headprobe, which kept nothing of their labels.
        if arrays.keys() - {"labels"} != {"units", "rows", "budgets", "bad"}:
            raise ValueError(
                f"the arrays must be units, rows, budgets, bad and labels, got {', '.join(sorted(arrays))}"
            )
        coverage = cls()
        units = arrays["units"].tolist()
        coverage.rows = dict(zip(units, arrays["rows"].tolist(), strict=True))
        coverage.budgets = dict(zip(units, arrays["budgets"].tolist(), strict=True))
        coverage.bad = json.loads(arrays["bad"].tobytes().decode())
        if "labels" in arrays:
            coverage.labels = dict(zip(units, map(tuple, arrays["labels"].tolist()), strict=True))
        return coverage


NO_LABELS = (0, 0, 0, 0, 0)


def label_sums(labels: Sequence[int]) -> tuple[int, ...]:
    """Return what shows whether a unit's labels come sorted: whole numbers, the same for any batches and processes.

    Images, sum of the labels, sum of their squares, the first plus the last, sum of products of neighbours.
    """
    if not labels:
        return NO_LABELS
    products = sum(one * other for one, other in pairwise(labels))
    return len(labels), sum(labels), sum(label * label for label in labels), labels[0] + labels[-1], products


class OpenRows:
    """The rows of a unit that is being read, each of which must come exactly once.

    Attributes:
        bad: Its rows that could not be used.
        labels: The labels of its images, in the order in which they came.
    """

    def __init__(self) -> None:
        self.bad: list[BadRow] = []
        self.labels: list[int] = []
        self._rows: set[int] = set()

    def add(self, rows: Sequence[int], bad: Sequence[BadRow], name: str) -> None:
        """Note the rows of one batch: those of its images and its bad ones.

        Raises:
            RunError: A row came before.
        """
        for row in [*rows, *(bad_row["row"] for bad_row in bad)]:
            if row in self._rows:
                raise RunError(f"row {row} of {name} was sent twice; its image would be counted double")
            self._rows.add(row)
        self.bad += bad

    def close(self, unit: int, expected: Sequence[int] | None, budget: int, name: str) -> Coverage:
        """Return the coverage of this unit.

        Args:
            unit: Its number.
            expected: The rows that it must have, None where that is unknown: from 0 on without a gap.
            budget: Row budget of its forward passes.
            name: Its name in messages.

        Raises:
            RunError: Rows are missing, or there are too many.
        """
        wanted = set(range(len(self._rows)) if expected is None else expected)
        missing = sorted(wanted - self._rows)
        strange = sorted(self._rows - wanted)
        if missing or strange:
            found = f"rows {ranges(missing)} are missing" if missing else f"rows {ranges(strange)} are too many"
            raise RunError(
                f"{name} did not give each of its {counted(len(wanted), 'row')} once: {found}. Nothing of it is "
                "counted; check the file, then run the same command again to resume"
            )
        coverage = Coverage()
        coverage.rows, coverage.budgets, coverage.bad = {unit: len(wanted)}, {unit: budget}, self.bad
        coverage.labels = {unit: label_sums(self.labels)}
        return coverage


# -- the last check of a test: every image was counted exactly once, or is listed as unusable -------------------------


SHOWN = 20  # units or images that a message lists


def check_coverage(coverage: Coverage, data: Any) -> None:
    """Compare the rows that were counted with those that the data set has.

    Args:
        coverage: What was counted.
        data: The data module.

    Raises:
        RunError: Units or rows are missing or too many, or no image could be read.
    """
    missing = [unit for unit in range(data.units) if unit not in coverage.rows]
    if missing:
        raise _wrong(f"units {ranges(missing)} of {data.units} are missing")
    for unit, size in enumerate(data.unit_sizes or ()):
        if coverage.rows[unit] != size:
            raise _wrong(f"unit {unit} gave {counted(coverage.rows[unit], 'row')} and has {size:,}")
    total = sum(coverage.rows.values())
    if data.expected_images is not None and total != data.expected_images:
        by_unit = ", ".join(f"{unit}: {rows:,}" for unit, rows in sorted(coverage.rows.items())[:SHOWN])
        raise _wrong(
            f"{counted(total, 'row')} came and the data set has {data.expected_images:,} (rows by unit: {by_unit})"
        )
    if total == len(coverage.bad):
        first = f"; the first: {_line(coverage.bad[0])}" if coverage.bad else ""
        raise RunError(
            f"no image was scored ({counted(total, 'image')} could not be used); check --data.path and "
            f"--data.split{first}"
        )


def images_read(coverage: Coverage) -> int:
    """Return how many images were scored."""
    return sum(coverage.rows.values()) - len(coverage.bad)


def _wrong(what: str) -> RunError:
    return RunError(
        f"not every image was counted exactly once: {what}; nothing was written, since these numbers would be wrong. "
        "Please report this, with the command"
    )


def bad_images_message(bad: Sequence[BadRow], directory: Path) -> str:
    """Return the message that lists the images that could not be used, with the remedy."""
    lines = [f"  {_line(row)}" for row in bad[:SHOWN]]
    more = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "\n".join(
        [
            f"{counted(len(bad), 'image')} could not be used; the results in {directory} are of the others only:",
            *lines,
            *more,
            f"all are listed in {directory / 'bad_images.csv'}; --data.on_bad_image skip or wrong accepts them, and "
            "scores nothing again",
        ]
    )


def bad_calibration_message(bad: Sequence[BadRow]) -> str:
    """Return the message that lists the calibration images that could not be used, with the remedy."""
    return "\n".join(
        [
            f"{counted(len(bad), 'calibration image')} could not be used, so nothing was fitted:",
            *(f"  {_line(row)}" for row in bad[:SHOWN]),
            *([f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []),
            "--data.on_bad_image skip fits on the others",
        ]
    )


def _line(row: BadRow) -> str:
    return f"{row['source']}, row {row['row']}: {row['reason']}"
