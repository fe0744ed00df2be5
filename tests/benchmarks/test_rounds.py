"""Contestants take turns in processes of their own; ratios appear only where all did the same work."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks.contestant import Contestant, Found, said
from benchmarks.rounds import Comparison, as_json, compete, text


def contestant(name: str, top1: dict[str, int], nll: dict[str, float] | None = None, **more: Any) -> Contestant:
    """Return a command that says at once that it counted these."""
    report = json.dumps({"loop": 0.5, "top1": top1, "nll": nll or {}})
    return Contestant(name, (sys.executable, "-S", "-c", f"print({report!r})"), said, 1, **more)


def comparison(*contestants: Contestant, same_work: bool = True) -> Comparison:
    return Comparison("Some work", {"images": 4}, contestants, same_work)


def quiet(_: str) -> None:
    """Say nothing."""


def test_all_take_turns_and_who_begins_changes() -> None:
    printed: list[str] = []
    three = comparison(*(contestant(name, {"none": 3}) for name in "abc"))
    outcome = compete(three, 2, printed.append)
    assert [line[-1] for line in printed] == ["a", "b", "c", "b", "c", "a"]
    assert {name: len(rounds) for name, rounds in outcome.rounds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(one.wall > 0 and one.cpu > 0 and one.peak > 1 and one.loop == 0.5 for one in outcome.rounds["a"])


def test_processes_that_are_left_behind_are_waited_for_and_count() -> None:
    busy = "import time; began = time.process_time(); all(time.process_time() - began < 0.5 for _ in iter(int, 1))"
    leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {busy!r}]); print('{{}}')"
    leaving = Contestant("a", (sys.executable, "-S", "-c", leave), lambda *_: Found(0, {}), 1)
    found = leaving.run()
    if sys.platform == "linux":
        assert found.cpu >= 0.5
        assert found.wall >= 0.5


def test_the_peak_is_the_contestants_and_not_that_of_who_starts_it() -> None:
    held = b"x" * (300 << 20)
    assert contestant("a", {"none": 3}).run().peak < 100 < len(held) / 1e6


def test_a_table_and_plain_data_hold_every_contestant() -> None:
    two = comparison(contestant("a", {"none": 3}), contestant("b", {"none": 4}))
    outcome = compete(two, 2, quiet)
    printed, data = text(two, outcome), json.loads(json.dumps(as_json(two, outcome)))
    assert "| a | 0.50 | 1.000 | 1.000 |" in printed
    assert "| b | 0.50 | 1.000 | 1.000 |" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [row["case"] for row in data["rows"]] == ["a", "b"]
    assert [one["counts"] for one in data["rounds"]["b"]] == [{"none": 4}] * 2


def test_no_ratio_is_printed_where_a_contestant_did_other_work() -> None:
    right = contestant("right", {"none": 9, "head:0.0": 5}, ours=True)
    for other, named in (
        ({"none": 9, "head:0.0": 7}, "odd counts 7 right under head:0.0, not 5 as right"),
        ({"none": 9, "head:0.1": 5}, "odd scored other masks (head:0.0, head:0.1) than right"),
    ):
        both = comparison(contestant("odd", other), right)
        outcome = compete(both, 1, quiet)
        assert named in text(both, outcome)
        assert "| right |" not in text(both, outcome)
        assert as_json(both, outcome)["rows"] == []


def test_counts_may_differ_by_one_image_and_in_bfloat16_by_any() -> None:
    both = comparison(
        contestant("right", {"none": 9}), contestant("close", {"none": 8}), contestant("half", {"none": 2}, exact=False)
    )
    assert not compete(both, 1, quiet).refused
    growing = comparison(contestant("few", {"none": 1}), contestant("many", {"none": 9}), same_work=False)
    assert not compete(growing, 1, quiet).refused


def test_no_ratio_is_printed_where_the_mean_nll_differs_by_more_than_rounding() -> None:
    top1 = {"none": 9, "head:0.0": 5}
    right = contestant("right", top1, {"none": 0.5, "head:0.0": 20.0}, ours=True)
    for nll, refused in (
        ({"none": 0.50005, "head:0.0": 20.001}, []),
        ({}, []),
        ({"none": 0.5002}, ["other has a mean NLL of 0.50020 under none, not 0.50000 as right"]),
        ({"head:0.0": 20.003}, ["other has a mean NLL of 20.00300 under head:0.0, not 20.00000 as right"]),
        ({"none": math.nan}, ["other has a mean NLL of nan under none, not 0.50000 as right"]),
    ):
        assert compete(comparison(right, contestant("other", top1, nll)), 1, quiet).refused == refused
        half = contestant("other", top1, nll, exact=False)
        assert not compete(comparison(right, half), 1, quiet).refused


def test_who_is_not_installed_or_fails_has_a_line_instead_of_numbers() -> None:
    broken = Contestant("broken", (sys.executable, "-S", "-c", "raise SystemExit('no such model')"), said, 1)
    three = comparison(contestant("a", {"none": 1}), contestant("b", {"none": 1}, needs="not_a_package"), broken)
    outcome = compete(three, 2, quiet)
    printed = text(three, outcome)
    assert "- b skipped: not_a_package is not installed" in printed
    assert "- broken failed: no such model" in printed
    assert "| a |" in printed
    assert list(outcome.rounds) == ["a"]


def test_without_the_first_there_is_nothing_to_compare_with() -> None:
    two = comparison(contestant("a", {"none": 1}, needs="not_a_package"), contestant("b", {"none": 1}))
    outcome = compete(two, 1, quiet)
    assert "a, which ratios are to, did not run" in text(two, outcome)


def test_the_command_takes_all_comparisons_or_some_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    everything = ["sweep", "one-mask", "baseline", "swin", "growth", "processes"]
    assert benchmarks_main.parse([]).comparisons == everything
    assert benchmarks_main.parse(["swin", "--repeats", "7"]).comparisons == ["swin"]
    for words, message in (
        (["speed"], "comparisons are sweep, one-mask, baseline, swin, growth, processes, got speed"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
    ):
        with pytest.raises(SystemExit):
            benchmarks_main.parse(words)
        assert message in capsys.readouterr().err


def test_the_command_prints_tables_writes_all_and_fails_where_ratios_were_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = comparison(contestant("a", {"none": 1}), contestant("b", {"none": 9}), contestant("left out", {"none": 9}))
    even = comparison(contestant("a", {"none": 1}))
    monkeypatch.setattr(benchmarks_main, "COMPARISONS", {"odd": lambda _: [odd], "even": lambda _: [even]})
    file = tmp_path / "numbers.json"
    for words, code, titles in ((["odd", "even"], 1, 2), (["even"], 0, 1)):
        assert benchmarks_main.main([*words, "--repeats", "1", "--only", "b,c", "--json", str(file)]) == code
        assert capsys.readouterr().out.count("## Some work") == titles
        numbers = json.loads(file.read_text())
        assert [one["comparison"] for one in numbers["comparisons"]] == words
        assert {"date", "processor", "cores", "versions", "bfloat16", "options"} <= set(numbers)
        assert "left out" not in numbers["comparisons"][0]["rounds"]
