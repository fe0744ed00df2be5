"""Data of the page as JSON inside of HTML."""

import json

import numpy as np
import pytest

from headprobe.report.page.encode import to_json


@pytest.mark.parametrize("text", ["</script>", "<!--", "a & b", "\u2028\u2029", "'\"\\", "🐱 שלום", ""])
def test_texts_come_back_and_hold_nothing_that_ends_a_script(text: str) -> None:
    written = to_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not set("<>&\u2028\u2029") & set(written)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), "null"),
        (float("inf"), "null"),
        (np.float64("nan"), "null"),
        (0.123456789, "0.12346"),
        (-1234567.8, "-1234600"),
        (2.0, "2"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.bool_(True), "true"),
        (None, "null"),
        (np.array([[1.0, np.nan]]), "[[1,null]]"),
        ((1, 2), "[1,2]"),
    ],
)
def test_numbers_have_five_digits_and_what_is_not_finite_is_null(value: object, written: str) -> None:
    assert to_json(value) == written


def test_large_counts_keep_all_their_digits() -> None:
    assert to_json(123456789) == "123456789"


def test_bytes_travel_with_their_shape() -> None:
    assert to_json(np.array([[1, 2, 255]], dtype=np.uint8)) == '{"shape":[1,3],"u8":"AQL/"}'


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="got set"):
        to_json({"a": {1}})
