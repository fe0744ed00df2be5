import pytest

from headprobe.text import counted, ranges


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "layer", "1 layer"), (1371, "name", "1,371 names"), (2, "family", "2 families"), (0, "class", "0 classes")],
)
def test_nouns_follow_their_numbers(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 4], "1,3-4")])
def test_runs_of_numbers_become_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
