"""Which rows of a data set calibrate and which are judged: what chooses never sees the images that judge."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def rows_apart(
    fitted_on: Mapping[str, Any], judged: Mapping[str, Any], wanted: CalibrationRows | None
) -> CalibrationRows | None:
    """Return the rule by which constants and judged images stay apart; None where the data are others.

    Args:
        fitted_on: The identity of the data that the constants were fitted on.
        judged: The identity of the source that is judged.
        wanted: The user's option, None for none.

    Raises:
        UsageError: Images that the constants were fitted on would be judged.
    """
    if fitted_on["split"] != judged["split"] or not _shared_files(fitted_on["files"], judged["files"]):
        return None
    if wanted is not None and wanted.rule == "same":
        return wanted
    rule = (fitted_on.get("rows") or {}).get("rule", "")
    same = fitted_on["files"] == judged["files"] and fitted_on["unit"] == judged["unit"]
    if rule == "half" and same:
        return CalibrationRows("half")
    why = "on all of these images" if same else "on files that are among these, cut in another way"
    raise UsageError(
        f"the constants of --calibration-file were fitted {why}, which would judge themselves: give other data, or "
        f"--data.calibration same to do so and say it in the results, got a calibration on {rule or 'all rows'}"
    )


def _shared_files(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    return any(file in other for file in one)
