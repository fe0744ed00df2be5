"""Two runs whose numbers must not be mixed: in what they differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headprobe.errors import UsageError
from headprobe.units.store import no_units, read_store


def differences(mine: Any, theirs: Any, place: str = "") -> list[str]:
    """Return in words what differs between two descriptions of a run, such as `data.max_images: 40 here, 50 there`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = sorted({*mine, *theirs})
        inside = (differences(mine.get(n), theirs.get(n), f"{place}.{n}" if place else n) for n in names)
        return [line for lines in inside for line in lines]
    if mine == theirs:
        return []
    shown = (text if len(text := json.dumps(value)) <= 80 else f"{text[:77]}..." for value in (mine, theirs))
    return [f"{place}: {next(shown)} here, {next(shown)} there"]


def refuse_differences(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with the units of a run that would give other numbers.

    Raises:
        UsageError: There is no unit store, or it differs; the message lists in what.
    """
    content = read_store(directory)
    if content is None:
        raise no_units(directory)
    lines = differences(json.loads(json.dumps(identity)), content["identity"])
    if lines:
        command = content["sessions"][-1].get("command", "unknown") if content["sessions"] else "unknown"
        raise UsageError(
            f"{str(directory)!r} holds units of another run, whose numbers must not be mixed with this one's; run its "
            f"own command ({command}) or leave --resume out. It differs in\n  " + "\n  ".join(lines[:20])
        )
