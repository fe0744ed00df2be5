"""Steps of the growing pass are compared on the same logits, in turns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steps

TRY = ["--model", "digits_vit", "--images", "2", "--batch", "1", "--repeats", "2", "--threads", "1", "--budgets", "25"]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # the other tests keep theirs


def test_every_step_gives_the_logits_of_plain_hooks_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    assert steps.main([*TRY, "50", "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())
    names = ("growing pass", "+ shared cores", "+ pooled tokens", "+ only pooled queries", "+ shared beginnings")
    expected = [steps.PLAIN, *(f"{name}, {rows} rows" for name in names for rows in (25, 50))]
    assert [case["case"] for case in numbers["cases"]] == expected
    for case in numbers["cases"]:
        assert case["difference"] <= 1e-5
        assert len(case["clock_seconds"]) == len(case["cpu_seconds"]) == 2
    assert numbers["masks"] == 24
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(expected)
    assert len({line.count("|") for line in lines}) == 1


def test_no_ratio_is_printed_where_logits_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = steps.by_growing
    monkeypatch.setattr(steps, "by_growing", lambda *given: plain(*given) + 0.1)
    assert steps.main(TRY) == 1
    said = capsys.readouterr().out
    assert "No ratios, for logits differ" in said
    assert "growing pass, 25 rows" in said
    assert "|" not in said


def test_who_begins_changes_with_every_round() -> None:
    called: list[str] = []

    def noting(name: str) -> Any:
        return lambda _: called.append(name)

    times = steps.take_turns({name: noting(name) for name in "abc"}, torch.zeros(1), 2)
    assert called == ["a", "b", "c", "b", "c", "a"]
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_options_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--budgets", "80", "0"], ["--images", "0"]):
        with pytest.raises(SystemExit):
            steps.parse(words)
        assert "must be at least 1, got 0" in capsys.readouterr().err
