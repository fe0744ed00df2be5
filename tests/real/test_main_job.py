"""The main job on published weights and real images, against numbers from timm alone."""

import json
import time
from pathlib import Path

import pytest

from tests.cli_runs import Ended, command
from tests.forked import run, start
from tests.real.few_images import write_few

pytestmark = [pytest.mark.real, pytest.mark.slow]

OF_EACH_FILE = 12  # of 71 or 72, where nothing is claimed of the numbers


def words(images: Path, weights: Path, workers: int) -> tuple[str, ...]:
    model = ("--model.name", "deit_tiny_patch16_224", "--model.weights", str(weights.resolve()))
    data = ("--data.path", str(images.resolve()), "--data.num_workers", str(workers), "--trainer.accelerator", "cpu")
    return ("test", "--mask-spec", "layer:0", *model, *data)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sample_images: Path, deit_tiny_weights: Path) -> Ended:
    ended = command(tmp_path_factory.mktemp("alone"), *words(sample_images, deit_tiny_weights, 0))
    assert ended.code == 0, ended.err
    return ended


def test_deit_tiny_scores_as_timm_does(alone: Ended) -> None:
    baseline, masked = alone.rows()
    assert (baseline["images"], baseline["top1_count"], baseline["top5_count"]) == ("500", "396", "474")
    assert float(baseline["nll"]) == pytest.approx(0.9685, abs=5e-5)
    assert masked["top1_count"] == "379"


def test_two_processes_with_two_workers_killed_and_started_again_give_the_same_bits(
    tmp_path: Path, sample_images: Path, deit_tiny_weights: Path
) -> None:
    few = write_few(sample_images, tmp_path / "few", OF_EACH_FILE)
    (tmp_path / "alone").mkdir()
    alone = command(tmp_path / "alone", *words(few, deit_tiny_weights, 0))
    assert alone.code == 0, alone.err
    job, folder = words(few, deit_tiny_weights, 2), tmp_path / "killed"
    running = start(folder, *job, processes=2)
    deadline = time.monotonic() + 120
    while not list(folder.glob("lightning_logs/units/*/units-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    ended = run(folder, *job, processes=2)
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory(1) / "run.json").read_text())["units_resumed"] > 0
    assert (ended.directory(1) / "masks.csv").read_bytes() == (alone.directory() / "masks.csv").read_bytes()
