"""The benchmarks run and print what they promise; nothing is timed here."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import headprobe
from benchmarks import calibration, describe, pruning, start, streaming, units
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
    assert {"plain forward", *describe.STATISTICS, "all together"} <= set(named)
    assert all(f"| {name} |" in printed for name in named)
    assert cases[0]["clock_ratio_of_minima"] == cases[0]["cpu_ratio_of_minima"] == 1
    assert all(case["seconds"] > 0 for case in cases)
    assert sum(case["share"] or 0 for case in cases) == pytest.approx(1)


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


def test_the_benchmark_of_pruning_prints_and_writes_what_each_way_of_losing_heads_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    file = tmp_path / "numbers.json"
    words = ["--model", "digits_vit", "--threads", "1", "--pairs", "1", "--shares", "50", "--batches", "2"]
    pruning.main([*words, "--json", str(file)])
    printed, cases = capsys.readouterr().out, json.loads(file.read_text())["cases"]
    installed = find_spec("torch_pruning") is not None
    ways = [pruning.WHOLE, pruning.MASKED, pruning.OURS, *([pruning.THEIRS] if installed else [])]
    assert [case["case"] for case in cases] == ways
    assert ("is not installed" in printed) == (not installed)
    assert all(f"| 12 of 24 | 2 | {way} |" in printed for way in ways)
    assert cases[0]["speed_original"] == cases[1]["speed_masked"] == 1
    assert cases[2]["parameters"] < cases[1]["parameters"] == cases[0]["parameters"]
    assert cases[2]["images_per_second"] == pytest.approx(2000 / cases[2]["milliseconds"])


def test_the_benchmark_of_pruning_refuses_a_model_that_lost_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = headprobe.remove_heads
    monkeypatch.setattr(headprobe, "remove_heads", lambda model, _: remove(model, "layer:0"))
    with pytest.raises(SystemExit, match="pruned gives other logits than the masked model"):
        pruning.main(["--model", "digits_vit", "--pairs", "1", "--shares", "50", "--batches", "1"])


def test_both_ways_of_the_benchmark_give_the_same_pixels() -> None:
    ways = streaming.cases({"input_size": (3, 16, 16), "crop_pct": 0.9})
    content = encoded(noise(), "jpeg")
    plain, ours = (ways[name](content) for name in (streaming.PLAIN, streaming.OURS))
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("stage", start.STAGES)
def test_each_stage_of_the_benchmark_of_the_start_is_a_method_that_there_is(stage: str) -> None:
    module, kind, method = start.STAGES[stage]
    assert callable(getattr(getattr(importlib.import_module(module), kind), method))


def test_the_benchmark_of_the_start_divides_the_command_by_imports_and_loop() -> None:
    rounds = [
        {"imports": 4.0, "imports_cpu": 3.0, "command": 6.0, "command_cpu": 5.0, "loop": 1.0},
        {"imports": 3.0, "imports_cpu": 3.0, "command": 8.0, "command_cpu": 4.0, "loop": 1.0},
    ]
    (ratio,) = (case for case in start.totals(rounds, 1.0) if case["case"] == "command / (imports + loop)")
    assert (ratio["clock"], ratio["clock_median"]) == (1.2, 1.6)
    assert (ratio["cpu"], ratio["cpu_median"]) == (1.0, 1.125)


def test_the_benchmark_of_the_start_adds_up_the_calls_of_a_stage_and_gives_their_results_back() -> None:
    seconds: dict[str, float] = {}
    double = start.timed(lambda number: 2 * number, seconds, "doubling")
    assert [double(1), double(2)] == [2, 4]
    assert seconds.keys() == {"doubling"}
    assert seconds["doubling"] >= 0
