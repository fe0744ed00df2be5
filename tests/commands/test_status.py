"""`headprobe status`: how far a run is."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headprobe.run.load import load_files
from tests.callbacks.test_resume import RUN, TEST, broken_off, units
from tests.cli_runs import command, only_message
from tests.forked import digits, start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits(tmp_path / "set", 40, 5)
    return tmp_path


@pytest.mark.parametrize("path", ["lightning_logs", "lightning_logs/version_0", "units"])
def test_a_broken_off_run_says_what_is_done_and_how_to_go_on(folder: Path, path: str) -> None:
    broken_off(folder, 3)
    ended = command(folder, "status", str(units(folder)) if path == "units" else path)
    assert ended.code == 0, ended.err
    assert "digits_vit on set, 6 masks" in ended.out
    assert "done: 3 of 5 units, 24 of 40 images" in ended.out
    assert "the last session failed" in ended.out
    assert "run the same command again to resume" in ended.out


def test_a_finished_run_is_complete_which_needs_no_torch_to_be_seen(folder: Path) -> None:
    command(folder, *RUN)
    ended = command(folder, "status", "lightning_logs", "--json")
    code = "import sys; from headprobe.cli import main; sys.exit(main(sys.argv[1:]) + 10 * ('torch' in sys.modules))"
    words = [sys.executable, "-c", code, "status", "lightning_logs", "--json"]
    alone = subprocess.run(words, cwd=folder, check=False, capture_output=True, text=True)
    assert (alone.returncode, alone.stdout) == (0, ended.out)
    (status,) = json.loads(ended.out)
    assert (status["units_done"], status["units_total"], status["images_done"]) == (5, 5, 40)
    assert (status["running"], status["last_session"]) == (False, "done")
    assert status["images_per_second"] > 0
    assert status["seconds_left"] == 0


def test_a_broken_off_run_says_how_many_masks_its_units_decide(tmp_path: Path) -> None:
    digits(tmp_path / "set", 250, 5)
    broken_off(tmp_path, 6)  # two batches a unit
    (status,) = json.loads(command(tmp_path, "status", "lightning_logs", "--json").out)
    assert status["units_done"] == 3

    # A run on these units alone says the same in its table.
    (tmp_path / "part").mkdir()
    for file in sorted((tmp_path / "set").iterdir())[:3]:
        shutil.copy(file, tmp_path / "part")
    part = command(tmp_path, *TEST, "--data.path", "part", "--trainer.accelerator", "cpu")
    rows = [row for row in load_files(part.directory(1)).masks if row["mask"] != "none"]
    decided = sum(float(row["e_bh_q"]) <= 0.05 for row in rows)
    assert 0 < decided < 6
    assert status["decided"] == [{"test_family": "each:layer", "ablation": "zero", "masks": 6, "decided": decided}]
    shown = command(tmp_path, "status", "lightning_logs/version_0").out
    assert f"decided so far: {decided} of 6 masks of each:layer\n" in shown


def test_sorted_labels_leave_e_values_out_of_the_table_and_status_says_why(tmp_path: Path) -> None:
    digits(tmp_path / "set", 250, 5)
    whole = pa.concat_tables([pq.read_table(file) for file in sorted((tmp_path / "set").iterdir())])
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "set").mkdir()
    pq.write_table(whole.sort_by("label"), tmp_path / "set/test.parquet", row_group_size=50)
    ended = command(tmp_path, *RUN)
    assert ended.code == 0, ended.err
    run = load_files(ended.directory())
    assert all(np.isnan(float(row[name])) for row in run.masks for name in ("log_e_value", "e_bh_q"))
    assert run.record["decisions"]["log_e_value"].startswith("not given: labels come sorted by class")
    shown = command(tmp_path, "status", "lightning_logs").out
    assert "decided so far: cannot be said, since labels come sorted by class" in shown


@pytest.mark.slow
def test_a_run_at_work_says_how_fast_it_is_and_how_long_it_takes(tmp_path: Path) -> None:
    digits(tmp_path / "set", 400, 14)
    words = (*RUN, "--data.path", "../set", "--model.row_budget", "2", "--data.batch_size", "2")
    running = start(tmp_path / "run", *words)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("lightning_logs/units/*/units-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (status,) = json.loads(command(tmp_path / "run", "status", "lightning_logs", "--json").out)
    shown = command(tmp_path / "run", "status", "lightning_logs").out
    running.kill()
    assert status["running"]
    assert 0 < status["units_done"] < 14
    assert status["seconds_left"] == pytest.approx((400 - status["images_done"]) / status["images_per_second"])
    assert f"running (process {running.processes[0].pid} on " in shown
    assert " left" in shown
    killed = command(tmp_path / "run", "status", "lightning_logs").out
    assert "the last session ended from outside" in killed


def test_a_broken_run_does_not_hide_the_others(folder: Path) -> None:
    command(folder, *RUN)
    command(folder, *RUN, "--data.max_images", "20")
    one = sorted((folder / "lightning_logs" / "units").iterdir())[0]
    (one / "store.json").write_text("{}")
    ended = command(folder, "status", "lightning_logs")
    assert ended.code == 1
    assert "complete: the same command only adds it up" in ended.out
    assert "store.json' is no unit store of headprobe" in ended.out


@pytest.mark.parametrize("path", ["nowhere", "set"])
def test_a_path_without_a_run_is_refused(folder: Path, path: str) -> None:
    ended = command(folder, "status", path)
    assert ended.code == 2
    assert f"got '{path}'" in only_message(ended)
