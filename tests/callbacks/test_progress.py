"""Progress: few lines in a log, images on a terminal."""

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headprobe.callbacks.progress import ImageProgress, LogProgress, progress_for
from headprobe.callbacks.resume import Resume
from headprobe.units.store import UnitStore
from tests.run.test_decided import store


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scored(
    monkeypatch: pytest.MonkeyPatch,
    seconds_a_batch: float,
    images: int | None,
    batches: int,
    callbacks: Sequence[Any] = (),
) -> list[str]:
    """Return the lines of a run whose batches of 10 images take so long."""
    clock = SimpleNamespace(now=0.0)
    out = io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(sys, "stderr", out)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(images_to_do=images), world_size=1, callbacks=callbacks)
    lines, nothing = LogProgress(), SimpleNamespace()
    lines.on_test_start(trainer, nothing)  # type: ignore[arg-type]
    for _ in range(batches):
        clock.now += seconds_a_batch
        batch = SimpleNamespace(labels=[0] * 10, bad=[])
        lines.after_batch(trainer, nothing, nothing, batch)  # type: ignore[arg-type]
    return out.getvalue().splitlines()


def test_a_terminal_gets_a_bar_and_a_log_gets_lines() -> None:
    assert isinstance(progress_for(_Terminal()), ImageProgress)
    assert isinstance(progress_for(io.StringIO()), LogProgress)


def test_a_short_run_writes_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored(monkeypatch, 0.05, 1000, 100) == []


def test_a_long_run_writes_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = scored(monkeypatch, 2.0, 10_000, 1000)
    assert len(lines) == 10
    assert lines[0] == "headprobe: scored 1,000 of 10,000 images, 5 a second, about 30 min left"


def test_a_very_long_run_writes_a_line_every_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(scored(monkeypatch, 60.0, 10_000, 100)) == 10


def test_an_unknown_number_of_images_shows_those_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored(monkeypatch, 60.0, None, 10) == ["headprobe: scored 100 images, 0.167 a second"]


def test_a_line_says_how_many_masks_the_stored_units_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resume = Resume()
    resume.store = UnitStore(store(tmp_path, 2), 6)
    (line,) = scored(monkeypatch, 60.0, 10_000, 10, [resume])
    assert line.endswith(" left, decided 3 of 7 masks")


def test_other_processes_write_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = LogProgress()
    lines.disable()
    lines._write("x")
    assert capsys.readouterr().err == ""
