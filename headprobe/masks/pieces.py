"""A user's text in pieces, each with its place so that errors can point at it; and the lists of numbers in it.

Lists of numbers are written `0-5,9` or `0-36/6`, and there is one way to write a set of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from headprobe.errors import UsageError

ALLOWED = re.compile(r"[A-Za-z0-9:.,\-+/_]")  # nothing that a shell or YAML would eat


class MaskSpecError(UsageError):
    """A mask spec that cannot be used: the reason, the user's text and a caret under the culprit, one line each."""

    def __init__(self, spec: str, column: int, reason: str) -> None:
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spec)
        super().__init__(f"{reason}\n{shown}\n{' ' * _width(shown[:column])}^")
        self.spec = spec
        self.column = column
        self.reason = reason

    def __reduce__(self) -> tuple[type[MaskSpecError], tuple[str, int, str]]:
        return MaskSpecError, (self.spec, self.column, self.reason)


def _width(text: str) -> int:
    """Terminal columns that the text takes: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in {"W", "F"} else 1 for c in text
    )


@dataclass(frozen=True)
class Piece:
    """The characters `start` to `end` of the user's text."""

    source: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """The characters themselves."""
        return self.source[self.start : self.end]

    def after(self, offset: int) -> Piece:
        """The same piece without its first characters."""
        return Piece(self.source, self.start + offset, self.end)

    def split(self, separator: str) -> list[Piece]:
        """The pieces between single-character separators, empty ones included."""
        ends = [self.start + i for i, c in enumerate(self.text) if c == separator] + [self.end]
        starts = [self.start, *(end + 1 for end in ends[:-1])]
        return [Piece(self.source, start, end) for start, end in zip(starts, ends, strict=True)]

    def error(self, reason: str, offset: int = 0) -> MaskSpecError:
        """An error with the caret under this piece's character `offset`."""
        return MaskSpecError(self.source, self.start + offset, reason)

    def check_characters(self) -> None:
        """Refuse what the language has no use for, the first such character named.

        Raises:
            MaskSpecError: at a blank or at any character but letters, digits and `: . , - + / _`.
        """
        for offset, character in enumerate(self.text):
            if character.isspace():
                raise self.error("a mask spec holds no blanks: write it in one piece, such as layer:3+head:5.1", offset)
            if not ALLOWED.match(character):
                reason = f"a mask spec holds only letters (a-z), digits (0-9) and : . , - + / _, got {character!r}"
                raise self.error(reason, offset)


# -- numbers --

MAX_NUMBERS = 100_000  # far above any model's heads, and still nothing to a computer
MAX_DIGITS = 9


@dataclass(frozen=True)
class Run:
    """The numbers of one item of a list, and where its two ends are written."""

    values: range
    first: Piece
    last: Piece


@dataclass(frozen=True)
class Numbers:
    """A set of numbers from 0 on, each with its place in the user's text."""

    runs: tuple[Run, ...]

    @classmethod
    def single(cls, value: int, piece: Piece) -> Numbers:
        """One number, which an error would show at the piece."""
        return cls((Run(range(value, value + 1), piece, piece),))

    @cached_property
    def values(self) -> tuple[int, ...]:
        """The numbers, each once, in ascending order."""
        return tuple(sorted({value for run in self.runs for value in run.values}))

    @property
    def only(self) -> int | None:
        """The number, where there is only one."""
        return self.values[0] if len(self.values) == 1 else None

    @cached_property
    def text(self) -> str:
        """The canonical text: a function of the set."""
        return number_text(self.values)

    def piece_of(self, value: int) -> Piece:
        """Where the number is written: the nearer end of the first range that holds it."""
        run = next(run for run in self.runs if value in run.values)
        return run.first if value == run.values[0] else run.last

    def beyond(self, limit: int) -> tuple[int, Piece] | None:
        """The first written number that reaches the limit, and its place; None where all stay below."""
        for run in self.runs:
            for value, piece in ((run.values[0], run.first), (run.values[-1], run.last)):
                if value >= limit:
                    return value, piece
        return None


def number_text(values: Iterable[int]) -> str:
    """The shortest-looking list for a set of numbers: three or more in equal steps make a range.

    >>> number_text({3, 1, 2}), number_text({0, 6, 12, 18}), number_text({0, 1, 9})
    ('1-3', '0-18/6', '0,1,9')
    """
    rest = sorted(set(values))
    items: list[str] = []
    start = 0
    while start < len(rest):
        end = _end_of_run(rest, start)
        first, last = rest[start], rest[end]
        step = rest[start + 1] - first if end > start else 0
        items.append(str(first) if end == start else f"{first}-{last}" + (f"/{step}" if step > 1 else ""))
        start = end + 1
    return ",".join(items)


def _end_of_run(rest: list[int], start: int) -> int:
    """The last place of the longest run in equal steps from `start`, or `start` where fewer than three join."""
    end = start + 1
    while end + 1 < len(rest) and rest[end + 1] - rest[end] == rest[start + 1] - rest[start]:
        end += 1
    return end if start + 2 <= end < len(rest) else start


def parse_numbers(piece: Piece, what: str) -> Numbers:
    """Read a list of numbers and ranges.

    Args:
        piece: the user's text, `3`, `0-5,9` or `0-36/6`.
        what: what the numbers stand for, in messages: "layer", "seed".

    Raises:
        MaskSpecError: with the caret under the first character that does not fit.
    """
    runs = tuple(_parse_run(item, what) for item in piece.split(","))
    total = sum(len(run.values) for run in runs)
    if total > MAX_NUMBERS:
        raise piece.error(f"{total:,} {what} numbers are too many: at most {MAX_NUMBERS:,}")
    return Numbers(runs)


def _parse_run(item: Piece, what: str) -> Run:
    if item.text.startswith("-"):
        raise item.error(f"expected a {what} number: numbers count from 0 and are never negative")
    ends, *steps = item.split("/")
    first, *lasts = ends.split("-")
    if len(steps) > 1:
        raise steps[1].error("a range has one step: write it FIRST-LAST/STEP, such as 0-36/6", -1)
    if len(lasts) > 1:
        raise lasts[1].error("a range has two ends: write it FIRST-LAST, such as 0-5", -1)
    start = parse_number(first, what)
    if not lasts:
        if steps:
            raise steps[0].error("a step belongs to a range: write it FIRST-LAST/STEP, such as 0-36/6", -1)
        return Run(range(start, start + 1), first, first)
    stop = parse_number(lasts[0], what)
    step = parse_number(steps[0], "step") if steps else 1
    if stop < start:
        raise item.error(f"a range goes upwards: write {stop}-{start}, got {ends.text}")
    if step == 0:
        raise steps[0].error("a step is at least 1, got 0")
    return Run(range(start, stop + 1, step), first, lasts[0])


def parse_number(piece: Piece, what: str) -> int:
    """Read one number of plain digits.

    Raises:
        MaskSpecError: where there is no number, or one with leading zeros or more than nine digits.
    """
    text = piece.text
    if not text:
        raise piece.error(f"expected a {what} number here, such as 3, 0-5 or 0-5,9")
    piece.check_characters()
    for offset, character in enumerate(text):
        if not character.isdigit():
            raise piece.error(f"expected a {what} number, such as 3, 0-5 or 0-5,9, got {text!r}", offset)
    if text.startswith("0") and text != "0":
        raise piece.error(f"numbers have no leading zeros: write {text.lstrip('0') or '0'}, got {text}")
    if len(text) > MAX_DIGITS:
        raise piece.error(f"numbers have at most {MAX_DIGITS} digits, got {len(text)} of them")
    return int(text)
