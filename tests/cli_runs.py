"""Runs the command line in this process, which spares the seconds that torch takes to load."""

import contextlib
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from headprobe.cli import main

QUICK = ("--data.max_images", "40", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
"""Options of a run on 40 of the bundled images."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it printed, its working directory."""

    code: int
    out: str
    err: str
    folder: Path

    def directory(self, version: int = 0) -> Path:
        return self.folder / "lightning_logs" / f"version_{version}"

    def rows(self, version: int = 0) -> list[dict[str, str]]:
        """Return `masks.csv`."""
        with (self.directory(version) / "masks.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def command(folder: Path, *words: str) -> Ended:
    """Run a command with `folder` as its working directory."""
    torch.set_num_threads(1)  # on busy cores the threads of these tiny models wait for each other ten times longer
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["headprobe"])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    return Ended(code, out.getvalue(), err.getvalue(), folder)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave out the figures of runs in this process: drawing takes most of the time of a small run."""
    patch.setattr("headprobe.callbacks.tensorboard.run_figures", lambda run: ())


def only_message(ended: Ended) -> str:
    """Return the one message that a failed command wrote, and check that it wrote nothing else."""
    assert ended.err.startswith("headprobe: error: ")
    assert ended.err.count("headprobe: ") == 1
    assert "Traceback" not in ended.err
    return ended.err.removeprefix("headprobe: error: ")
