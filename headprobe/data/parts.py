"""Which rows of a data set calibrate and which are judged: what chooses never sees the images that judge."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headprobe.errors import UsageError

HALF, SAME, SPLIT = "half", "same", "split:"


@dataclass(frozen=True)
class CalibrationRows:
    """The option `--data.calibration`, checked.

    Attributes:
        rule: `half`: the rows of one half calibrate, those of the other are judged; `same`: all rows do both; `split`:
            another split calibrates.
        split: Its name.
    """

    rule: Literal["half", "same", "split"]
    split: str = ""

    @classmethod
    def read(cls, text: str) -> "CalibrationRows":
        """Read the option.

        Raises:
            UsageError: It is none of the choices.
        """
        if text == HALF:
            return cls("half")
        if text == SAME:
            return cls("same")
        if text.startswith(SPLIT) and text != SPLIT:
            return cls("split", text.removeprefix(SPLIT))
        raise UsageError(f"--data.calibration must be half, same or split:NAME, got {text!r}")

    @property
    def text(self) -> str:
        """The option's text."""
        return f"{SPLIT}{self.split}" if self.rule == "split" else self.rule


def calibrates(unit: int, row: int) -> bool:
    """Return whether a row belongs to the half that calibrates: by the first bit of a hash of its unit and number."""
    return hashlib.sha256(f"half:{unit}:{row}".encode()).digest()[0] < 128


def half_of(rows: Sequence[Sequence[int]], calibration: bool) -> list[list[int]]:
    """Return the rows of each unit that calibrate, or those that are judged.

    Args:
        rows: Rows of each unit, ascending.
        calibration: Which half.
    """
    return [[row for row in own if calibrates(unit, row) == calibration] for unit, own in enumerate(rows)]
