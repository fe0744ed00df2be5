"""The last check of a test: every image of the data set was counted exactly once, or is listed as unusable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headprobe.errors import RunError
from headprobe.metrics.coverage import BadRow, Coverage
from headprobe.wording import counted, ranges

SHOWN = 20


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
            raise _wrong(f"unit {unit} gave {coverage.rows[unit]:,} rows and has {size:,}")
    total = sum(coverage.rows.values())
    if data.expected_images is not None and total != data.expected_images:
        by_unit = ", ".join(f"{unit}: {rows:,}" for unit, rows in sorted(coverage.rows.items())[:SHOWN])
        raise _wrong(f"{total:,} rows came and the data set has {data.expected_images:,} (rows by unit: {by_unit})")
    if total == len(coverage.bad):
        first = f"; the first: {_line(coverage.bad[0])}" if coverage.bad else ""
        raise RunError(
            f"no image was scored ({counted(total, 'image')} could not be read); check --data.path and "
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
    """Return the message that lists the images that could not be used, and says what to do about them."""
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


def _line(row: BadRow) -> str:
    return f"{row['source']}, row {row['row']}: {row['reason']}"
