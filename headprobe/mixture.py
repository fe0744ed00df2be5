"""Refuses a folder into which several runs have written: its `run.json` says what its tables are not."""

import csv
import json
from pathlib import Path
from typing import Any

from headprobe.errors import UsageError
from headprobe.files import text_digest


def refuse_mixture(folder: Path) -> None:
    """Refuse a folder whose `run.json` is of another run than its tables.

    A run that has not ended yet, and one of an older release, has no digests; there the masks are compared.

    Raises:
        UsageError: They do not belong together; the message names the file.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        strange = _strange(folder, record)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return  # no such files, or none of ours: who reads them says so
    if strange:
        raise UsageError(
            f"run.json does not belong to the {strange} beside it: two runs wrote into one folder, or a file was "
            f"changed afterwards; run it again ({record.get('command', 'its command is not known')}), got "
            f"{str(folder)!r}"
        )


def _strange(folder: Path, record: dict[str, Any]) -> str | None:
    """Return the first table that is not of the run of this record."""
    written = record.get("results")
    if written:
        return next((name for name, digest in written.items() if text_digest(folder / name) != digest), None)
    if "variants" not in record:
        return None
    with (folder / "masks.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The baseline, `none`, is in every table; a mask of no heads may have its name.
    there = {(row["mask"], row["ablation"], int(row["draw"])) for row in rows if row["ablation"] != "none"}
    meant = {(name, ablation, draw) for name, _, ablation, draw in record["variants"]}
    return None if there == meant else "masks.csv"
