"""`ProbeTrainer` in Python writes what the command line writes; a plain Trainer says that it writes nothing."""

import csv
import inspect
import json
import linecache
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ProgressBar, TQDMProgressBar

import headprobe
from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.identity import command_line, text_of_call
from headprobe.callbacks.precision import PrecisionCheck
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.resume import Resume
from headprobe.processes import from_launcher
from headprobe.trainer import refuse_limits
from tests.cli_runs import QUICK, Ended, command

SPECS = ["layer:3", "each:index"]


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("command")
    (folder / "masks.yaml").write_text("mask_spec:\n" + "".join(f"  - {spec}\n" for spec in SPECS))
    ended = command(folder, "test", *QUICK, "--config", "masks.yaml", "--records")
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def in_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("python")
    probe = headprobe.HeadProbe()
    probe.choose_masks(SPECS)
    data = headprobe.ImageNetDataModule(max_images=40, num_workers=0)
    trainer = headprobe.ProbeTrainer(accelerator="cpu", default_root_dir=str(folder))
    trainer.test(probe, datamodule=data, records=True)
    return folder / "lightning_logs" / "version_0"


def files(directory: Path) -> set[str]:
    """Return the files of a run; names of TensorBoard's hold time and host."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    return {"events" if name.startswith("events.") else name for name in found}


def test_python_writes_the_files_of_the_command_line(by_command: Ended, in_python: Path) -> None:
    assert files(by_command.directory()) - files(in_python) == {"config.yaml"}  # the command's own options
    assert files(in_python) <= files(by_command.directory())
    assert "figures/drop_pp_by_index.png" in files(in_python)


@pytest.mark.parametrize("name", ["masks.csv", "masks.json"])
def test_python_writes_the_same_bytes(by_command: Ended, in_python: Path, name: str) -> None:
    assert (by_command.directory() / name).read_bytes() == (in_python / name).read_bytes()


def test_python_has_the_key_of_the_command_line(by_command: Ended, in_python: Path) -> None:
    keys = [json.loads((folder / "run.json").read_text())["key"] for folder in (by_command.directory(), in_python)]
    assert keys[0] == keys[1]


def test_a_test_without_masks_scores_the_baseline_and_a_single_text_is_a_spec(tmp_path: Path) -> None:
    probe, data = headprobe.HeadProbe(), headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    trainer = headprobe.ProbeTrainer(accelerator="cpu", default_root_dir=str(tmp_path), enable_progress_bar=False)
    trainer.test(probe, datamodule=data)
    probe.choose_masks("layer:0")
    trainer.test(probe, datamodule=data)  # the same trainer again, in a directory of its own
    for version, masks in enumerate((["none"], ["none", "layer:0"])):
        with (tmp_path / f"lightning_logs/version_{version}/masks.csv").open() as file:
            assert [row["mask"] for row in csv.DictReader(file)] == masks


def test_the_record_of_a_run_in_python_names_no_command_of_ours(in_python: Path) -> None:
    started = json.loads((in_python / "run.json").read_text())["command"]
    # a program's name, or in a process that runs no file (a notebook, a worker of pytest) the call
    assert started.startswith((f"python {Path(sys.argv[0]).name}", "trainer.test(probe"))


def test_a_plain_trainer_says_that_it_writes_nothing(tmp_path: Path) -> None:
    probe, data = headprobe.HeadProbe(), headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"default_root_dir": str(tmp_path), "enable_model_summary": False, "enable_checkpointing": False}
    with pytest.warns(UserWarning, match=r"writes no results: use headprobe\.ProbeTrainer"):
        lightning.Trainer(**options).test(probe, datamodule=data, verbose=False)
    assert probe.scores is not None
    assert list(tmp_path.iterdir()) == []


def test_a_probe_trainer_does_not_warn_of_that(tmp_path: Path) -> None:
    probe, data = headprobe.HeadProbe(), headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    trainer = headprobe.ProbeTrainer(accelerator="cpu", default_root_dir=str(tmp_path), enable_progress_bar=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*writes no results.*")
        trainer.test(probe, datamodule=data)


def test_standard_callbacks_stand_once_around_the_users(tmp_path: Path) -> None:
    class Own(lightning.Callback):
        pass

    trainer = headprobe.ProbeTrainer(
        accelerator="cpu",
        precision="bf16-mixed",
        default_root_dir=str(tmp_path),
        enable_progress_bar=False,
        callbacks=[Own(), ResultsWriter(table=False)],
    )
    for _ in range(2):  # of a kind that the user gave, the user's own stays alone
        trainer._use_callbacks([FailTogether(), RecordsWriter(), Resume(), PrecisionCheck()], after=[ResultsWriter()])
        kinds = [type(callback) for callback in trainer.callbacks]
        assert kinds == [FailTogether, RecordsWriter, Resume, PrecisionCheck, Own, ResultsWriter]
    assert not next(one for one in trainer.callbacks if isinstance(one, ResultsWriter)).table


@pytest.mark.parametrize(
    "limit",
    [
        {"limit_test_batches": 2},
        {"limit_test_batches": 1},  # equal to 1.0, which is all of them
        {"limit_test_batches": 0.5},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"overfit_batches": 1},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0},
    ],
)
def test_limits_that_would_score_parts_of_units_are_refused_in_python_too(
    tmp_path: Path, limit: dict[str, Any]
) -> None:
    trainer = headprobe.ProbeTrainer(accelerator="cpu", default_root_dir=str(tmp_path), **limit)
    with pytest.raises(headprobe.UsageError, match=rf"--trainer\.{next(iter(limit))} .* use --data\."):
        trainer.test(headprobe.HeadProbe(), datamodule=headprobe.ImageNetDataModule())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("all_of_it", [{}, {"limit_test_batches": 1.0}, {"limit_test_batches": None}])
def test_all_batches_are_no_limit(all_of_it: dict[str, Any]) -> None:
    trainer = headprobe.ProbeTrainer(accelerator="cpu", **all_of_it)
    refuse_limits(trainer.fast_dev_run, trainer.limit_test_batches, trainer.overfit_batches)  # type: ignore[attr-defined]


def test_batch_sizes_are_not_searched_during_a_test() -> None:
    trainer = headprobe.ProbeTrainer(accelerator="cpu", callbacks=[BatchSizeFinder()])
    with pytest.raises(headprobe.UsageError, match="got BatchSizeFinder"):
        trainer.test(headprobe.HeadProbe(), datamodule=headprobe.ImageNetDataModule())


def test_a_progress_bar_of_the_users_replaces_ours() -> None:
    bar = TQDMProgressBar()
    trainer = headprobe.ProbeTrainer(accelerator="cpu", callbacks=[bar])
    assert [one for one in trainer.callbacks if isinstance(one, ProgressBar)] == [bar]


def test_barebones_is_a_run_without_a_logger() -> None:
    assert headprobe.ProbeTrainer(accelerator="cpu", barebones=True).loggers == []


# -- how many processes a launcher has started -------------------------------------------------------------------------


def launched_by(patch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        patch.delenv(name)
    for name, value in variables.items():
        patch.setenv(name, value)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "job", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, {"devices": 2, "num_nodes": 2}),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, {"devices": 2, "num_nodes": 1}),
        (SRUN, {"devices": 3, "num_nodes": 2}),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "job"}, {}),  # a batch script without srun is one process
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, {}),
        ({}, {}),
    ],
    ids=["torchrun", "torchrun on one node", "srun", "sbatch alone", "a job array", "none"],
)
def test_devices_left_out_are_the_launchers(
    variables: dict[str, str], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_by(monkeypatch, **variables)
    assert from_launcher({"devices": "auto", "num_nodes": 1}) == expected
    assert from_launcher({"devices": 1}) == {}


def test_another_number_of_processes_than_torchruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched_by(monkeypatch, **TORCHRUN)
    with pytest.raises(headprobe.UsageError, match=r"torchrun has started 4 processes.*got 1 in all"):
        headprobe.ProbeTrainer(accelerator="cpu", devices=1)


# -- what started a run ------------------------------------------------------------------------------------------------


def test_a_notebooks_record_says_the_call_and_not_the_kernels_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "x = text_of_call(inspect.currentframe())\ny = text_of_call(\n    inspect.currentframe(),\n)\n"
    cell = "<ipython-input-1>"
    monkeypatch.setitem(linecache.cache, cell, (len(source), None, source.splitlines(keepends=True), cell))
    found: dict[str, Any] = {"text_of_call": text_of_call, "inspect": inspect}
    exec(compile(source, cell, "exec"), found)
    assert found["x"] == "x = text_of_call(inspect.currentframe())"
    assert found["y"] == "y = text_of_call( inspect.currentframe(), )"

    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # without a file, as in a notebook
    trainer = headprobe.ProbeTrainer(accelerator="cpu")
    assert command_line(trainer) == "ProbeTrainer.test  (typed into Python)"
    trainer.command = "trainer.test(probe, datamodule=data)"
    assert command_line(trainer) == "trainer.test(probe, datamodule=data)  (typed into Python)"


def test_each_call_is_recorded_and_the_words_of_the_command_line_stay(by_command: Ended, tmp_path: Path) -> None:
    record = json.loads((by_command.directory() / "run.json").read_text())
    assert record["command"] == " ".join(["headprobe", "test", *QUICK, "--config", "masks.yaml", "--records"])
