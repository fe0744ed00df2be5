"""Refuses folders that would be read wrongly: several runs wrote into one, or a newer headprobe wrote it."""

import csv
import json
from pathlib import Path
from typing import Any

from headprobe.errors import UsageError
from headprobe.files import text_digest

SCHEMA = 1
"""Version of all files that a run leaves: `schema` in `run.json` (which speaks for the tables), in `masks.json`,
`calibration.json` and every npz. Files of before have none: version 0. A change that makes an older reader read a
number wrongly adds 1; further columns and files do not."""

CHECKED = (
    *("masks.csv", "masks.json", "ablations.csv", "scores.csv", "importance.csv", "curves.csv", "orders.csv"),
    *("index_null.csv", "interactions.csv", "shapley.csv", "heads.csv", "heads_change.csv", "spectrum.csv"),
    *("spectrum_change.csv", "classes.csv", "bad_images.csv"),
)
"""Files whose digests stand in `run.json`, as nothing in them shows that their end is missing; an npz file does."""

ALWAYS_THERE = CHECKED[:2]
"""Of a finished run; where it has no other table, the page leaves its part out."""


def refuse_newer(schema: object, path: Path) -> None:
    """Refuse what a newer headprobe wrote; files without a schema are of version 0.

    Raises:
        UsageError: With the version that is there and the versions that can be read.
    """
    if schema is None or (isinstance(schema, int) and 0 <= schema <= SCHEMA):
        return
    raise UsageError(
        f"{path.name} has schema {schema!r}, and this headprobe reads 0 to {SCHEMA}: a newer release wrote it, so "
        f"update headprobe (python -m pip install --upgrade headprobe), got {str(path)!r}"
    )


def refuse_mixture(folder: Path) -> None:
    """Refuse a folder whose `run.json` is of another run than its tables, or of a newer headprobe.

    A run that has not ended yet, and one of an older release, has no digests; there the masks are compared.

    Raises:
        UsageError: They do not belong together, or are newer; the message names the file.
    """
    unreadable = (OSError, ValueError, KeyError, AttributeError, TypeError)  # no such files, or none of ours
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        schema = record.get("schema")
    except unreadable:
        return  # who reads them says so
    refuse_newer(schema, folder / "run.json")
    try:
        strange = _strange(folder, record)
    except unreadable:
        return
    if strange:
        raise UsageError(
            f"run.json does not belong to the {strange} beside it: two runs wrote into one folder, or a file was "
            f"changed or cut off afterwards; run it again ({record.get('command', 'its command is not known')}), got "
            f"{str(folder)!r}"
        )


def _strange(folder: Path, record: dict[str, Any]) -> str | None:
    """Return the first table that is not of the run of this record."""
    written = record.get("results")
    if written:
        kept = [name for name in written if name in ALWAYS_THERE or (folder / name).is_file()]
        return next((name for name in kept if text_digest(folder / name) != written[name]), None)
    if "variants" not in record:
        return None
    with (folder / "masks.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The baseline, `none`, is in every table; a mask of no heads may have its name.
    there = {(row["mask"], row["ablation"], int(row["draw"])) for row in rows if row["ablation"] != "none"}
    meant = {(name, ablation, draw) for name, _, ablation, draw in record["variants"]}
    return None if there == meant else "masks.csv"
