"""One contestant: a command in a process of its own, with what it took and what it counted."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHOLE = Path(__file__).with_name("whole.py")
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""


class ContestantError(RuntimeError):
    """A contestant ended with an error; the message is its last words."""


@dataclass(frozen=True)
class Found:
    """What a contestant says of itself.

    Attributes:
        loop: Seconds without imports and set-up.
        counts: How many images are right, by mask.
        nll: Their mean negative log-likelihood in nats, by mask, where it is known.
    """

    loop: float
    counts: dict[str, int]
    nll: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """One run of a contestant.

    Attributes:
        wall: Seconds of the whole command.
        cpu: CPU seconds, user and system, of the process and of all that it started.
        peak: Largest memory in MB of any one of them; the sum of several is not known.
        loop: Seconds without imports and set-up.
        counts: How many images are right, by mask.
        nll: Their mean negative log-likelihood in nats, by mask, where it is known.
    """

    wall: float
    cpu: float
    peak: float
    loop: float
    counts: dict[str, int]
    nll: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """Someone who does the work that is compared.

    Attributes:
        name: As it stands in the table.
        words: The command.
        find: Reads what it found from its working directory and its output.
        threads: `OMP_NUM_THREADS` of its processes.
        needs: Package that must be installed, if any.
        exact: Whether it computes in float32, so that its counts and NLL must be those of the others.
        ours: Whether it is headprobe, whose counts the others are held to.
    """

    name: str
    words: tuple[str, ...]
    find: Callable[[Path, str], Found]
    threads: int
    needs: str | None = None
    exact: bool = True
    ours: bool = False

    def run(self) -> Round:
        """Run the command once in an empty directory.

        Raises:
            ContestantError: It failed.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            began = time.perf_counter()
            cpu, peak = _waited(self.words, folder, self.threads)
            wall = time.perf_counter() - began
            found = self.find(folder, (folder / "stdout").read_text())
        return Round(wall, cpu, peak, found.loop, found.counts, found.nll)


def hand_written(name: str, module: str, setting: Path, threads: int, *words: str, **more: object) -> Contestant:
    """Return the contestant of a module of `benchmarks.peers`, whose further words follow the setting."""
    command = (sys.executable, "-m", f"benchmarks.peers.{module}", str(setting), *words)
    return Contestant(name, command, said, threads, **more)  # type: ignore[arg-type]  # the fields of Contestant


def said(_: Path, output: str) -> Found:
    """Read the JSON line that a hand-written loop ends with."""
    report = json.loads(output.strip().splitlines()[-1])
    return Found(report["loop"], report["top1"], report.get("nll", {}))


def run_for_json(words: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command and return the JSON line that it ends with.

    Raises:
        ContestantError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _waited(words, Path(folder), threads)
        found: dict[str, Any] = json.loads(Path(folder, "stdout").read_text().strip().splitlines()[-1])
    return found


def _waited(words: Sequence[str], folder: Path, threads: int) -> tuple[float, float]:
    """Run a command in `folder` and return its CPU seconds and peak memory in MB.

    Raises:
        ContestantError: It failed.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        command = [sys.executable, "-S", str(WHOLE), str(folder / "used.json"), *words]
        code = subprocess.call(command, cwd=folder, env=environment, stdout=out, stderr=err)
    if code:
        raise ContestantError(_last_line(folder / "stderr") or f"it ended with code {code}")
    used = json.loads((folder / "used.json").read_text())
    return float(used["cpu"]), used["peak"] * PEAK_UNIT / 1e6


def _last_line(file: Path) -> str:
    lines = file.read_text().strip().splitlines()
    return lines[-1].strip() if lines else ""
