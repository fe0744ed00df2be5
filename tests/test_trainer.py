"""`ProbeTrainer` in Python writes what the command line writes; a plain Trainer says that it writes nothing."""

import csv
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import headprobe
from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.precision import PrecisionCheck
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.resume import Resume
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


def test_a_second_test_never_writes_into_the_directory_of_the_first(tmp_path: Path) -> None:
    probe, data = headprobe.HeadProbe(), headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    logger = TensorBoardLogger(tmp_path, name="mine")
    trainer = headprobe.ProbeTrainer(
        accelerator="cpu", default_root_dir=str(tmp_path), enable_progress_bar=False, logger=logger
    )
    trainer.test(probe, datamodule=data)
    first = (tmp_path / "mine/version_0/masks.csv").read_bytes()
    with pytest.raises(headprobe.UsageError, match="would mix the files of both"):
        trainer.test(probe, datamodule=data)
    assert (tmp_path / "mine/version_0/masks.csv").read_bytes() == first


def test_the_record_of_a_run_in_python_names_no_command_of_ours(in_python: Path) -> None:
    started = json.loads((in_python / "run.json").read_text())["command"]
    assert started.startswith(f"python {Path(sys.argv[0]).name}")


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


def test_limits_that_would_score_parts_of_units_are_refused_in_python_too(tmp_path: Path) -> None:
    trainer = headprobe.ProbeTrainer(accelerator="cpu", default_root_dir=str(tmp_path), limit_test_batches=2)
    with pytest.raises(headprobe.UsageError, match="limit_test_batches"):
        trainer.test(headprobe.HeadProbe(), datamodule=headprobe.ImageNetDataModule())
