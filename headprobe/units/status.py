"""How far a run is, read from its units without disturbing it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from headprobe.errors import RunError
from headprobe.files import describe_holder, is_held
from headprobe.units.store import UnitStore, no_units, read_store
from headprobe.units.tree import unit_files

TRIES = 5  # a run at work replaces files while they are listed


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        directory: Its units.
        identity: What its key is made of.
        data: The dataset's name.
        units: How many units there are.
        units_done: How many are finished.
        images: How many images there are, None where that is known only after reading the data.
        images_done: Images of finished units, good and bad.
        bad: Images that could not be used.
        running: The process that works on it, in words; empty if none does.
        ended: How the last session ended: `done`, `interrupted`, `failed`, or `running` where it was killed.
        rate: Images a second of the last session, None before its first unit is finished.
        command: The last session's command.
    """

    directory: Path
    identity: dict[str, Any]
    data: str
    units: int
    units_done: int
    images: int | None
    images_done: int
    bad: int
    running: str
    ended: str
    rate: float | None
    command: str

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is done at the last session's rate, None where that is not known."""
        if self.rate is None or not self.units_done:
            return None
        images = self.images if self.images is not None else self.images_done / self.units_done * self.units
        return (images - self.images_done) / self.rate


def read_status(directory: Path) -> Status:
    """Read how far a run is.

    Raises:
        UsageError: There are no units.
        RunError: A file is broken.
    """
    content = read_store(directory)
    if content is None:
        raise no_units(directory)
    session = content["sessions"][-1] if content["sessions"] else {}
    finished = read_while_written(UnitStore(directory, content["units"]).finished)
    done = sum(finished.rows.values())
    lock = directory / "lock"
    return Status(
        directory=directory,
        identity=content["identity"],
        data=str(session.get("data", "an unknown dataset")),
        units=content["units"],
        units_done=len(finished.rows),
        images=session.get("images"),
        images_done=done,
        bad=finished.bad,
        running=describe_holder(lock) if is_held(lock) else "",
        ended=session.get("status", "unknown"),
        rate=_rate(directory, session, done),
        command=session.get("command", ""),
    )


T = TypeVar("T")


def read_while_written(read: Callable[[], T]) -> T:
    """Read what a run at work may replace just then.

    Raises:
        RunError: A file is broken.
    """
    for _ in range(TRIES - 1):
        try:
            return read()
        except RunError:
            continue
    return read()


def _rate(directory: Path, session: dict[str, Any], images_done: int) -> float | None:
    """Return images a second, from the session's beginning to the last file that it wrote."""
    written = [path.stat().st_mtime for path in unit_files(directory).values() if path.exists()]
    images = images_done - session.get("images_before", 0)
    if not written or images <= 0 or "began" not in session:
        return None
    last = datetime.fromtimestamp(max(written), UTC)
    seconds = (last - datetime.fromisoformat(session["began"])).total_seconds()
    return float(images / max(seconds, 1.0))  # times are kept in whole seconds


def all_units(path: Path) -> list[Path]:
    """Return the directories of all units under a directory of results, such as `lightning_logs`, the newest last."""
    found: list[Path] = []
    for folder in (path, path / "units"):
        found += [file.parent for file in folder.glob("*/store.json")]
    return sorted(found, key=lambda directory: (directory / "store.json").stat().st_mtime)
