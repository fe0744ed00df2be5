"""The benchmarks run and print what they promise; nothing is timed here."""

import json
from pathlib import Path

import pytest

from benchmarks import describe


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
