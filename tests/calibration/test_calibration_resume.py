"""A calibration that was broken off goes on to the same bits; other batches and rows give the same constants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headprobe.errors import RunError
from headprobe.module import HeadProbe
from tests.cli_runs import Ended, command, only_message
from tests.forked import digits

RUN = (
    *("test", "--data.path", "set", "--data.num_workers", "0", "--trainer.accelerator", "cpu"),
    *("--mask-spec", "each:layer", "--ablation", "mean,linear,position"),
)
UNITS = 5
RESULTS = ("calibration.safetensors", "calibration.json", "masks.csv", "ablations.csv", "groups.npz")

pytestmark = pytest.mark.usefixtures("no_pictures")

Batches = dict[str, int]
"""Batches that were computed in each stage."""


def calibrated(folder: Path, *more: str, ends: tuple[str, int] | None = None) -> tuple[Ended, Batches]:
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


def record(ended: Ended, version: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ended.directory(version) / "run.json").read_text())
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits(tmp_path / "set", 40, UNITS)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("undisturbed")
    digits(folder / "set", 40, UNITS)
    ended, batches = calibrated(folder)
    assert (ended.code, batches) == (0, {"validate": UNITS, "test": UNITS}), ended.err
    return ended


def same_bits(ended: Ended, version: int, undisturbed: Ended) -> None:
    for name in RESULTS:
        one, other = ((run / name).read_bytes() for run in (ended.directory(version), undisturbed.directory()))
        assert one == other, name


def test_a_calibration_that_broke_off_goes_on_to_the_same_bits(folder: Path, undisturbed: Ended) -> None:
    calibrated(folder, ends=("validate", 2))
    assert not (folder / "lightning_logs" / "version_0").exists()  # nothing was judged
    ended, batches = calibrated(folder)
    assert batches == {"validate": UNITS - 2, "test": UNITS}
    same_bits(ended, 0, undisturbed)


def test_a_test_that_broke_off_after_its_calibration_fits_nothing_again(folder: Path, undisturbed: Ended) -> None:
    calibrated(folder, ends=("test", 3))
    ended, batches = calibrated(folder)
    assert batches == {"validate": 0, "test": UNITS - 3}
    assert record(ended, 1)["units_resumed"] == 3
    same_bits(ended, 1, undisturbed)


def test_a_run_that_broke_off_in_both_stages_has_the_same_bits(folder: Path, undisturbed: Ended) -> None:
    calibrated(folder, ends=("validate", 1))
    calibrated(folder, ends=("validate", 3))
    calibrated(folder, ends=("test", 2))
    ended, batches = calibrated(folder)
    assert batches == {"validate": 0, "test": UNITS - 2}
    same_bits(ended, 1, undisturbed)


def test_never_fits_and_judges_everything_again(folder: Path, undisturbed: Ended) -> None:
    calibrated(folder, ends=("test", 3))
    ended, batches = calibrated(folder, "--resume", "never")
    assert batches == {"validate": UNITS, "test": UNITS}
    same_bits(ended, 1, undisturbed)


def test_a_run_that_is_named_is_gone_on_with_and_its_calibration_too(folder: Path, undisturbed: Ended) -> None:
    calibrated(folder, ends=("test", 3))
    ended, batches = calibrated(folder, "--resume", "lightning_logs/version_0")
    assert batches == {"validate": 0, "test": UNITS - 3}
    same_bits(ended, 1, undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        ("--data.batch_size", "3"),
        ("--data.batch_size", "100"),
        ("--model.row_budget", "2"),
        ("--data.num_workers", "2"),
    ],
    ids=" ".join,
)
def test_other_batches_rows_and_workers_give_the_same_constants(
    folder: Path, undisturbed: Ended, options: tuple[str, ...]
) -> None:
    ended, _ = calibrated(folder, *options)
    assert ended.code == 0, ended.err
    one, other = (load_file(run / RESULTS[0]) for run in (ended.directory(), undisturbed.directory()))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=0, atol=1e-6 * np.abs(other[name]).max(), err_msg=name)
    for mine, theirs in zip(ended.rows(), undisturbed.rows(), strict=True):
        assert float(mine["nll"]) == pytest.approx(float(theirs["nll"]), abs=1e-5)
