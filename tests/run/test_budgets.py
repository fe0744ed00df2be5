"""Kept row budgets: found again for the very same run, and never in the way of any."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from headprobe.run.budgets import keep_budget, measured_budget

ABOUT: dict[str, Any] = {
    "model": "digits_vit",
    "options": {},
    "input_size": [1, 8, 8],
    "joins": "3 9 None",
    "precision": "32-true",
    "processes": 1,
    "hardware": {"machine": "x86_64", "threads": 2, "gpus": []},
}
OTHERS: dict[str, Any] = {
    "model": "digits_swin",
    "options": {"img_size": 16},
    "input_size": [1, 8, 16],
    "joins": "3 9 12",
    "precision": "bf16-mixed",
    "processes": 2,
    "hardware": {"machine": "x86_64", "threads": 1, "gpus": []},
}
TRIED = {21: 0.5, 42: 0.25}


def kept(directory: Path) -> Path:
    """Keep a budget, and return its file."""
    keep_budget(directory, ABOUT, 42, TRIED)
    (file,) = directory.iterdir()
    return file


def test_a_budget_is_found_again_for_the_same_run(tmp_path: Path) -> None:
    keep_budget(tmp_path / "row_budgets", ABOUT, 42, TRIED)
    assert measured_budget(tmp_path / "row_budgets", dict(reversed(ABOUT.items()))) == 42


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_differs_in_anything_has_none(tmp_path: Path, name: str) -> None:
    kept(tmp_path)
    assert measured_budget(tmp_path, {**ABOUT, name: OTHERS[name]}) is None
    assert measured_budget(tmp_path, {one: value for one, value in ABOUT.items() if one != name}) is None


def test_several_runs_keep_theirs_beside_each_other(tmp_path: Path) -> None:
    other = {**ABOUT, "model": "digits_swin"}
    keep_budget(tmp_path, ABOUT, 42, TRIED)
    keep_budget(tmp_path, other, 84, TRIED)
    assert (measured_budget(tmp_path, ABOUT), measured_budget(tmp_path, other)) == (42, 84)


def test_a_later_measurement_replaces_the_earlier(tmp_path: Path) -> None:
    kept(tmp_path)
    keep_budget(tmp_path, ABOUT, 21, TRIED)
    assert measured_budget(tmp_path, ABOUT) == 21


def test_where_nothing_was_kept_there_is_none(tmp_path: Path) -> None:
    assert measured_budget(tmp_path, ABOUT) is None
    assert measured_budget(tmp_path / "nowhere", ABOUT) is None


BROKEN = ["", "{", "null", "[]", "42", "{}"] + [
    f'{{"rows": {rows}}}' for rows in ("null", '"42"', "42.0", "0", "-42", "true", "[42]", "NaN")
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_holds_no_budget_counts_as_none(tmp_path: Path, content: str) -> None:
    kept(tmp_path).write_text(content)
    assert measured_budget(tmp_path, ABOUT) is None


def test_a_file_that_is_no_text_counts_as_none(tmp_path: Path) -> None:
    kept(tmp_path).write_bytes(b"\xff\xfe\x00")
    assert measured_budget(tmp_path, ABOUT) is None


def test_half_a_file_counts_as_none(tmp_path: Path) -> None:
    file = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:40])
    assert measured_budget(tmp_path, ABOUT) is None


def test_a_directory_in_the_place_of_the_file_counts_as_none(tmp_path: Path) -> None:
    file = kept(tmp_path)
    file.unlink()
    file.mkdir()
    assert measured_budget(tmp_path, ABOUT) is None
    keep_budget(tmp_path, ABOUT, 42, TRIED)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_directory_keeps_nothing(tmp_path: Path, below: str) -> None:
    place = tmp_path / "row_budgets"
    place.write_text("a file")
    keep_budget(place / below, ABOUT, 42, TRIED)
    assert measured_budget(place / below, ABOUT) is None
    assert place.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory_keeps_nothing_and_gives_what_it_has(tmp_path: Path) -> None:
    file = kept(tmp_path)
    tmp_path.chmod(0o500)
    keep_budget(tmp_path, ABOUT, 21, TRIED)
    keep_budget(tmp_path / "new", ABOUT, 21, TRIED)
    tmp_path.chmod(0o700)
    assert measured_budget(tmp_path, ABOUT) == 42
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_cannot_be_written_to_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    keep_budget(tmp_path, ABOUT, 42, TRIED)
    assert list(tmp_path.iterdir()) == []
