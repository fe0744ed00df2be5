"""The ablation text: what the slots of masked heads are filled with, in one run perhaps in several ways.

| text | fills a masked slot with |
| --- | --- |
| `zero` | 0 |
| `mean` | the head's mean over calibration images and tokens |
| `position` | its mean at the same token position, over calibration images |
| `linear` | its affine prediction from the heads that the layer keeps, by least squares on calibration images |
| `resample`, `resample:4`, `resample:4:7` | its output on another image; 4 draws, with seed 7 |
| `optimal` | the constant with which the model loses least on calibration images |

A comma joins several: `zero,mean,resample:4`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from headprobe.errors import UsageError

ZERO, MEAN, POSITION, LINEAR, RESAMPLE, OPTIMAL = KINDS = (
    "zero",
    "mean",
    "position",
    "linear",
    "resample",
    "optimal",
)
"""Kinds of ablation, by their name in the column `ablation` of `masks.csv`."""

FITTED = frozenset({MEAN, POSITION, LINEAR, OPTIMAL})
"""Kinds that are fitted on calibration images."""

MOST_DRAWS = 1000


@dataclass(frozen=True)
class Ablation:
    """One way to fill the slots of masked heads.

    Attributes:
        kind: One of `KINDS`.
        draws: How many random draws are scored, of a kind that draws; else 1.
        seed: Of the draws.
    """

    kind: str
    draws: int = 1
    seed: int = 0

    @property
    def text(self) -> str:
        """The canonical text."""
        if self.seed:
            return f"{self.kind}:{self.draws}:{self.seed}"
        return f"{self.kind}:{self.draws}" if self.draws > 1 else self.kind


class Ablations(tuple[Ablation, ...]):
    """The ablations of one run: a text such as `zero,mean,resample:4`, or a list of texts.

    Raises:
        UsageError: A text is no ablation, or a kind stands twice.
    """

    __slots__ = ()

    def __new__(cls, given: Any = ZERO) -> Ablations:
        """Check every text."""
        texts = list(given) if isinstance(given, (list, tuple)) else [given]
        found: list[Ablation] = []
        for text in texts:
            if isinstance(text, Ablation):
                found.append(text)
                continue
            if not isinstance(text, str):
                raise UsageError(f"an ablation is a text such as zero or resample:4, got {text!r}")
            found += [_ablation(part.strip()) for part in text.split(",")]
        if not found:
            raise UsageError(f"an ablation must be one of {', '.join(KINDS)}, got an empty list")

        kinds = [ablation.kind for ablation in found]
        twice = [kind for kind in kinds if kinds.count(kind) > 1]
        if twice:
            raise UsageError(f"each kind of ablation may stand once, got {twice[0]} twice")
        return super().__new__(cls, found)

    @property
    def text(self) -> str:
        """The canonical text."""
        return ",".join(ablation.text for ablation in self)


def _ablation(text: str) -> Ablation:
    """Read one ablation: `kind`, or `resample:DRAWS:SEED`."""
    kind, *numbers = text.split(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"an ablation must be one of {', '.join(KINDS)}{hint}, got {text!r}")
    if numbers and kind != RESAMPLE:
        raise UsageError(f"only resample takes draws and a seed, as in resample:4:0, got {text!r}")
    # isascii: isdecimal takes the digits of all scripts
    if len(numbers) > 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UsageError(f"resample takes whole numbers of draws and a seed, as in resample:4:0, got {text!r}")

    draws, seed = [*map(int, numbers), *(1, 0)[len(numbers) :]]
    if not 1 <= draws <= MOST_DRAWS:
        raise UsageError(f"resample takes 1 to {MOST_DRAWS} draws, got {text!r}")
    return Ablation(kind, draws, seed)
