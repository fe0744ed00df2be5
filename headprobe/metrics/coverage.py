"""Which rows of which units were counted: the proof that every image counts exactly once."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.wording import ranges

BadRow = dict[str, Any]
"""A row that could not be used: `unit`, `row` (from 0 inside the unit), `source` and `reason`."""


class Coverage:
    """The rows of finished units, those that could not be used, and the row budget that they were computed with.

    Attributes:
        rows: Rows of each finished unit, good and bad.
        budgets: Row budget of the forward passes of each finished unit; less than asked for where memory ended.
        bad: Rows that could not be used, in the order of units and rows.
    """

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.budgets: dict[int, int] = {}
        self.bad: list[BadRow] = []

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
        self.bad = sorted([*self.bad, *other.bad], key=lambda bad: (bad["unit"], bad["row"]))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return everything as arrays; the bad rows as bytes of JSON."""
        units = sorted(self.rows)
        return {
            "units": np.asarray(units, dtype=np.int64),
            "rows": np.asarray([self.rows[unit] for unit in units], dtype=np.int64),
            "budgets": np.asarray([self.budgets[unit] for unit in units], dtype=np.int64),
            "bad": np.frombuffer(json.dumps(self.bad).encode(), dtype=np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return the coverage that `to_arrays` was called on.

        Raises:
            ValueError: The arrays are not those of a coverage.
        """
        if arrays.keys() != {"units", "rows", "budgets", "bad"}:
            raise ValueError(f"the arrays must be units, rows, budgets and bad, got {', '.join(sorted(arrays))}")
        coverage = cls()
        units = arrays["units"].tolist()
        coverage.rows = dict(zip(units, arrays["rows"].tolist(), strict=True))
        coverage.budgets = dict(zip(units, arrays["budgets"].tolist(), strict=True))
        coverage.bad = json.loads(arrays["bad"].tobytes().decode())
        return coverage


class OpenUnit:
    """The rows of a unit that is being read, each of which must come exactly once."""

    def __init__(self) -> None:
        self.bad: list[BadRow] = []
        self._rows: set[int] = set()

    def add(self, rows: Sequence[int], bad: Sequence[BadRow], name: str) -> None:
        """Note the rows of one batch, those of images and the bad ones.

        Raises:
            RunError: A row came before.
        """
        for row in [*rows, *(bad_row["row"] for bad_row in bad)]:
            if row in self._rows:
                raise RunError(f"row {row} of {name} was sent twice; its image would be counted double")
            self._rows.add(row)
        self.bad += bad

    def close(self, unit: int, expected: int | None, budget: int, name: str) -> Coverage:
        """Return the coverage of this unit.

        Args:
            unit: Its number.
            expected: The rows that it must have, None where nothing says so.
            budget: Row budget of its forward passes.
            name: What it is called in messages.

        Raises:
            RunError: Rows are missing, or there are too many.
        """
        wanted = set(range(len(self._rows) if expected is None else expected))
        missing, strange = sorted(wanted - self._rows), sorted(self._rows - wanted)
        if missing or strange:
            found = f"rows {ranges(missing)} are missing" if missing else f"rows {ranges(strange)} are too many"
            raise RunError(
                f"{name} did not give each of its {len(wanted):,} rows once: {found}. Nothing of it is counted; check "
                "the file, then run the same command again to resume"
            )
        coverage = Coverage()
        coverage.rows, coverage.budgets, coverage.bad = {unit: len(wanted)}, {unit: budget}, self.bad
        return coverage
