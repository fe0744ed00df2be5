"""Every image exactly once: any number of processes, workers and shards; killed at any moment and started again."""

import csv
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.cli_runs import Ended, only_message
from tests.forked import Running, digits, run, start

pytestmark = pytest.mark.slow

IMAGES = 84
CPU = ("--trainer.accelerator", "cpu")
SWEEP = ("test", "--mask-spec", "each:layer", "--model.per_class", "true", "--data.path", "../set", *CPU)
COUNTS = ("images", "top1_count", "top5_count", "right_to_wrong", "wrong_to_right", "nonfinite")


def counts(ended: Ended) -> list[tuple[str, ...]]:
    """The integers of `masks.csv`."""
    return [tuple(row[name] for name in ("mask", *COUNTS)) for row in ended.rows()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in 1, 7 and 14 files."""
    folder = tmp_path_factory.mktemp("shards")
    for files in (1, 7, 14):
        digits(folder / str(files) / "set", IMAGES, files)
    return folder


@pytest.fixture(scope="module")
def alone(shards: Path) -> dict[int, Ended]:
    """One process, no workers."""
    found = {files: run(shards / str(files) / "alone", *SWEEP, "--data.num_workers", "0") for files in (1, 7, 14)}
    assert all(ended.code == 0 for ended in found.values()), found[1].err
    return found


@pytest.mark.parametrize("files", [1, 7, 14])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_all_numbers_are_the_same(
    shards: Path, alone: dict[int, Ended], processes: int, workers: int, files: int
) -> None:
    folder = shards / str(files) / f"{processes} processes, {workers} workers"
    ended = run(folder, *SWEEP, "--data.num_workers", str(workers), processes=processes)
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory() / "run.json").read_text())["units_resumed"] == 0
    for name in ("masks.csv", "classes.csv"):
        assert (ended.directory() / name).read_bytes() == (alone[files].directory() / name).read_bytes()
    assert counts(ended) == counts(alone[1])
    assert ended.rows()[0]["images"] == str(IMAGES)


DESCRIBE = (
    *("test", "--config", "../describe.yaml", "--mask-spec", "layer:3", "--data.path", "../set", *CPU),
    *("--data.max_images", "70"),
)
DESCRIBING = """
trainer:
  callbacks:
  - class_path: HeadAttention
  - class_path: HeadSpectrum
  - class_path: HeadSimilarity
    init_args: {measures: [svcca, cka], groups: 4}
"""
HEADS = (
    *("test", "--mask-spec", "each:head", "--records", "--model.row_budget", "20", "--data.path", "../set", *CPU),
    *("--data.max_images", "250"),
)
TABLES = {
    DESCRIBE: ("masks.csv", "heads.csv", "heads_change.csv", "spectrum.csv", "spectrum_change.csv"),
    HEADS: ("masks.csv",),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for a run of some seconds."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "describe.yaml").write_text(DESCRIBING)
    digits(folder / "set", 500, 14)
    return folder


@pytest.fixture(scope="module")
def undisturbed(many: Path) -> dict[tuple[str, ...], tuple[Ended, float]]:
    """Both jobs in one piece, and how long two processes took for them."""
    found = {}
    for number, job in enumerate((DESCRIBE, HEADS)):
        ended = run(many / f"alone {number}", *job, "--data.num_workers", "0")
        assert ended.code == 0, ended.err
        began = time.monotonic()
        assert run(many / f"timed {number}", *job, "--data.num_workers", "1", processes=2).code == 0
        found[job] = ended, time.monotonic() - began
    return found


def kill_after(running: Running, seconds: float) -> None:
    """Kill a run, or let it end if it is faster."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_alive() for process in running.processes):
        time.sleep(0.01)
    running.kill()


@pytest.fixture(scope="module")
def resumed() -> list[int]:
    """Units that each run found finished."""
    return []


@pytest.mark.parametrize(
    ("job", "seed"),
    [(DESCRIBE, seed) for seed in range(4)] + [(HEADS, seed) for seed in range(6)],
    ids=[f"describe {seed}" for seed in range(4)] + [f"each head {seed}" for seed in range(6)],
)
def test_a_run_killed_at_a_random_moment_ends_with_the_same_numbers(
    many: Path,
    undisturbed: dict[tuple[str, ...], tuple[Ended, float]],
    resumed: list[int],
    job: tuple[str, ...],
    seed: int,
) -> None:
    expected, seconds = undisturbed[job]
    name = "described" if job == DESCRIBE else "heads"
    draw = random.Random(f"{seed} {name}")
    folder = many / f"killed {name} {seed}"
    kill_after(start(folder, *job, "--data.num_workers", "1", processes=2), draw.uniform(0.3, 0.95) * seconds)
    before = len(list(folder.glob("lightning_logs/version_*")))
    processes, workers = draw.choice([1, 3, 4]), draw.choice([0, 2])
    ended = run(folder, *job, "--data.num_workers", str(workers), processes=processes)
    assert ended.code == 0, ended.err
    results = ended.directory(before)
    resumed.append(json.loads((results / "run.json").read_text())["units_resumed"])
    for name in TABLES[job]:
        assert (results / name).read_bytes() == (expected.directory() / name).read_bytes(), name
    for name in ("similarity.npz", "offset_maps.npz", "examples.npz") if job == DESCRIBE else ():
        assert same_arrays(results / name, expected.directory() / name)
    for file in sorted((expected.directory() / "records").glob("*")):
        assert (results / "records" / file.name).read_bytes() == file.read_bytes()


def test_several_of_these_runs_had_something_to_go_on_with(resumed: list[int]) -> None:
    if len(resumed) < 10:
        pytest.skip("looks at all ten runs of the test above, of which some were not asked for")
    assert sum(units > 0 for units in resumed) >= 3


def same_arrays(one: Path, other: Path) -> bool:
    with np.load(one, allow_pickle=False) as mine, np.load(other, allow_pickle=False) as theirs:
        return mine.files == theirs.files and all(same(mine[name], theirs[name]) for name in mine.files)


def same(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return np.array_equal(one, other, equal_nan=np.issubdtype(one.dtype, np.floating))


def test_more_processes_than_units_and_processes_without_data(tmp_path: Path) -> None:
    digits(tmp_path / "set", 20, 2)
    ended = run(tmp_path / "run", *SWEEP, "--data.num_workers", "1", processes=4)
    assert ended.code == 0, ended.err
    assert ended.rows()[0]["images"] == "20"


def test_a_finished_run_is_added_up_again_by_any_number_of_processes(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 5)
    first = run(tmp_path / "run", *SWEEP, "--data.num_workers", "0")
    again = run(tmp_path / "run", *SWEEP, "--data.num_workers", "2", processes=3)
    assert (first.code, again.code) == (0, 0), again.err
    assert "All of it was scored before" in again.out
    assert (again.directory(1) / "masks.csv").read_bytes() == (again.directory() / "masks.csv").read_bytes()
    assert json.loads((again.directory(1) / "run.json").read_text())["units_resumed"] == 5


def test_a_second_run_of_the_same_key_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    digits(tmp_path / "set", 400, 14)
    slow = ("--model.row_budget", "2", "--data.batch_size", "2")
    first = start(tmp_path / "run", *SWEEP, *slow, "--data.num_workers", "0")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("lightning_logs/units/*/units-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "other").symlink_to(tmp_path / "run")
    second = start(tmp_path / "other", *SWEEP, *slow, "--data.num_workers", "0", log="second")
    ended = second.wait()
    assert ended.code == 2
    message = only_message(ended)
    assert "another run is at work on the same units (process " in message
    assert f"process {first.processes[0].pid} " in message
    done = first.wait()
    assert done.code == 0, done.err
    assert done.rows()[0]["images"] == "400"


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_ends_all_and_keeps_what_is_finished(tmp_path: Path, rank: int) -> None:
    digits(tmp_path / "set", 400, 14)
    words = (*SWEEP, "--model.row_budget", "2", "--data.batch_size", "2", "--data.num_workers", "0")
    running = start(tmp_path / "run", *words, processes=2)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("lightning_logs/units/*/units-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.processes[rank].terminate()
    ended = running.wait(30)
    assert ended.code == 1
    assert only_message(ended) == "ended from outside (SIGTERM); run the same command again to resume\n"
    assert json.loads((ended.directory() / "run.json").read_text())["status"] == "interrupted"
    again = run(tmp_path / "run", *words)
    assert again.code == 0, again.err
    assert again.rows(1)[0]["images"] == "400"


def test_two_nodes_without_a_common_disk_give_the_numbers_of_one(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 5)
    (tmp_path / "node 1").mkdir()
    alone = run(tmp_path / "alone", *SWEEP, "--data.num_workers", "0")
    ended = run(tmp_path / "node 0", *SWEEP, "--data.num_workers", "0", processes=2, nodes=2)
    assert ended.code == 0, ended.err
    assert (ended.directory() / "masks.csv").read_bytes() == (alone.directory() / "masks.csv").read_bytes()
    assert list((tmp_path / "node 1").glob("lightning_logs/units/*/units-*.npz"))


def test_a_machine_without_the_data_ends_the_others_with_its_message(tmp_path: Path) -> None:
    digits(tmp_path / "node 0" / "set", 40, 5)
    (tmp_path / "node 1" / "set").mkdir(parents=True)
    words = ("test", "--data.path", "set", "--data.num_workers", "0", *CPU)
    ended = run(tmp_path / "node 0", *words, processes=2, nodes=2)
    assert ended.code == 2
    assert only_message(ended).startswith("process 1 of 2 failed: --data.path must hold Parquet files")


def test_slurms_environment_is_enough(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 5)
    alone = run(tmp_path / "alone", *SWEEP, "--data.num_workers", "0")
    ended = run(tmp_path / "slurm", *SWEEP, "--data.num_workers", "0", processes=2, slurm=True)
    assert ended.code == 0, ended.err
    assert (ended.directory() / "masks.csv").read_bytes() == (alone.directory() / "masks.csv").read_bytes()


def test_a_rank_that_is_killed_ends_the_others_soon_and_nothing_finished_is_lost(tmp_path: Path) -> None:
    digits(tmp_path / "set", 400, 14)
    words = (*SWEEP, "--model.row_budget", "2", "--data.batch_size", "2", "--data.num_workers", "0")
    running = start(tmp_path / "run", *words, processes=2)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "run").glob("lightning_logs/units/*/units-*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    first = running.processes[0]
    first.kill()  # process 0, which keeps the store that the others look at
    running.processes[1].join(30)
    assert running.processes[1].exitcode is not None, "process 1 went on alone"
    running.kill()
    ended = run(tmp_path / "run", *words)
    assert ended.code == 0, ended.err
    assert "Resuming: " in ended.out
    with (ended.directory(1) / "masks.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["images"] == "400"
