"""The benchmarks run and print what they promise; nothing is timed here."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import calibration, describe, streaming, units
from tests.data.parquet_sets import encoded
from tests.data.test_decode import noise


def test_the_benchmark_of_described_heads_prints_and_writes_a_ratio_for_each_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # the other tests keep theirs
    file = tmp_path / "numbers.json"
    words = ["--model", "test_vit", "--batch", "2", "--threads", "1", "--repeats", "1", "--json", str(file)]
    describe.main(words)
    printed, cases = capsys.readouterr().out, json.loads(file.read_text())["cases"]
    named = [case["case"] for case in cases]
    assert {"plain forward", "HeadAttention", "HeadSpectrum", "HeadSimilarity", "all together"} <= set(named)
    assert all(f"| {name} |" in printed for name in named)
    assert cases[0]["ratio_of_minima"] == 1
    assert all(case["seconds"] > 0 for case in cases)


def test_the_benchmark_of_fitting_prints_and_writes_a_ratio_for_each_set_of_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    file = tmp_path / "numbers.json"
    words = ["--model", "test_vit", "--batch", "2", "--threads", "1", "--repeats", "1", "--json", str(file)]
    calibration.main(words)
    printed, cases = capsys.readouterr().out, json.loads(file.read_text())["cases"]
    named = [case["case"] for case in cases]
    assert {calibration.PLAIN, calibration.WITHOUT, "mean", "mean, linear"} <= set(named)
    assert all(f"| {name} |" in printed for name in named)
    assert cases[0]["clock_ratio_of_minima"] == 1


def test_the_benchmark_of_reading_images_prints_and_writes_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    file = tmp_path / "numbers.json"
    streaming.main(["--model", "test_vit", "--images", "20", "--repeats", "2", "--json", str(file)])
    printed, cases = capsys.readouterr().out, json.loads(file.read_text())["cases"]
    assert [case["case"] for case in cases] == [streaming.PLAIN, streaming.OURS]
    assert all(f"| {case['case']} |" in printed for case in cases)
    assert cases[0]["ratio_of_minima"] == 1
    assert all(case["milliseconds"] > 0 for case in cases)


def test_the_benchmark_of_units_prints_and_writes_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    file = tmp_path / "numbers.json"
    units.main(["--repeats", "1", "--json", str(file)])
    printed, cases = capsys.readouterr().out, json.loads(file.read_text())["cases"]
    assert [case["case"] for case in cases] == [units.PLAIN, units.OURS]
    assert all(f"| {case['case']} |" in printed for case in cases)
    assert cases[0]["clock_ratio_of_minima"] == 1
    assert all(case["seconds"] > 0 for case in cases)


def test_both_ways_of_the_benchmark_give_the_same_pixels() -> None:
    ways = streaming.cases({"input_size": (3, 16, 16), "crop_pct": 0.9})
    content = encoded(noise(), "jpeg")
    plain, ours = (ways[name](content) for name in (streaming.PLAIN, streaming.OURS))
    assert torch.equal(plain, ours)
