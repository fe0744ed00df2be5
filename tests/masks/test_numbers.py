import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.masks.pieces import MaskSpecError, Piece, number_text, parse_numbers


def whole(text: str) -> Piece:
    return Piece(text, 0, len(text))


@pytest.mark.parametrize(
    ("text", "values", "canonical"),
    [
        ("3", [3], "3"),
        ("0", [0], "0"),
        ("3,1,2", [1, 2, 3], "1-3"),
        ("0-5,9", [0, 1, 2, 3, 4, 5, 9], "0-5,9"),
        ("0-36/6", [0, 6, 12, 18, 24, 30, 36], "0-36/6"),
        ("0-35/6", [0, 6, 12, 18, 24, 30], "0-30/6"),
        ("4,4,4-5", [4, 5], "4,5"),
        ("7-7", [7], "7"),
        ("0-1", [0, 1], "0,1"),
        ("0-5/9", [0], "0"),
        ("0,2,4,5,6", [0, 2, 4, 5, 6], "0-4/2,5,6"),
        ("999999999", [999999999], "999999999"),
    ],
)
def test_lists_and_ranges_are_sets_with_one_canonical_text(text: str, values: list[int], canonical: str) -> None:
    numbers = parse_numbers(whole(text), "layer")
    assert (list(numbers.values), numbers.text) == (values, canonical)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_the_canonical_text_of_any_set_reads_back_as_that_set(values: set[int]) -> None:
    text = number_text(values)
    again = parse_numbers(whole(text), "layer")
    assert set(again.values) == values
    assert again.text == text


@given(st.sets(st.integers(0, 10**9 - 1), min_size=1, max_size=20))
def test_the_canonical_text_of_far_apart_numbers_reads_back(values: set[int]) -> None:
    assert set(parse_numbers(whole(number_text(values)), "seed").values) == values


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 0, "expected a layer number here"),
        ("3,", 2, "expected a layer number here"),
        (",3", 0, "expected a layer number here"),
        ("3,,4", 2, "expected a layer number here"),
        ("3-", 2, "expected a layer number here"),
        ("3-5/", 4, "expected a step number here"),
        ("-3", 0, "never negative"),
        ("1,-3", 2, "never negative"),
        ("5-3", 0, "write 3-5, got 5-3"),
        ("1,5-3/2", 2, "write 3-5, got 5-3"),
        ("03", 0, "write 3, got 03"),
        ("0-007", 2, "write 7, got 007"),
        ("00", 0, "write 0, got 00"),
        ("1-2-3", 3, "two ends"),
        ("3--5", 2, "two ends"),
        ("1-5/2/3", 5, "one step"),
        ("3/2", 1, "a step belongs to a range"),
        ("0-5/0", 4, "at least 1"),
        ("x", 0, "expected a layer number, such as 3, 0-5 or 0-5,9, got 'x'"),
        ("12x", 2, "got '12x'"),
        ("1, 2", 2, "no blanks"),
        ("1\n", 1, "no blanks"),
        ("٣", 0, "got '٣'"),
        ("1²", 1, "got '²'"),
        ("1;2", 1, "got ';'"),
        ("0-999999999", 0, "1,000,000,000 layer numbers are too many: at most 100,000"),
        ("0-99999,5-6", 0, "100,002 layer numbers are too many"),
        ("1,1000000000", 2, "at most 9 digits, got 10"),
    ],
)
def test_the_caret_is_under_what_is_no_number(text: str, column: int, reason: str) -> None:
    with pytest.raises(MaskSpecError) as error:
        parse_numbers(whole(text), "layer")
    assert (error.value.column, reason in error.value.reason) == (column, True), error.value.reason


def test_absurd_ranges_are_refused_at_once() -> None:
    start = time.process_time()
    with pytest.raises(MaskSpecError, match="too many"):
        parse_numbers(whole(",".join(["0-999999999"] * 50)), "layer")
    assert time.process_time() - start < 0.1


def test_a_value_knows_where_it_is_written() -> None:
    numbers = parse_numbers(whole("9,0-12/6"), "layer")
    assert [numbers.piece_of(value).start for value in (9, 0, 12)] == [0, 2, 4]
    assert numbers.beyond(12) == (12, numbers.runs[1].last)
    assert numbers.beyond(13) is None
