"""What a run says of its own time, on a clock that moves only where these tests say so."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headprobe.callbacks import results
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.module import HeadProbe
from tests.cli_runs import QUICK, command

UNITS = 5  # of the bundled digits, each of them one batch here
TAKES: tuple[tuple[Any, str, float], ...] = (
    (HeadProbe, "plan_passes", 1.0),
    (HeadProbe, "test_step", 10.0),
    (ImageNetDataModule, "test_dataloader", 100.0),
    (results, "write_tensorboard", 1000.0),
)
"""How many seconds pass in what: no two sums of them are equal."""


def recorded(folder: Path, patch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """Run one mask on that clock and return its record."""
    now = [0.0]
    patch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for owner, name, seconds in TAKES:
        plain = getattr(owner, name)

        def slow(*args: Any, plain: Any = plain, seconds: float = seconds, **kwargs: Any) -> Any:
            now[0] += seconds
            return plain(*args, **kwargs)

        patch.setattr(owner, name, slow)
    ended = command(folder, "test", "--mask-spec", "layer:0", *QUICK, *words)
    assert ended.code == 0, ended.err
    record: dict[str, Any] = json.loads((ended.directory() / "run.json").read_text())
    return record


def test_the_record_has_seconds_of_setup_loop_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded(tmp_path, monkeypatch, "--resume", "never", "--model.row_budget", "80")
    assert record["seconds_setup"] == 1
    assert record["seconds_loop"] == 100 + UNITS * 10
    assert record["seconds_writing"] == 1000
    assert record["seconds"] == UNITS * 10 + 1000


def test_a_run_that_scores_nothing_again_has_no_time_for_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lightning_logs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        recorded(tmp_path, patch)
    (tmp_path / "lightning_logs" / "version_0").rename(tmp_path / "first")
    record = recorded(tmp_path, monkeypatch)
    assert record["units_resumed"] == UNITS
    assert (record["seconds_setup"], record["seconds_loop"], record["seconds_writing"]) == (1, 100, 1000)
