"""Whether masks are ordered by a column that was measured on the very images that are judged: that flatters."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headprobe.text import Decision

CALIBRATED = "scores.csv"
"""The table whose columns come from the images that calibrated; those of all others from the judged ones."""


def order_decisions(columns: Sequence[tuple[str, str]], data: Mapping[str, Any]) -> list[Decision]:
    """Return what a run must say of the orders that it took from earlier runs.

    Args:
        columns: Path and column of each order, as in `grow:PATH:COLUMN`.
        data: The identity of the images that are judged.
    """
    found = []
    for path, column in columns:
        measured = _measured_on(Path(path), column)
        if measured is None:
            text = f"{column} of {path}: no run.json says on which images it was measured; on these it would flatter"
            found.append(Decision("order of heads", text, shown=True))
        elif _overlap(measured, data):
            text = f"{column} of {path} was measured on images that this run judges too, which flatters (same)"
            found.append(Decision("order of heads", text, shown=True))
    return found


def _measured_on(path: Path, column: str) -> dict[str, Any] | None:
    """Return the identity of the images that a column was measured on; None where nothing says it."""
    folder = path if path.is_dir() else path.parent
    calibrated = path.name == CALIBRATED if path.is_file() else _has_column(folder / CALIBRATED, column)
    try:
        if calibrated:
            found = json.loads((folder / "calibration.json").read_text("utf-8"))["data"]
        else:
            found = json.loads((folder / "run.json").read_text("utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _has_column(table: Path, column: str) -> bool:
    try:
        with table.open(encoding="utf-8") as lines:
            return column in lines.readline().strip().split(",")
    except (OSError, UnicodeDecodeError):
        return False


def _overlap(measured: Mapping[str, Any], judged: Mapping[str, Any]) -> bool:
    """Return whether some images may be in both."""
    files = judged.get("files") or []
    if measured.get("split") != judged.get("split") or not any(file in files for file in measured.get("files") or []):
        return False
    if measured.get("files") != files or measured.get("unit") != judged.get("unit"):
        return True  # units are cut in another way: nothing is known of single rows
    parts = [_part(identity.get("rows")) for identity in (measured, judged)]
    return None in parts or parts[0] == parts[1]


def _part(rows: Mapping[str, Any] | None) -> bool | None:
    """Return which half is meant, the one that calibrates or the other; None where it is all rows."""
    if not rows or rows.get("rule") != "half":
        return None
    return bool(rows.get("calibrates"))
