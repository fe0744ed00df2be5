"""The unit store: the sums of finished units on disk, so that the same command continues where the last one stopped.

One directory, `units/<key>/`, belongs to one run's key. `store.json` in it holds the identity that the key is made of,
and the sessions that worked on it. Files such as `units-00000-00007.npz` hold the sums of neighbouring units;
the sum of two neighbours replaces their own files, so there are few files, whatever the number of units. A file appears
whole or not at all. A crash may leave a file beside the smaller ones that it replaces; the smaller ones do not count.
"""

import json
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headprobe.errors import RunError, UsageError
from headprobe.files import Lock, cannot_write, now, write_text, writing
from headprobe.units.coverage import Coverage
from headprobe.units.tree import (
    Arrays,
    NamedSums,
    Node,
    Span,
    file_of,
    node_of,
    read_sums,
    span_of,
    unit_files,
    within,
    write_sums,
)

STORE = "store.json"

# Errors that reading a foreign or broken file raises, found by trial.
BROKEN = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error)


@dataclass(frozen=True)
class FinishedUnits:
    """Which units a unit store holds; a test that continues does not score them again.

    Attributes:
        nodes: The nodes of the unit tree that are stored.
        rows: Rows of each finished unit.
        least_budget: The smallest row budget that a unit was computed with, None where there is no unit.
        bad: How many rows could not be used.
    """

    nodes: tuple[Node, ...] = ()
    rows: dict[int, int] = field(default_factory=dict)
    least_budget: int | None = None
    bad: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FinishedUnits":
        """Return the object that was written with `dataclasses.asdict` and JSON."""
        nodes = tuple((int(level), int(index)) for level, index in data["nodes"])
        rows = {int(unit): count for unit, count in data["rows"].items()}
        return cls(nodes, rows, data["least_budget"], data["bad"])


COST = 0.02
"""Share of the time that writing may take: units that finish faster stay in memory, and are written together."""


