"""Several finished runs beside each other: `headprobe.load_runs`."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from headprobe.errors import HeadprobeWarning, UsageError
from headprobe.loaded.run import Run, load_run
from headprobe.loaded.tables import TABLES, NotInRunError, Tables
from headprobe.text import counted


class Runs(Tables, Mapping[str, Run]):
    """Several runs by name: tables are joined, with the column `run` in front.

    Args:
        runs: The runs.
        unread: Paths that hold a run which cannot be read, and why.
    """

    def __init__(self, runs: Mapping[str, Run], unread: Mapping[str, str]) -> None:
        self._runs, self.unread = dict(runs), dict(unread)
        self._frames: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> Run:
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def tables(self) -> tuple[str, ...]:
        """The files of the tables that any run has."""
        return tuple(name for name in TABLES if any(name in run.tables for run in self._runs.values()))

    def frame(self, name: str) -> pd.DataFrame:
        """Return a table of all runs that have it, one below the other; a warning names the others.

        Raises:
            NotInRunError: No run has it.
        """
        if name not in self._frames:
            self._frames[name] = self._joined(name)
        return self._frames[name]

    def _joined(self, name: str) -> pd.DataFrame:
        frames: dict[str, pd.DataFrame] = {}
        without: dict[str, NotInRunError] = {}
        for run_name, run in self._runs.items():
            try:
                frames[run_name] = run.frame(name)
            except NotInRunError as error:
                without[run_name] = error
        if not frames:
            raise next(iter(without.values()))
        if without:
            warnings.warn(
                f"{name} is of {len(frames)} of {len(self)} runs; without it: {', '.join(without)}",
                category=HeadprobeWarning,
                stacklevel=4,
            )
        units = {column: unit for frame in frames.values() for column, unit in frame.attrs["units"].items()}
        bare = [_named(run_name, frame) for run_name, frame in frames.items()]
        joined = pd.concat(bare, ignore_index=True)
        joined.attrs = {"file": name, "units": {"run": "", **units}, "runs_without": list(without)}
        return joined

    @property
    def meta(self) -> dict[str, dict[str, Any]]:
        """`run.json` of each run."""
        return {name: run.meta for name, run in self._runs.items()}

    @property
    def masked_heads(self) -> dict[str, dict[str, list[tuple[int, int]]]]:
        """For every run and mask its heads as (layer, head)."""
        return {name: run.masked_heads for name, run in self._runs.items()}

    @property
    def similarity(self) -> dict[str, dict[str, NDArray[Any]]]:
        """`similarity.npz` of each run that has one."""
        return self._arrays("similarity")

    @property
    def offset_maps(self) -> dict[str, dict[str, NDArray[Any]]]:
        """`offset_maps.npz` of each run that has one."""
        return self._arrays("offset_maps")

    @property
    def groups(self) -> dict[str, dict[str, NDArray[Any]]]:
        """`groups.npz` of each run that has one."""
        return self._arrays("groups")

    def _arrays(self, name: str) -> dict[str, dict[str, NDArray[Any]]]:
        found = {run_name: getattr(run, name, None) for run_name, run in self._runs.items()}
        if not any(found.values()):
            getattr(next(iter(self._runs.values())), name)  # raises, with what makes it
        return {run_name: arrays for run_name, arrays in found.items() if arrays}

    def __repr__(self) -> str:
        return f"Runs({', '.join(map(repr, self._runs.values()))})"

    def _repr_html_(self) -> str:
        shown = [f"<b>{escape(name)}</b>{run._repr_html_()}" for name, run in self._runs.items()]
        unread = [f"<p>not read: {escape(path)}: {escape(why)}</p>" for path, why in self.unread.items()]
        return "".join([*shown, *unread])


def _named(run_name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy with the column `run` in front; attributes of one run are not those of all."""
    named = frame.copy()
    named.attrs = {}
    named.insert(0, "run", pd.Series([run_name] * len(named), dtype="str", index=named.index))
    return named


def load_runs(pattern: str | Path | Sequence[str | Path]) -> Runs:
    """Read several finished runs.

    A name is the part of a path that tells the runs apart: `vit` and `swin` for `vit/lightning_logs/version_0` and
    `swin/lightning_logs/version_0`.

    Args:
        pattern: A pattern such as `lightning_logs/version_*` or `study/**/version_*`, or the paths themselves.

    Raises:
        UsageError: No run is there, or none can be read. A warning names those of several that cannot be.
    """
    given = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    folders = sorted(_folders(pattern), key=_by_number) if isinstance(pattern, str | Path) else [Path(p) for p in given]
    if not folders:
        raise UsageError(f"there is no run: give a pattern such as 'lightning_logs/version_*', got {str(pattern)!r}")
    runs: dict[Path, Run] = {}
    unread: dict[str, str] = {}
    each: dict[Path, Path] = {}  # a run that two paths lead to counts once
    for folder in folders:
        each.setdefault(folder.resolve(), folder)
    for folder in each.values():
        try:
            runs[folder] = load_run(folder)
        except UsageError as error:
            unread[str(folder)] = str(error)
    few = "; ".join(unread.values())
    if not runs:
        raise UsageError(f"none of {counted(len(unread), 'run')} can be read: {few}")
    if unread:
        warnings.warn(
            f"{len(unread)} of {counted(len(each), 'run')} cannot be read: {few}",
            category=HeadprobeWarning,
            stacklevel=2,
        )
    return Runs(dict(zip(_names(list(runs)), runs.values(), strict=True)), unread)


def _folders(pattern: str | Path) -> Iterator[Path]:
    """Yield the folders that a test wrote into; `fit` and the store of units leave no such files."""
    for found in glob(str(pattern), recursive=True):
        if any((Path(found) / name).is_file() for name in ("run.json", "masks.csv")):
            yield Path(found)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return the key by which version_2 comes before version_10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the parts of the paths that differ, without folders that all have before and behind them."""
    parts = [folder.absolute().parts for folder in folders]
    if len(parts) == 1:
        return [parts[0][-1]]
    shortest = min(map(len, parts))
    first = next((at for at in range(shortest) if len({path[at] for path in parts}) > 1), shortest - 1)
    room = shortest - first
    last = next((at for at in range(1, room) if len({path[-at] for path in parts}) > 1), room)
    return ["/".join(path[first : len(path) - last + 1]) for path in parts]
