"""Several processes, started by Lightning or torchrun: the same numbers as one, one message when one fails, one end.

Where nothing is claimed of who starts them they are forked, which is sooner. All numbers of processes, workers and
files, and descriptions of heads, are in test_exactly_once.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headprobe.run.load import load_files
from tests import forked
from tests.cli_runs import Ended, only_message
from tests.data.parquet_sets import png, table, write_files, write_table

pytestmark = pytest.mark.slow

TEST = ("test", "--mask-spec", "each:layer", "--data.max_images", "150", "--trainer.accelerator", "cpu")
LOCAL = ("--data.num_workers", "0", "--trainer.accelerator", "cpu")
# one thread each, as one process of several has: the threads of a process change the last bits of a float32 sum
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}


def several(processes: int) -> tuple[str, ...]:
    return ("--trainer.devices", str(processes), "--trainer.strategy", "ddp") if processes > 1 else ()


def start(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "headprobe", *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # where pytest itself was started to ignore Ctrl-C, as in the background of a script
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]", folder: Path, seconds: float = 120) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"the run did not end within {seconds} seconds")
    return Ended(process.returncode, out, err, folder)


def run(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> Ended:
    folder.mkdir(exist_ok=True)
    return finish(start(folder, *words, launcher=launcher), folder)


def spoil(file: Path) -> None:
    """Damage a row group so that the footer is still readable."""
    page = pq.ParquetFile(file).metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    first = page.dictionary_page_offset or page.data_page_offset
    content[first : first + 60] = b"\xff" * 60
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    ended = run(tmp_path_factory.mktemp("alone"), *TEST, "--data.num_workers", "0")
    assert ended.code == 0, ended.err
    return (ended.directory() / "masks.csv").read_bytes()


def test_masks_csv_is_the_same_to_the_last_bit(tmp_path: Path, alone: bytes) -> None:
    ended = run(tmp_path, *TEST, *several(2), "--data.num_workers", "2")
    assert ended.code == 0, ended.err
    assert all(line.startswith("headprobe: scored ") for line in ended.err.splitlines())
    assert (ended.directory() / "masks.csv").read_bytes() == alone


@pytest.mark.parametrize("options", [several(2), ()], ids=["with devices", "without devices"])
def test_masks_csv_is_the_same_under_torchrun(tmp_path: Path, alone: bytes, options: tuple[str, ...]) -> None:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m")
    ended = run(tmp_path, *TEST, *options, "--data.num_workers", "0", launcher=launcher)
    assert ended.code == 0, ended.err
    assert (ended.directory() / "masks.csv").read_bytes() == alone
    assert json.loads((ended.directory() / "run.json").read_text())["processes"] == 2
    assert not ended.directory(1).exists()


def test_another_number_of_devices_than_torchruns_is_one_message(tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613", "-m")
    ended = run(tmp_path, *TEST, "--trainer.devices", "1", launcher=launcher)
    assert ended.code != 0
    assert ended.err.count("headprobe: error: torchrun has started 2 processes") == 1


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    words = ("--data.max_images", "20", *LOCAL)
    runs = [
        forked.start(tmp_path, "test", "--mask-spec", f"layer:{layer}", *words, log=str(layer)) for layer in range(4)
    ]
    ended = [running.wait() for running in runs]
    assert [one.code for one in ended] == [0] * 4, "".join(one.err for one in ended)
    runs_read = [load_files(ended[0].directory(version)) for version in range(4)]
    assert sorted(str(one.masks[1]["mask"]) for one in runs_read) == [f"layer:{layer}" for layer in range(4)]
    for one in runs_read:
        spec = str(one.masks[1]["mask"])
        assert f"--mask-spec {spec} " in one.record["command"]
        assert f"mask_spec: {spec}\n" in (one.path / "config.yaml").read_text()


def test_bad_images_of_all_processes_are_listed_once(tmp_path: Path) -> None:
    for file in range(4):
        cells = [png(n) for n in range(8)]
        cells[file] = b"no image"
        write_table(tmp_path / "set", table(cells, list(range(8))), f"validation-{file}.parquet")
    ended = run(tmp_path, "test", "--data.path", "set", *LOCAL, *several(2))
    assert ended.code == 1
    assert "4 images could not be used" in only_message(ended)
    lines = (ended.directory() / "bad_images.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [[str(n), str(n)] for n in range(4)]


@pytest.mark.parametrize("units", [[3], [2, 3]], ids=["in process 1", "in both processes"])
def test_a_shard_that_breaks_ends_the_run_with_one_message(tmp_path: Path, units: list[int]) -> None:
    files = sorted((write_files(tmp_path / "set", [[8]] * 6) / "data").iterdir())
    for unit in units:
        spoil(files[unit])
    process = start(tmp_path, "test", "--data.path", "set", *LOCAL, *several(2))
    ended = finish(process, tmp_path, seconds=60)
    assert ended.code == 1
    assert any(f"validation-0000{unit}-of-00006.parquet" in only_message(ended) for unit in units)
    assert json.loads((ended.directory() / "run.json").read_text())["status"] == "failed"


def test_a_wrong_request_is_one_message_under_torchrun_too(tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29612", "-m")
    ended = run(tmp_path, *TEST, *several(2), "--mask-spec=layer:3,", launcher=launcher)
    assert ended.code != 0
    assert ended.err.count("headprobe: error: ") == 1


def nothing_left(group: int) -> bool:
    """Wait until no process of a group is left, workers among them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("group", [False, True], ids=["to the process", "to the process group"])
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_all_processes_with_code_130(tmp_path: Path, processes: int, group: bool) -> None:
    slow = ("--mask-spec", "each:head", "--model.row_budget", "2", "--data.batch_size", "4", "--data.num_workers", "1")
    words = ("test", *slow, "--trainer.accelerator", "cpu")
    if processes == 1:
        running = forked.start(tmp_path, *words)
        pid, end = running.processes[0].pid, partial(running.wait, 30)
    else:
        process = start(tmp_path, *words, *several(processes))
        pid, end = process.pid, partial(finish, process, tmp_path, seconds=30)
    record = tmp_path / "lightning_logs" / "version_0" / "run.json"
    deadline = time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    assert pid is not None
    (os.killpg if group else os.kill)(pid, signal.SIGINT)
    ended = end()
    assert ended.code == 130
    assert processes > 1 or nothing_left(pid)  # of several, `finish` waits for all that hold its pipes
    assert (
        only_message(ended) == "interrupted; finished results are complete, and a test is resumed by the same command\n"
    )
    assert json.loads(record.read_text())["status"] == "interrupted"


