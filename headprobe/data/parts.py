"""Which rows of a data set calibrate and which are judged: what chooses never sees the images that judge."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from headprobe.data.stream import FittedData, fewer_rows
from headprobe.errors import UsageError
from headprobe.text import counted

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


# -- the data, cut into their parts ------------------------------------------------------------------------------------


def judged_part(data: FittedData, rows: CalibrationRows) -> FittedData:
    """Return the data that are judged: of a half the other one.

    Raises:
        UsageError: Nobody knows the data's rows, or none is left.
    """
    if rows.rule != "half":
        return data
    found = replace(data, chosen=half_of(_known(data), calibration=False))
    _refuse_empty(found, "judge", rows)
    return found


def calibrating_part(data: FittedData, rows: CalibrationRows, most: int | None) -> FittedData:
    """Return the data that calibrate.

    Args:
        data: All data, or those of another split.
        rows: Which of them calibrate.
        most: Take only so many of these images, an even share of every unit.

    Raises:
        UsageError: Nobody knows the data's rows, or there are fewer.
    """
    found = replace(data, together=1)  # the constants are the same, whatever else is scored
    if rows.rule == "half":
        found = replace(found, chosen=half_of(_known(found), calibration=True))
    if most is not None:
        known = _known(found)
        if sum(map(len, known)) < most:
            raise UsageError(
                f"--data.calibration_images must be at most {sum(map(len, known)):,}, the images of "
                f"--data.calibration {rows.text}, got {most:,}"
            )
        found = replace(found, chosen=fewer_rows(known, most))
    _refuse_empty(found, "calibrate", rows)
    return found


def _known(data: FittedData) -> list[Sequence[int]]:
    """Return the rows of each unit, which must be known before anything is read."""
    rows = data.expected_rows
    if rows is None:
        raise UsageError(
            "nobody knows how many images these data have, so they cannot be cut into images that fit and images that "
            f"are judged: give --data.calibration split:NAME without --data.calibration_images, or Parquet files, got "
            f"{data.source.unit_name(0)}"
        )
    return rows


def _refuse_empty(data: FittedData, what: str, rows: CalibrationRows) -> None:
    if data.images == 0:
        raise UsageError(
            f"no image is left to {what} with --data.calibration {rows.text}: take more images, or choose "
            "split:NAME or same, got 0"
        )


# -- in words ----------------------------------------------------------------------------------------------------------


def parts_in_words(
    rows: CalibrationRows | None, given: Mapping[str, Any] | None, fits: bool, images: int | None, fit: int | None
) -> str:
    """Return which images choose and which judge; nothing where all are judged and nothing is fitted.

    Args:
        rows: Which calibrate, None where that was never asked.
        given: The identity of the data that given constants were fitted on.
        fits: Whether something is fitted.
        images: Images that are judged, None where nobody knows.
        fit: Images that calibrate, the same.
    """
    judged = "an unknown number of" if images is None else f"{images:,}"
    judged_others = f"{judged} others" if images is None else counted(images, "other")
    if given is not None:
        again = rows is not None and rows.rule == "same"
        others = f"{judged} images, these among them, which flatters (same)" if again else judged_others
        return f"fitted by an earlier run on {_fitted_in_words(given)}; judged on {others}"
    if rows is None or (not fits and rows.rule != "half"):
        return ""
    if not fits:
        return f"nothing is fitted; judged on {judged} images of one half (--data.calibration {rows.text})"
    if rows.rule == "same":
        return f"judged on the very images that it was fitted on, {judged} of them, which flatters (same)"
    chose = "images" if fit is None else counted(fit, "image")
    where = f"of the split {rows.split}" if rows.rule == "split" else "of one half, by a hash of unit and row"
    return f"fitted on {chose} {where}; judged on {judged_others} (--data.calibration {rows.text})"


def _fitted_in_words(data: Mapping[str, Any]) -> str:
    """Return which images fitted constants that were given, by the identity of their data."""
    images = "images" if data["images"] is None else counted(data["images"], "image")
    half = " (half)" if (data.get("rows") or {}).get("rule") == "half" else ""
    split = f", split {data['split']}" if data["split"] else ""
    return f"{images} of {data['path']}{split}{half}"
