"""The option `--model.classifier`: who classifies in place of the model's own classifier.

| text | classifies by |
| --- | --- |
| `class-mean`, `class-mean:0.07` | cosine to the mean of each class over calibration images, over a temperature |
| `knn`, `knn:20:0.07` | votes of the 20 nearest calibration images, weighted by a temperature |
| `FILE.safetensors` | a linear head: text embeddings, or a linear probe |
| `none` | nobody: no labels are needed |
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from headprobe.errors import UsageError

CLASS_MEAN, KNN, NONE = "class-mean", "knn", "none"
FILE = ".safetensors"

CHOICES = f"{CLASS_MEAN}, {KNN}, FILE{FILE} or {NONE}"

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""The protocol of DINO, which its authors evaluate features by. Caron 2021, https://arxiv.org/abs/2104.14294."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.003, 100.0
"""At a lower one the vote of a class without neighbours, exp(-1 / temperature), is 0 in float64 beside the others."""

MOST_NEIGHBOURS = 1000


@dataclass(frozen=True)
class ClassifierChoice:
    """The option, checked.

    Attributes:
        kind: `class-mean`, `knn`, `none`, or `file`.
        temperature: By which cosines are divided.
        k: Neighbours that vote.
        path: The file.
    """

    kind: str
    temperature: float = TEMPERATURE
    k: int = NEIGHBOURS
    path: str = ""

    @property
    def fitted(self) -> bool:
        """Whether it is fitted on calibration images."""
        return self.kind in (CLASS_MEAN, KNN)

    @property
    def text(self) -> str:
        """The canonical text."""
        if self.kind == CLASS_MEAN:
            return f"{CLASS_MEAN}:{self.temperature:g}"
        return f"{KNN}:{self.k}:{self.temperature:g}" if self.kind == KNN else self.path or self.kind

    @classmethod
    def read(cls, text: Any) -> "ClassifierChoice":
        """Read the option.

        Raises:
            UsageError: It is none of the choices.
        """
        if not isinstance(text, str):
            raise UsageError(f"--model.classifier must be {CHOICES}, got {text!r}")
        if text.lower().endswith(FILE):
            return cls("file", path=text)
        kind, *numbers = text.split(":")
        if kind not in (CLASS_MEAN, KNN, NONE):
            near = difflib.get_close_matches(kind, (CLASS_MEAN, KNN, NONE), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"--model.classifier must be {CHOICES}{hint}, got {text!r}")
        most = {CLASS_MEAN: 1, KNN: 2, NONE: 0}[kind]
        if len(numbers) > most:
            forms = {CLASS_MEAN: "a temperature", KNN: "neighbours and a temperature", NONE: "no number"}
            raise UsageError(
                f"--model.classifier {kind} takes {forms[kind]}, as in class-mean:0.07 or knn:20:0.07, got {text!r}"
            )
        k = _neighbours(numbers[0], text) if kind == KNN and numbers else NEIGHBOURS
        last = numbers[most - 1 :] if most else []
        return cls(kind, _temperature(last[0], text) if last else TEMPERATURE, k)


def _neighbours(number: str, text: str) -> int:
    k = int(number) if number.isascii() and number.isdecimal() else 0
    if not 1 <= k <= MOST_NEIGHBOURS:
        raise UsageError(f"--model.classifier knn takes 1 to {MOST_NEIGHBOURS} neighbours, as in knn:20, got {text!r}")
    return k


def _temperature(number: str, text: str) -> float:
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not LEAST_TEMPERATURE <= found <= MOST_TEMPERATURE:
        raise UsageError(
            f"--model.classifier takes a temperature of {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, as in "
            f"class-mean:0.07, got {text!r}"
        )
    return found
