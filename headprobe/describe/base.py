"""What every kind of per-head statistic has in common: it observes layers and gives each unit's sums away."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.errors import RunError
from headprobe.units.parts import Arrays, Part

__all__ = [
    "BASELINE",
    "CHANGE",
    "MASKED",
    "Arrays",
    "HeadStatistic",
    "Part",
    "Seen",
    "Subject",
    "differences",
    "prefixed",
]


T = TypeVar("T")


BASELINE, MASKED, CHANGE = "baseline", "masked", "change"
"""Whose numbers they are: the whole model's, the masked one's, and their differences on the same images."""


@dataclass(frozen=True)
class Subject:
    """The model that is described.

    Attributes:
        layout: Its attention layers.
        facts: What the metrics must know of each layer.
        units: Units of the data set.
        mask: Name of the mask whose model is described beside the baseline; None where there is none.
        device: Where sums are kept while a unit is open; a device with float64.
    """

    layout: HeadLayout
    facts: tuple[LayerFacts, ...]
    units: int
    mask: str | None = None
    device: torch.device | str = "cpu"

    @property
    def models(self) -> tuple[str, ...]:
        """`baseline`, and `masked` if there is a mask."""
        return (BASELINE,) if self.mask is None else (BASELINE, MASKED)

    def title(self, model: str) -> str:
        """Return what `baseline`, `masked` or `change` is called in files' rows and titles."""
        return {BASELINE: BASELINE, MASKED: f"{self.mask}", CHANGE: f"{self.mask} minus baseline"}[model]


def prefixed(model: str, name: str) -> str:
    """Return the name of a model's array: the baseline's have plain names."""
    return name if model == BASELINE else f"{model}_{name}"


@dataclass(frozen=True)
class Seen:
    """One layer of one forward pass.

    Attributes:
        unit: The unit that the images belong to.
        rows: `[images]`, their rows inside the unit.
        records: The baseline's record and, where a mask is described too, the masked model's; the very same object in
            the layers before the mask's first one, where the masked model is the baseline.
    """

    unit: int
    rows: Tensor
    records: tuple[LayerRecord, ...]

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.records[0].layer

    def each(self, describe: Callable[[LayerRecord], T]) -> list[T]:
        """Return what `describe` makes of each model's record; of one that is both models' it is asked once."""
        first, *others = self.records
        found = [describe(first)]
        return found + [found[0] if record is first else describe(record) for record in others]


class HeadStatistic(ABC):
    """One kind of statistic of every head.

    `begin` makes room, `observe` is called for each layer of each forward pass, `close` ends a unit and gives its sums
    away. Whoever adds the units up (`headprobe.units.unit_sums`) hands the whole back by `finish`.
    """

    subject: Subject

    def begin(self, subject: Subject) -> None:
        """Forget everything and make room for the sums of a model.

        Raises:
            UsageError: The statistic's options do not suit the model.
        """
        self.subject = subject
        self._open: dict[int, Part] = {}
        self._whole: Part | None = None

    @property
    def name(self) -> str:
        """What its sums are called among those of others."""
        return str(self.describe()["name"])

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the statistic's name and options as plain data, for a run's record."""

    def summed(self) -> dict[str, Any]:
        """Return the name and those options that change the sums, for a run's key; all, if not said otherwise."""
        return self.describe()

    @abstractmethod
    def observe(self, seen: Seen) -> None:
        """Add one layer of one forward pass. Keeps nothing of it but sums."""

    @abstractmethod
    def make_part(self) -> Part:
        """Make the empty metrics of one piece of the data."""

    def empty(self, name: str) -> Any:
        """Return an empty metric of this name, one of those that `close` gives.

        Raises:
            ValueError: There is no such metric.
        """
        part = self.make_part()
        if name not in part:
            raise ValueError(f"the metrics of {self.name} must be {', '.join(part)}, got {name}")
        return part[name]

    def part(self, piece: int) -> Part:
        """Return the open metrics of a piece of the data: of a unit, if not said otherwise."""
        if piece not in self._open:
            self._open[piece] = {name: metric.to(self.subject.device) for name, metric in self.make_part().items()}
        return self._open[piece]

    def close(self, unit: int) -> Part:
        """End a unit after its last batch and return its sums; a unit without images is closed too."""
        return self._closed(unit)

    def _closed(self, piece: int) -> Part:
        part = {name: metric.to("cpu") for name, metric in self.part(piece).items()}
        del self._open[piece]
        return part

    def finish(self, whole: Part) -> None:
        """Take the sums over all units; those of a data set without units are empty."""
        self._whole = whole or self.make_part()

    @property
    def whole(self) -> Part:
        """The metrics of the whole data set.

        Raises:
            RunError: It has not been added up.
        """
        if self._whole is None:
            raise RunError(f"the {self.name} statistics were not added up: the test did not end")
        return self._whole


def differences(masked: Mapping[str, Tensor], baseline: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Return masked minus baseline by name, in float64: the same numbers as those that are summed."""
    exact = {name: [value.to(device, torch.float64) for value in (masked[name], baseline[name])] for name in baseline}
    return {name: one - other for name, (one, other) in exact.items()}
