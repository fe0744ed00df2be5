"""How two runs differ, whose numbers must not be mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headprobe.errors import UsageError
from headprobe.units.store import no_units, read_store


def differences(mine: Any, theirs: Any, place: str = "") -> list[str]:
    """Return in words what differs between two identities, such as `data.max_images: 40 here, 50 there`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        lines: list[str] = []
        for name in sorted({*mine, *theirs}):
            inner_place = f"{place}.{name}" if place else name
            lines += differences(mine.get(name), theirs.get(name), inner_place)
        return lines
    if mine == theirs:
        return []
    return [f"{place}: {_shortened(mine)} here, {_shortened(theirs)} there"]


def _shortened(value: Any) -> str:
    """Return a value as JSON, at most 80 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_differences(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to continue with the units of a run with another identity.

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
