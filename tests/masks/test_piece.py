import pickle

import pytest

from headprobe.errors import UsageError
from headprobe.masks.pieces import MaskSpecError, Piece


def test_a_mask_spec_error_is_a_usage_error_and_a_value_error() -> None:
    assert issubclass(MaskSpecError, UsageError)
    assert issubclass(MaskSpecError, ValueError)


def test_the_message_is_the_reason_the_text_and_the_caret() -> None:
    assert str(MaskSpecError("layer:1,x", 8, "expected a number")) == "expected a number\nlayer:1,x\n        ^"


@pytest.mark.parametrize(
    ("text", "column", "caret"),
    [
        ("file:日本+x", 8, 10),  # two characters that are two columns wide each
        ("file:e\u0301+x", 8, 7),  # an accent of its own, which takes no column
        ("file:a\t+x", 7, 7),  # a tab is shown as one sign
    ],
)
def test_the_caret_counts_terminal_columns(text: str, column: int, caret: int) -> None:
    assert str(MaskSpecError(text, column, "reason")).split("\n")[2] == " " * caret + "^"


def test_a_line_break_in_the_text_does_not_break_the_message() -> None:
    assert str(MaskSpecError("layer:3\n", 7, "reason")).split("\n") == [
        "reason",
        "layer:3\N{REPLACEMENT CHARACTER}",
        "       ^",
    ]


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(MaskSpecError("layer:x", 6, "reason")))
    assert (str(error), error.column) == ("reason\nlayer:x\n      ^", 6)


def test_split_pieces_know_their_places() -> None:
    pieces = Piece("a:b+:cd", 4, 7).split(":")
    assert [(piece.text, piece.start, piece.end) for piece in pieces] == [("", 4, 4), ("cd", 5, 7)]
