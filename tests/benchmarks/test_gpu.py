"""The script for a GPU runs whole on a CPU, without packages that it does not need; its FLOPs are the formula's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
ABSENT = ("datasets", "jsonargparse", "pyarrow", "matplotlib", "scipy", "threadpoolctl", "tensorboard", "rich")
HIDE = f"""
import sys, importlib.machinery as machinery
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else machinery.PathFinder.find_spec(name, path, target)
    @staticmethod
    def invalidate_caches():
        pass
sys.meta_path = [Finder if one is machinery.PathFinder else one for one in sys.meta_path]
"""
TOKENS, WIDTH, DEPTH, HEADS, CLASSES = 5, 24, 3, 3, 1000
TINY = ["--device", "cpu", "--tiny", "--repeats", "1"]


def test_the_script_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)  # Python imports it before anything else
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["bash", str(SCRIPT), *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    *_, last = ended.stdout.splitlines()
    numbers = json.loads(last)
    assert numbers["right"] is True
    assert numbers["difference"] < 1e-5
    assert numbers["masks"] == HEADS * DEPTH
    assert numbers["images"] == "synthetic"
    assert numbers["seconds_for_50000"] > 0
    assert "| sweep, " in ended.stdout
    block = 24 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH
    plain = 2 * (TOKENS - 1) * 768 * WIDTH + DEPTH * block + 2 * WIDTH * CLASSES
    assert [one["flops_per_image"] for one in numbers["plain"]] == [plain] * 2
    for one in numbers["sweeps"]:
        assert plain < one["flops_per_image"] < plain * (numbers["masks"] + 1)
        assert one["masks_images_per_second"] == pytest.approx(9 * one["images_per_second"])


def test_wrong_logits_end_the_script_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "correctness", lambda *_: 2e-4)
    monkeypatch.setattr(gpu, "without_tf32", lambda: None)  # what it sets stays, and torch.export minds
    assert gpu.main(TINY) == 1
    ended = capsys.readouterr()
    assert "at most 0.0001 is allowed" in ended.err
    numbers = json.loads(ended.out.splitlines()[-1])
    assert numbers["right"] is False
    assert "sweeps" not in numbers


def test_options_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--rows", "512", "0"])
    assert "must be at least 1" in capsys.readouterr().err
