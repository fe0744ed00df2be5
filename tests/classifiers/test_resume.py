"""Fitting a classifier is exactly once: broken off or killed in either stage, by one process or two: the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from headprobe.errors import RunError
from headprobe.module import HeadProbe
from tests.cli_runs import Ended, command, only_message
from tests.forked import digits, resumed_after_a_kill, run

pytestmark = pytest.mark.usefixtures("no_pictures")

RUN = (
    *("test", "--data.path", "set", "--data.num_workers", "0", "--trainer.accelerator", "cpu"),
    *("--mask-spec", "each:layer"),
)
UNITS = 5
RESULTS = ("calibration.safetensors", "calibration.json", "masks.csv", "groups.npz")
KINDS = ("class-mean", "knn")

Batches = dict[str, int]
"""Batches that were computed in each stage."""


def counted_run(folder: Path, *more: str, ends: tuple[str, int] | None = None) -> tuple[Ended, Batches]:
    """Run `RUN` and count its batches; where it `ends`, in a stage after some batches, the machine goes away."""
    real = HeadProbe.test_step
    seen: Batches = {"validate": 0, "test": 0}

    def step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        stage = "validate" if self.calibrating else "test"
        if ends == (stage, seen[stage]):
            raise RunError("the machine went away")
        seen[stage] += 1
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProbe, "test_step", step)
        ended = command(folder, *RUN, *more)
    if ends is not None:
        assert ended.code == 1
        assert only_message(ended) == "the machine went away\n"
    return ended, seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits(tmp_path / "set", 60, UNITS)
    return tmp_path


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Ended]:
    folder = tmp_path_factory.mktemp(f"undisturbed {request.param}")
    digits(folder / "set", 60, UNITS)
    ended, batches = counted_run(folder, *options(request.param))
    assert (ended.code, batches) == (0, {"validate": UNITS, "test": UNITS}), ended.err
    return request.param, ended


def options(kind: str) -> tuple[str, ...]:
    # few images: some classes may be in one half only
    return "--model.classifier", kind, "--data.on_bad_image", "skip"


def same_bits(ended: Ended, version: int, undisturbed: Ended) -> None:
    for name in RESULTS:
        one, other = ((folder / name).read_bytes() for folder in (ended.directory(version), undisturbed.directory()))
        assert one == other, name


def test_a_fit_that_broke_off_goes_on_to_the_same_bits(folder: Path, undisturbed: tuple[str, Ended]) -> None:
    kind, whole = undisturbed
    counted_run(folder, *options(kind), ends=("validate", 2))
    assert not (folder / "lightning_logs" / "version_0").exists()  # nothing was judged
    ended, batches = counted_run(folder, *options(kind))
    assert batches == {"validate": UNITS - 2, "test": UNITS}
    same_bits(ended, 0, whole)


def test_a_test_that_broke_off_after_the_fit_fits_nothing_again(folder: Path, undisturbed: tuple[str, Ended]) -> None:
    kind, whole = undisturbed
    counted_run(folder, *options(kind), ends=("test", 3))
    ended, batches = counted_run(folder, *options(kind))
    assert batches == {"validate": 0, "test": UNITS - 3}
    assert json.loads((ended.directory(1) / "run.json").read_text())["units_resumed"] == 3
    same_bits(ended, 1, whole)


def test_a_fit_resumes_no_other_kind_and_a_judged_run_no_other_classifier(
    folder: Path, undisturbed: tuple[str, Ended]
) -> None:
    kind, _ = undisturbed
    counted_run(folder, *options(kind), ends=("test", 3))
    other = next(name for name in KINDS if name != kind)
    assert counted_run(folder, *options(other))[1] == {"validate": UNITS, "test": UNITS}
    changed = "class-mean:0.2" if kind == "class-mean" else "knn:3"
    assert counted_run(folder, *options(changed))[1] == {"validate": 0, "test": UNITS}


def test_two_processes_fit_and_judge_the_same_bits(folder: Path, undisturbed: tuple[str, Ended]) -> None:
    kind, whole = undisturbed
    ended = run(folder, *RUN, *options(kind), processes=2)
    assert ended.code == 0, ended.err
    same_bits(ended, 0, whole)


@pytest.fixture(scope="module", params=KINDS)
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Ended]:
    """A command that takes long enough to be killed in either stage, and its run in one piece."""
    folder = tmp_path_factory.mktemp(f"long {request.param}")
    data = digits(folder / "set", 480, 40)
    words = (*RUN, *options(request.param), "--data.batch_size", "2", "--data.path", str(data))
    whole = run(folder / "whole", *words)
    assert whole.code == 0, whole.err
    return words, whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_two_processes_that_are_killed_go_on_as_one_to_the_same_bits(
    tmp_path: Path, long: tuple[tuple[str, ...], Ended], stage: str
) -> None:
    words, whole = long
    ended, judged = resumed_after_a_kill(tmp_path / "killed", {"fit": 1, "test": 2}[stage], *words)
    same_bits(ended, judged, whole)
