"""Sentences that are filled with numbers: each number is kept beside the text, to be recomputed."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from headprobe.run.load import SAME, Row, RunFiles
from headprobe.text import counted

MINUS = "\u2212"
"""The minus of prose, as in figures."""

MANY_IMAGES = 5000
"""From so many images on, percentages have two decimals: one image in 5,000 is 0.02 points."""

ENORMOUS = 1e6
"""From so many nats on, numbers are written with a power of ten: a broken model loses any number of them."""


@dataclass(frozen=True)
class Sentence:
    """One measured answer.

    Attributes:
        key: What it is about, such as `layers`: one sentence of a run has it.
        text: Plain text, perhaps several sentences; names of data and models stand in it as the user wrote them.
        numbers: Every number in the text, unrounded, by name; percentages of images are fractions.
    """

    key: str
    text: str
    numbers: dict[str, float]


class _Wording(string.Formatter):
    """Formats a number by what it is; the form of a text is empty.

    Forms: `count` and `count NOUN` (`1 layer`), `none` (a count, but `none` for 0), `ONE|SEVERAL` (the word that goes
    with the number), `points`, `percent` of a fraction, `nats`, `p`, `ratio`, `change` (with its sign), `px`.
    """

    def __init__(self, images: int) -> None:
        self._decimals = 2 if images >= MANY_IMAGES else 1

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, str):
            return value
        text = self._number(value, format_spec)
        return f"{MINUS}{text[1:]}" if text.startswith("-") else text

    def _number(self, value: Any, format_spec: str) -> str:
        if "|" in format_spec:
            one, several = format_spec.split("|")
            return one if value == 1 else several
        if not math.isfinite(value):
            return "not defined" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
        form, _, noun = format_spec.partition(" ")
        match form:
            case "none" if value == 0:
                return "none"
            case "count" | "none":
                return counted(int(value), noun) if noun else f"{int(value):,}"
            case "points":
                return _signed_zero_gone(f"{value:.{self._decimals}f}")
            case "percent":
                return _signed_zero_gone(f"{100 * value:.{self._decimals}f}") + "%"
            case "nats":
                return _nats(value)
            case "p":
                return "below 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
            case "ratio":
                return _signed_zero_gone(f"{value:.2f}")
            case "change":
                return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no sign of a rounded zero
            case "px":
                return _signed_zero_gone(f"{value:.1f}")
        raise ValueError(f"no such form of a number: {format_spec!r}")


def _nats(value: float) -> str:
    """Return three decimals; of small numbers two digits, of enormous ones three."""
    if abs(value) >= ENORMOUS:
        return f"{value:.2e}"
    if value == 0 or abs(value) >= 0.01:
        return f"{abs(value) if value == 0 else value:.3f}"
    decimals = 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.1e}"


def _signed_zero_gone(text: str) -> str:
    """Return the text of a number without the sign of a rounded zero."""
    return text.removeprefix("-") if not text.strip("-0.") else text


class Draft:
    """A sentence that is being written, piece by piece.

    Args:
        key: What it is about.
        images: Images behind its percentages, which decide their decimals.
    """

    def __init__(self, key: str, images: int) -> None:
        self._key, self._wording = key, _Wording(images)
        self._explained = False
        self._text: list[str] = []
        self._numbers: dict[str, float] = {}

    def say(self, template: str, prefix: str = "", **values: float | str) -> Self:
        """Add text in which `{name:form}` stands for a number, and `{name}` for a text.

        Args:
            template: The text.
            prefix: Put before the names under which the numbers are kept.
            **values: Numbers and texts by name.
        """
        self._text.append(self._wording.vformat(template, (), values))
        self._numbers |= {
            f"{prefix}{name}": float(value)
            for name, value in values.items()
            if not isinstance(value, str) and f"{{{name}:" in template
        }
        return self

    def interval(self, row: Mapping[str, Any], column: str, form: str, prefix: str = "", about: str = "") -> Self:
        """Add the limits of a column in brackets, and what else belongs in them; no limits where there are none."""
        low, high = (float(row[name]) for name in limits_of(column))
        names = dict(zip(limits_of(column), (low, high), strict=True))
        if math.isnan(low) or math.isnan(high):
            return self.say(f" (no interval{about})")
        first, last = names
        head = "" if self._explained else "95% interval "  # once in a sentence is enough
        self._explained = True
        return self.say(f" ({head}{{{first}:{form}}} to {{{last}:{form}}}{about})", prefix, **names)

    def done(self) -> Sentence:
        """Return the sentence."""
        return Sentence(self._key, "".join(self._text), self._numbers)


def flattered(draft: Draft, run: RunFiles, also: bool = False) -> Draft:
    """Say of what was fitted or chosen on the judged images that it flatters; `also` where something else tells so."""
    if also or run.calibration == SAME:
        draft.say(" It was fitted or chosen on the images that judge it, which flatters it.")
    return draft


def limits_of(column: str) -> tuple[str, str]:
    """Return the names of a column's limits: `drop_low_pp` of `drop_pp`, else `COLUMN_low`."""
    stem, unit = (column.removesuffix("_pp"), "_pp") if column.endswith("_pp") else (column, "")
    return f"{stem}_low{unit}", f"{stem}_high{unit}"


def listed(items: Sequence[str]) -> str:
    """Return items as in a sentence: `a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def table_rows(run: RunFiles, name: str) -> list[Row]:
    """Return the rows of a table such as `orders.csv`; none where there is no such file."""
    columns = run.table(name) or {}
    return [
        dict(zip(columns, cells, strict=True))
        for cells in zip(*(own.tolist() for own in columns.values()), strict=True)
    ]


def judged_images(run: RunFiles) -> int:
    """Return how many images count in every row."""
    return int(run.masks[0]["images"])
