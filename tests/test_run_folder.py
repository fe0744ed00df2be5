"""Every run has a folder of its own, whatever its logger, and replaces no file that it did not make."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import headprobe
import headprobe.trainer
from headprobe.callbacks.results import ResultsWriter
from headprobe.errors import RunError
from headprobe.files import make_folders, next_version
from tests.cli_runs import QUICK, command, only_message

MINE = "# my own notes: the settings of the paper\ntrainer:\n  logger: false\n"
FEW = ("--data.max_images", "20", "--data.num_workers", "0", "--trainer.accelerator", "cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    """Return the files below a folder, without those of units; TensorBoard's names hold time and host."""
    found = {name for name in content(folder) if "/units/" not in name}
    return {name.split("events.out")[0] + "events" if "events.out" in name else name for name in found}


def trainer(folder: Path, *loggers: Logger, **options: Any) -> headprobe.ProbeTrainer:
    options = {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder), **options}
    return headprobe.ProbeTrainer(logger=list(loggers) or options.pop("logger", None), **options)


def score(own: headprobe.ProbeTrainer) -> None:
    own.test(headprobe.HeadProbe(), datamodule=headprobe.ImageNetDataModule(max_images=20, num_workers=0))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_the_next_version_is_one_more_than_the_largest(tmp_path: Path) -> None:
    assert next_version(tmp_path / "nowhere").name == "version_0"
    for name in ("version_2", "version_10", "version_x", "other_30"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_12").touch()
    assert next_version(tmp_path).name == "version_13"


def test_no_two_of_many_take_the_same_folder(tmp_path: Path) -> None:
    def claim(_: int) -> Path:
        while True:
            folder = next_version(tmp_path)
            if make_folders([folder]) is None:
                return folder

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(claim, range(40)))
    assert len(set(taken)) == 40


