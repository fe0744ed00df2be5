"""Data whose own classes are chosen among: how many there are, their numbers, and what says neither."""

import json
from pathlib import Path
from typing import Any

import pytest

from headprobe.data.labels.own_classes import number_own
from headprobe.data.labels.read_class_map import read_class_map
from headprobe.data.sources.source import LabelColumn
from headprobe.errors import UsageError

NAMED = LabelColumn("class", ("cat", "dog", "eel", "fox"))
NUMBERS = LabelColumn("number")
TEXTS = LabelColumn("text")


def map_file(folder: Path, content: Any) -> Any:
    file = folder / "classes.json"
    file.write_text(json.dumps(content))
    return read_class_map(str(file))


def test_named_classes_are_taken_in_their_order() -> None:
    found = number_own(NAMED, None, None)
    assert found.classes == 4
    assert [found(number) for number in range(4)] == [0, 1, 2, 3]
    assert found.names == ["cat", "dog", "eel", "fox"]
    assert found.valid_classes is None


def test_folders_in_two_orders_need_no_class_map() -> None:
    found = number_own(LabelColumn("class", ("1", "10", "2")), None, None)
    assert (found.classes, found.to_model) == (3, (0, 1, 2))


def test_a_class_map_joins_classes(tmp_path: Path) -> None:
    found = number_own(NAMED, map_file(tmp_path, {"cat": 1, "dog": 0, "eel": 1, "fox": 0}), None)
    assert found.classes == 2
    assert [found(number) for number in range(4)] == [1, 0, 1, 0]
    assert found.names == ["dog / fox", "cat / eel"]


def test_texts_and_numbers_follow_a_class_map(tmp_path: Path) -> None:
    texts = number_own(TEXTS, map_file(tmp_path, {"cat": 0, "dog": 1, "kitten": 0}), None)
    assert [texts(label) for label in ("cat", "dog", "kitten")] == [0, 1, 0]
    numbers = number_own(NUMBERS, map_file(tmp_path, {"3": 0, "7": 1}), None)
    assert numbers.classes == 2
    assert [numbers(label) for label in (3, 7)] == [0, 1]


@pytest.mark.parametrize("word", [None, "identity"])
def test_plain_numbers_need_the_number_of_classes(word: str | None) -> None:
    given = None if word is None else read_class_map(word)
    assert number_own(NUMBERS, given, 12).classes == 12
    assert number_own(NUMBERS, given, 12)(11) == 11
    with pytest.raises(UsageError, match=r"--model\.num_classes N for labels 0 to N - 1"):
        number_own(NUMBERS, given, None)


def test_what_says_no_classes_or_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels are texts"):
        number_own(TEXTS, None, 5)
    with pytest.raises(UsageError, match=r"leave --model\.num_classes out"):
        number_own(NAMED, None, 10)
    with pytest.raises(UsageError, match="no entry is 0: count them without gaps, from 0"):
        number_own(NAMED, map_file(tmp_path, {"cat": 1, "dog": 2, "eel": 1, "fox": 2}), None)
