"""A visit to a GPU: every part runs though another fails or hangs, and what differs between two runs is found."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.on_gpu import __main__ as visit
from benchmarks.on_gpu import difference, images
from benchmarks.on_gpu.__main__ import Part
from benchmarks.on_gpu.clock import Clock

GOOD = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--json", type=pathlib.Path)
parser.parse_args().json.write_text('{"speed": 1.23456789}')
"""
BAD = GOOD + "raise RuntimeError('a tensor is on the wrong device')"
SLOW = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(os.environ["CHILD"]).write_text(str(child.pid))
time.sleep(600)
"""
MASKS = "mask,ablation,images,top1_count,top5_count,right_to_wrong,wrong_to_right,nonfinite,nll\n"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in {"good_part": GOOD, "bad_part": BAD, "slow_part": SLOW}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    monkeypatch.setattr(visit, "LEAST_SECONDS", 0.1)
    return tmp_path


def test_a_part_that_fails_is_reported_and_the_next_one_runs(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = modules / "out" / "gpu.json"
    chosen = [Part("first", ("bad_part",), 60), Part("second", ("good_part",), 60)]
    found = visit.run_all(chosen, file, time.monotonic() + 120)
    assert [one["ended"] for one in found] == ["code 1", "done"]
    assert json.loads(file.read_text())["parts"] == found
    assert found[0]["numbers"] == {"speed": 1.23456789}  # what it wrote before it failed
    assert "a tensor is on the wrong device" in found[0]["said"][-1]
    assert "a tensor is on the wrong device" in file.with_suffix(".log").read_text()
    printed = capsys.readouterr().out
    assert "Traceback" in printed
    assert '{"speed": 1.235}' in printed.splitlines()[-1]


def test_a_part_that_hangs_is_ended_with_all_its_processes(modules: Path) -> None:
    one = visit.run_part(Part("slow", ("slow_part",), 3), modules / "gpu.log", left=60)
    assert one["ended"] == "stopped after 3 s"
    child = int((modules / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(") ", 1)[1][0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a process of the part is left")


def test_a_part_is_not_begun_when_no_time_is_left(modules: Path) -> None:
    one = visit.run_part(Part("late", ("good_part",), 60), modules / "gpu.log", left=0.0)
    assert one == {"part": "late", "ended": "no time was left", "seconds": 0.0}


def test_the_exit_code_tells_of_a_failed_part(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, code in (("good_part", 0), ("bad_part", 1)):
        monkeypatch.setattr(visit, "parts", lambda *_, part=part: [Part("only", (part,), 60)])
        assert visit.main(["--json", str(modules / "gpu.json")]) == code


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        visit.main(["--only", "profil"])
    assert "got profil" in capsys.readouterr().err


def test_differences_of_masks_are_counted(tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text(MASKS + "none,none,9,5,8,0,0,0,0.5\nhead:0.0,zero,9,4,8,2,1,0,0.75\n")
    other.write_text(MASKS + "none,none,9,5,8,0,0,0,0.5\nhead:0.0,zero,9,6,8,1,2,0,0.5\n")
    assert difference.masks(one, one)["same_bytes"] is True
    assert difference.masks(one, other) == {
        "same_bytes": False,
        "counts": 12,
        "counts_differ": 3,
        "largest_count_difference": 2,
        "largest_nll_difference": {"none": 0.0, "zero": 0.25},
    }


def test_nan_in_only_one_of_two_arrays_is_no_small_difference(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", a=np.array([1.0, np.nan]), b=np.array([2.0, 4.0]))
    np.savez(tmp_path / "other.npz", a=np.array([1.0, 2.0]), b=np.array([2.0, 3.0]))
    found = difference.arrays(tmp_path / "one.npz", tmp_path / "other.npz")
    assert found == {"a": float("inf"), "b": 0.25}


def test_synthetic_images_are_in_folders_of_imagenet_classes(tmp_path: Path) -> None:
    size = images.write(tmp_path / "images", distinct=8, copies=2)
    assert 50_000 < size < 200_000  # as a photograph of 500 x 375 pixels
    assert len(list((tmp_path / "images").glob("n*/*.jpg"))) == 16


def test_the_sustained_speed_is_that_of_the_second_half_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "ends", [(10.0, 128), (11.0, 128), (11.1, 128), (11.6, 128), (12.1, 60)])
    assert Clock.sustained() == pytest.approx((128 + 60) / 1.0)  # from the third, which ended at 11.1, to the last
    monkeypatch.setattr(Clock, "ends", [(10.0, 128)])
    assert Clock.sustained() is None


@pytest.mark.slow
def test_the_script_takes_the_parts_of_a_visit(tmp_path: Path) -> None:
    script = Path(visit.__file__).parents[1] / "gpu.sh"
    words = ["bash", str(script), "all", "--device", "cpu", "--tiny", "--only", "check", "formats", "profile", "--json"]
    file = tmp_path / "gpu.json"
    ended = subprocess.run([*words, str(file)], env=None, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout
    formats, check, profile = json.loads(file.read_text())["parts"]
    assert check["numbers"]["vit_tiny_patch16_224"]["passed"] is True
    assert formats["numbers"]["differ_by"] < 0.1
    assert formats["numbers"]["all in bfloat16, 32 rows"]["images_per_second"] > 0
    kernels = profile["numbers"]["kernels"]
    assert 50 < sum(kernel["percent"] for kernel in kernels) <= 100.001
    assert sys.executable