def test_all_folders_are_made_or_none(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert make_folders([tmp_path / "a", tmp_path / "b", tmp_path / "c"]) == tmp_path / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(RunError, match=r"cannot write '.*lightning_logs' \(Read-only file system\).*default_root_dir"):
        make_folders([tmp_path / "lightning_logs" / "version_0"])


def test_a_run_that_comes_second_takes_the_next_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = make_folders, tmp_path / "lightning_logs" / "version_0"

    def a_moment_late(folders: list[Path]) -> Path | None:
        if not other.exists():
            other.mkdir(parents=True)
            (other / "masks.csv").write_text("of the other run")
        return plain(folders)

    monkeypatch.setattr(headprobe.trainer, "make_folders", a_moment_late)
    ended = command(tmp_path, "test", *FEW)
    assert ended.code == 0, ended.err
    assert content(other) == {"masks.csv": b"of the other run"}
    assert {"masks.csv", "run.json", "config.yaml", "events"} <= names(ended.directory(1))


# -- whatever the logger -----------------------------------------------------------------------------------------------


def test_without_a_logger_the_users_own_files_stay_as_they_are(tmp_path: Path) -> None:
    mine = {"config.yaml": MINE, "masks.csv": "mine", "run.json": "mine", "figures/drop_pp_by_layer.png": "mine"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for version in range(2):
        ended = command(tmp_path, "test", "--config", "config.yaml", "--mask-spec", "layer:0", *FEW)
        assert ended.code == 0, ended.err
        assert names(ended.directory(version)) == {"config.yaml", "groups.npz", "masks.csv", "masks.json", "run.json"}
    assert {name: (tmp_path / name).read_text() for name in mine} == mine


@pytest.mark.parametrize(
    ("logger", "elsewhere"),
    [
        (["CSVLogger", "--trainer.logger.save_dir", "."], set()),
        (["CSVLogger", "--trainer.logger.save_dir", "logs"], {"logs/lightning_logs/version_0/metrics.csv"}),
        (["TensorBoardLogger", "--trainer.logger.save_dir", "."], set()),
        (
            ["TensorBoardLogger", "--trainer.logger.save_dir", "tb", "--trainer.logger.name", "mine"],
            {"tb/mine/version_0/events", "tb/mine/version_0/hparams.yaml"},
        ),
    ],
)
def test_the_results_lie_in_lightning_logs_and_a_loggers_own_where_it_says(
    tmp_path: Path, logger: list[str], elsewhere: set[str]
) -> None:
    ended = command(tmp_path, "test", *FEW, "--trainer.logger", *logger)
    assert ended.code == 0, ended.err
    assert {"masks.csv", "run.json", "config.yaml"} <= names(ended.directory())
    assert not ended.directory(1).exists()
    assert {name for name in names(tmp_path) if not name.startswith("lightning_logs")} == elsewhere


def test_several_loggers_of_one_folder_share_the_runs(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    score(trainer(tmp_path, TensorBoardLogger(tmp_path), CSVLogger(tmp_path)))
    logs = tmp_path / "lightning_logs"
    assert {path.name for path in logs.iterdir()} == {"version_0", "units", "proofs"}
    assert {"masks.csv", "metrics.csv", "events"} <= names(logs / "version_0")
    assert not [warning for warning in recwarn if "not empty" in str(warning.message)]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_loggers_folder_that_is_there_already_is_refused(tmp_path: Path, kind: type[Any]) -> None:
    there = tmp_path / "logs" / "mine" / "first"
    there.mkdir(parents=True)
    (there / "metrics.csv").write_text("of an earlier run")
    with pytest.raises(headprobe.UsageError, match=r"there already.*another version or save_dir.*mine/first'"):
        score(trainer(tmp_path, kind(tmp_path / "logs", name="mine", version="first")))
    assert content(tmp_path) == {"logs/mine/first/metrics.csv": b"of an earlier run"}


def test_several_tests_of_one_trainer_have_folders_of_their_own(tmp_path: Path) -> None:
    for own in (trainer(tmp_path, TensorBoardLogger(tmp_path / "tb", name="mine")), trainer(tmp_path, logger=False)):
        for _ in range(2):
            before = content(tmp_path / "lightning_logs")
            score(own)
            after = content(tmp_path / "lightning_logs")
            unchanged = {name: text for name, text in before.items() if not name.startswith("units/")}
            assert unchanged.items() <= after.items()
    assert {path.name for path in (tmp_path / "tb" / "mine").iterdir()} == {"version_0", "version_1"}
    assert {path.name for path in (tmp_path / "lightning_logs").glob("v*")} == {f"version_{n}" for n in range(4)}


def test_a_second_run_is_refused_where_its_logger_would_mix_the_curves(tmp_path: Path) -> None:
    class Board(Logger):
        name = version = None

        def log_metrics(self, *_: Any, **__: Any) -> None:
            pass

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    own = trainer(tmp_path, Board())
    score(own)
    with pytest.raises(headprobe.UsageError, match=r"would mix the curves of both runs.*got Board"):
        score(own)


def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tmp_path: Path) -> None:
    words = ("--trainer.callbacks", "HeadSimilarity", "--trainer.callbacks.groups", "1")
    ended = command(tmp_path, "test", *FEW, *words)
    assert ended.code == 2
    assert not ended.directory().exists()


def test_a_results_writer_in_a_plain_trainer_replaces_no_results(tmp_path: Path) -> None:
    (tmp_path / "masks.csv").write_text("mine")
    own = lightning.Trainer(
        logger=False, default_root_dir=tmp_path, callbacks=[ResultsWriter()], accelerator="cpu",
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(headprobe.UsageError, match=r"holds masks\.csv already.*ProbeTrainer"):
        own.test(headprobe.HeadProbe(), datamodule=headprobe.ImageNetDataModule(max_images=20, num_workers=0))
    assert (tmp_path / "masks.csv").read_text() == "mine"


# -- fit ---------------------------------------------------------------------------------------------------------------

FIT = (
    "fit", "--config", str(Path(__file__).parents[1] / "configs" / "digits_vit.yaml"), "--trainer.max_epochs", "1",
    "--trainer.accelerator", "cpu", "--model.options.depth", "1", "--data.num_workers", "0",
)  # fmt: skip


def test_fit_without_a_logger_has_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    ended = command(tmp_path, *FIT, "--trainer.logger", "false", "--trainer.limit_train_batches", "2")
    assert ended.code == 0, ended.err
    assert names(ended.directory()) == {"config.yaml", "model.safetensors"}
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_trial_of_fit_writes_nothing(tmp_path: Path) -> None:
    assert command(tmp_path, *FIT, "--trainer.fast_dev_run", "true").code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_no_folder_here_is_refused(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--trainer.default_root_dir", "s3://bucket/runs")
    assert ended.code == 2
    assert "--trainer.default_root_dir must be a folder of this machine, got s3://bucket/runs" in only_message(ended)


@pytest.mark.parametrize("root", ["~/runs", "$SCRATCH/runs"])
def test_a_root_may_be_in_the_home_folder_or_a_variable(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    for version in range(2):
        score(trainer(Path(root)))
        assert {"masks.csv", "events"} <= names(tmp_path / "runs" / "lightning_logs" / f"version_{version}")