class UnitStore:
    """The finished units of one key.

    Args:
        directory: Where they are, `units/<key>`.
        units: Number of units of the data set.
    """

    def __init__(self, directory: Path, units: int) -> None:
        self.directory = directory
        self.units = units
        self._stored: set[Span] = set()
        self._written = self._took = 0.0
        self._lock = Lock(directory / "lock")

    def open(self, identity: Mapping[str, Any], session: Mapping[str, Any]) -> FinishedUnits:
        """Begin a session: lock the store against other runs and return what is finished; for one process only.

        Args:
            identity: What the key is made of.
            session: Command, processes and hardware of this session.

        Raises:
            UsageError: Another run works on it.
            RunError: It cannot be written, or `store.json` is broken.
        """
        self._lock.take()
        content = read_store(self.directory) or {"units": self.units, "identity": dict(identity), "sessions": []}
        self.tidy()
        finished = self.finished()
        begun = {
            "began": now(),
            "status": "running",
            "units_before": len(finished.rows),
            "images_before": sum(finished.rows.values()),
        }
        content["sessions"].append({**begun, **session})
        self._write(content)
        return finished

    def end(self, status: str) -> None:
        """End the session.

        Raises:
            RunError: `store.json` cannot be written.
        """
        content = read_store(self.directory)
        if self._lock.taken and content is not None and content["sessions"]:
            content["sessions"][-1] |= {"ended": now(), "status": status}
            self._write(content)

    def close(self) -> None:
        """Release the lock, so that another run can work on the store."""
        self._lock.release()

    def forget(self) -> None:
        """Delete all finished units; for one process only, before `open`.

        Raises:
            UsageError: Another run works on them.
            RunError: They cannot be deleted.
        """
        self._lock.take()
        try:
            for file in [*unit_files(self.directory).values(), *self.records.glob("unit-*.parquet")]:
                file.unlink(missing_ok=True)
            (self.directory / STORE).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.directory, error) from error

    @property
    def records(self) -> Path:
        """Where the records of finished units are kept (`--records`)."""
        return self.directory / "records"

    # -- units -----------------------------------------------------------------------------------------------------

    def finished(self) -> FinishedUnits:
        """Read which units are finished.

        Raises:
            RunError: A file is broken.
        """
        rows: dict[int, int] = {}
        budgets: list[int] = []
        bad = 0
        nodes = []
        for span in self._largest():
            try:
                nodes.append(node_of(span, self.units))
                coverage = Coverage.from_arrays(self._read(nodes[-1], "coverage")["coverage"])
            except BROKEN as error:
                raise broken_file(self.directory / file_of(span), error) from None
            rows |= coverage.rows
            budgets += coverage.budgets.values()
            bad += len(coverage.bad)
        return FinishedUnits(tuple(nodes), rows, min(budgets, default=None), bad)

    def read(self, *metrics: str) -> list[dict[str, Arrays]]:
        """Return the arrays of these metrics, file by file; together they are those of all finished units.

        Raises:
            RunError: A file is broken, or was replaced meanwhile.
        """
        nodes = [node_of(span, self.units) for span in self._largest()]
        return [self._read(node, metrics) for node in nodes]

    def load(self, node: Node) -> dict[str, Arrays]:
        """Return the arrays of stored units, by metric and name.

        Raises:
            RunError: The file is broken or gone.
        """
        arrays = self._read(node)
        self._stored.add(span_of(node, self.units))
        return arrays

    def broken(self, node: Node, error: Exception) -> RunError:
        """Return the message for stored units that are not those of this run."""
        return broken_file(self.directory / file_of(span_of(node, self.units)), error)

    def save(self, nodes: Mapping[Node, NamedSums]) -> None:
        """Store the nodes that are not stored yet, then delete the files that they replace.

        Raises:
            RunError: A file cannot be written; what was stored before is untouched.
        """
        for node, sums in nodes.items():
            span = span_of(node, self.units)
            if span in self._stored:
                continue
            with writing(self.directory / file_of(span)) as file:
                write_sums(sums, file)
            for replaced in [own for own in self._stored if within(own, span)]:
                (self.directory / file_of(replaced)).unlink(missing_ok=True)
                self._stored.discard(replaced)
            self._stored.add(span)

    def save_in_time(self, nodes: Mapping[Node, NamedSums]) -> None:
        """Store what is not stored yet, but not so often that writing takes more than `COST` of the time.

        Raises:
            RunError: A file cannot be written.
        """
        began = time.monotonic()
        if began - self._written >= self._took / COST:
            self.save(nodes)
            self._written = time.monotonic()
            self._took = self._written - began

    def tidy(self) -> None:
        """Delete files whose units are in a larger one, and files that a crash left half-written."""
        kept = set(self._largest())
        for span, path in unit_files(self.directory).items():
            if span not in kept:
                path.unlink(missing_ok=True)
        for path in [*self.directory.glob("*.tmp"), *self.records.glob("*.tmp")]:
            path.unlink(missing_ok=True)

    def _largest(self) -> list[Span]:
        """Return the stored files, without those whose units are in a larger one."""
        spans = sorted(unit_files(self.directory))
        return [span for span in spans if not any(within(span, other) for other in spans)]

    def _write(self, content: Mapping[str, Any]) -> None:
        write_text(self.directory / STORE, json.dumps(content, indent=1, default=str) + "\n")

    def _read(self, node: Node, metrics: str | tuple[str, ...] = "") -> dict[str, Arrays]:
        path = self.directory / file_of(span_of(node, self.units))
        try:
            with path.open("rb") as file:
                return read_sums(file, metrics)
        except FileNotFoundError:
            raise RunError(
                f"{str(path)!r} was replaced while it was read: a process of an earlier run is still at work; wait "
                "until it has ended, then run the same command again to resume"
            ) from None
        except BROKEN as error:
            raise broken_file(path, error) from None


def broken_file(path: Path, error: BaseException) -> RunError:
    """Return the message for a file of the store that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return RunError(
        f"{str(path)!r}, which holds finished units, is broken ({reason}): "
        "delete it and run the same command again; its units are scored again"
    )


def read_store(directory: Path) -> dict[str, Any] | None:
    """Read `store.json`, None where there is none.

    Raises:
        RunError: It is broken.
    """
    path = directory / STORE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{str(path)!r} cannot be read ({error}): {_DELETE}") from None
    if not _is_store(content):
        raise RunError(f"{str(path)!r} is no unit store of headprobe: {_DELETE}")
    return dict(content)


def _is_store(content: Any) -> bool:
    """Return whether the content of a JSON file is that of a `store.json`."""
    if not isinstance(content, dict):
        return False
    for name, kind in {"units": int, "identity": dict, "sessions": list}.items():
        if not isinstance(content.get(name), kind):
            return False
    return all(isinstance(session, dict) for session in content["sessions"])


_DELETE = "delete this file alone and run the same command again; the units beside it stay"


def find_units(path: Path) -> Path:
    """Return the directory of units that a path names: itself, or that of a run's results.

    Raises:
        UsageError: It names neither.
    """
    if (path / STORE).is_file():
        return path
    place = read_units(path)
    units = path / place if place else path
    if not (units / STORE).is_file():
        raise no_units(path)
    return units


def no_units(path: Path) -> UsageError:
    """Return the message for a path without units."""
    return UsageError(
        "there are no units of a run here; give the directory of a run, such as lightning_logs/version_0, or its "
        f"units, lightning_logs/units/KEY, got {str(path)!r}"
    )


def read_units(path: Path) -> str | None:
    """Return where a run's units are, relative to its directory; None without a `run.json` that has it."""
    try:
        return str(json.loads((path / "run.json").read_text(encoding="utf-8"))["units"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
