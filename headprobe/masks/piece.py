"""Where in the user's text something stands, so that every error can point at it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

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