@pytest.mark.parametrize("limit", [500, 3000, 120000], ids=["config.yaml", "run.json", "TensorBoard"])
def test_files_that_cannot_grow_are_one_message(tmp_path: Path, limit: int) -> None:
    words = ("test", "--mask-spec", "each:head", "--data.max_images", "20", "--data.num_workers", "0")
    ended = forked.run(tmp_path, *words, file_size=limit, pictures=True)
    assert ended.code == 1
    assert "(File too large); make room" in only_message(ended)
    assert limit < 120000 or len(ended.rows()) == 25


def test_an_unexpected_error_in_process_1_is_shown_once_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import lightning\n"
        "class Broken(lightning.Callback):\n"
        "    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):\n"
        "        assert trainer.global_rank != 1, 'the culprit'\n"
    )
    (tmp_path / "run.yaml").write_text("trainer: {callbacks: [{class_path: broken.Broken}]}\n")
    ended = run(tmp_path, *TEST, "--config", "run.yaml", "--data.num_workers", "0", *several(2))
    assert ended.code == 1
    assert ended.err.startswith("headprobe: error: process 1 of 2 failed:\nTraceback")
    assert ended.err.count("AssertionError: the culprit") == 1


def test_bad_images_are_listed_however_long_the_first_process_writes(tmp_path: Path) -> None:
    write_table(tmp_path / "set", table([png(0), b"no image"], [0, 1]), "validation-0.parquet")
    write_table(tmp_path / "set", table([png(1), png(2)], [0, 1]), "validation-1.parquet")
    (tmp_path / "slow.py").write_text(
        "import time, lightning\n"
        "import headprobe.callbacks.results as results, headprobe.callbacks.fail_together as together\n"
        "together.SECONDS_TO_HAND_OVER = 0.5\n"
        "real = results.write_tensorboard\n"
        "def slowly(*args):\n"
        "    time.sleep(3)\n"
        "    real(*args)\n"
        "results.write_tensorboard = slowly\n"
        "class Slow(lightning.Callback):\n"
        "    pass\n"
    )
    (tmp_path / "run.yaml").write_text("trainer: {callbacks: [{class_path: slow.Slow}]}\n")
    ended = run(tmp_path, "test", "--config", "run.yaml", "--data.path", "set", *LOCAL, *several(2))
    assert ended.code == 1
    assert "1 image could not be used" in only_message(ended)
    assert json.loads((ended.directory() / "run.json").read_text())["status"] == "failed"
