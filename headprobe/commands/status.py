"""`status`: shows how far a run is."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprobe.commands.parser import Parser
from headprobe.errors import RunError
from headprobe.run.decided import Decided, read_decided
from headprobe.text import counted, duration
from headprobe.units.status import Status, all_units, read_status
from headprobe.units.store import find_units


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: The path names no run.
        RunError: A file of the run is broken.
    """
    parser = Parser(prog="headprobe status", description="Show how far a run is: units done, rate, time left.")
    parser.add_argument(
        "path", type=str, help="A run's directory, its units (lightning_logs/units/KEY), or lightning_logs for all."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(words)
    path = Path(options.path)
    several = all_units(path)
    found, broken = [], []
    for directory in several or [find_units(path)]:
        try:
            found.append((read_status(directory), *read_decided(directory)))
        except RunError as error:
            if len(several) < 2:
                raise
            broken.append(str(error))
    if options.json:
        sys.stdout.write(json.dumps([as_json(*run) for run in found], indent=1) + "\n")
        return
    texts = ["".join(f"{line}\n" for line in lines_of(*run)) for run in found]
    sys.stdout.write("\n".join([*texts, *(f"{message}\n" for message in broken)]))
    if broken:
        raise RunError(f"{counted(len(broken), 'file')} of units cannot be read")


def lines_of(status: Status, decided: Sequence[Decided], why_not: str) -> list[str]:
    """Return the lines that show how far a run is.

    Args:
        status: How far it is.
        decided: How many masks of each test family are decided.
        why_not: Why that cannot be said, nothing where it can.
    """
    variants = status.identity.get("variants", [])
    calibrates = not variants and (status.identity.get("data", {}).get("rows") or {}).get("calibrates")
    masks = "the images that calibrate" if calibrates else counted(len(variants), "mask")
    lines = [
        f"{status.directory}: {_model(status)} on {status.data}, {masks}",
        f"done: {status.units_done:,} of {counted(status.units, 'unit')}, {_images(status)}"
        + (f", {status.bad:,} of them unusable" if status.bad else ""),
    ]
    if why_not:
        lines.append(f"decided so far: cannot be said, since {why_not} (docs/results.md)")
    several = len({own.ablation for own in decided}) > 1
    for own in decided:
        under = f" under {own.ablation}" if several else ""
        lines.append(f"decided so far: {own.decided:,} of {counted(own.masks, 'mask')} of {own.test_family}{under}")
    return [*lines, _state(status), f"command: {status.command}"]


def _images(status: Status) -> str:
    """Return how many images are done, of how many where that is known."""
    if status.images is None:
        return counted(status.images_done, "image")
    return f"{status.images_done:,} of {counted(status.images, 'image')}"


def _model(status: Status) -> str:
    return str(status.identity.get("model", {}).get("name", "an unknown model"))


def _state(status: Status) -> str:
    rate = f"{status.rate:.3g} images a second" if status.rate is not None else "no unit finished yet in this session"
    if status.running:
        left = status.seconds_left
        return f"running ({status.running}): {rate}" + (f", about {duration(left)} left" if left is not None else "")
    if status.units_done == status.units:
        return "complete: the same command only adds it up"
    how = {"interrupted": "interrupted", "failed": "failed", "done": "ended"}.get(status.ended, "ended from outside")
    return f"not running, the last session {how} ({rate}): run the same command again to resume"


def as_json(status: Status, decided: Sequence[Decided], why_not: str) -> dict[str, Any]:
    """Return the status as plain data."""
    return {
        "units": str(status.directory),
        "model": _model(status),
        "data": status.data,
        "masks": len(status.identity.get("variants", [])),
        "units_done": status.units_done,
        "units_total": status.units,
        "images_done": status.images_done,
        "images_total": status.images,
        "bad_images": status.bad,
        "running": bool(status.running),
        "last_session": status.ended,
        "images_per_second": status.rate,
        "seconds_left": status.seconds_left,
        "decided": [asdict(own) for own in decided],
        "why_none_decided": why_not,
        "command": status.command,
    }
