"""Row budgets that were measured before, one small file each, so that a machine measures a run's only once."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headprobe.errors import RunError
from headprobe.files import write_text
from headprobe.run.record import run_key


def measured_budget(directory: Path, about: Mapping[str, Any]) -> int | None:
    """Return the row budget that was measured for the same, None where none was or its file is broken.

    Args:
        directory: Where budgets are kept.
        about: Model, masks, machine and versions, as plain data.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        rows = json.loads(_file(directory, about).read_text(encoding="utf-8"))["rows"]
        return rows if type(rows) is int and rows > 0 else None  # true is an int, too
    return None


def keep_budget(directory: Path, about: Mapping[str, Any], rows: int, seconds: Mapping[int, float]) -> None:
    """Keep a measured row budget; a directory that cannot be written to keeps nothing.

    Args:
        directory: Where budgets are kept.
        about: As above.
        rows: The budget.
        seconds: Seconds an image, for each budget that was tried.
    """
    with suppress(RunError):
        found = {"rows": rows, "seconds_per_image": {str(tried): seconds[tried] for tried in sorted(seconds)}}
        write_text(_file(directory, about), json.dumps({**found, "about": about}, indent=2) + "\n")


def _file(directory: Path, about: Mapping[str, Any]) -> Path:
    return directory / f"{run_key(about)}.json"
