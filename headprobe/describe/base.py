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
from headprobe.units.tree import NamedSums

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
class Observation:
    """One layer of one forward pass.

    Attributes:
        unit: The unit that the images belong to.
        rows: `[images]`, their rows inside the unit.
        records: The baseline's record and, where a mask is described too, the masked model's. Both are the very same
            object in the layers before the mask's first one, where the masked model is the baseline.
    """

    unit: int
    rows: Tensor
    records: tuple[LayerRecord, ...]

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.records[0].layer

    def each(self, describe: Callable[[LayerRecord], T]) -> list[T]:
        """Return what `describe` makes of each model's record; a record of both models is described once."""
        first, *others = self.records
        found = [describe(first)]
        return found + [found[0] if record is first else describe(record) for record in others]


class HeadStatistic(ABC):
    """One kind of statistic of every head.

    It keeps its options and, at the end, the sums over all units; the sums of open units are in
    `headprobe.units.unit_sums`. `begin` fits it to a model. `open` makes room for a unit, `observe` adds one layer of
    one forward pass to it, `close` ends it, and `finish` takes the sums over all units.
    """

    subject: Subject

    def begin(self, subject: Subject) -> None:
        """Fit the statistic to a model, and forget any earlier one.

        Raises:
            UsageError: The statistic's options do not suit the model.
        """
        self.subject = subject
        self._whole: NamedSums | None = None

    @property
    def name(self) -> str:
        """Its name among other statistics."""
        return str(self.options()["name"])

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the statistic's name and options as plain data, for a run's record."""

    def options_of_sums(self) -> dict[str, Any]:
        """Return the name and those options that change the sums, for a run's key: all of them by default."""
        return self.options()

    @abstractmethod
    def empty_sums(self) -> NamedSums:
        """Make the empty sums of one piece of the data."""

    def empty(self, name: str) -> Any:
        """Return empty sums of this name, one of those that `close` gives.

        Raises:
            ValueError: There are no such sums.
        """
        sums = self.empty_sums()
        if name not in sums:
            raise ValueError(f"the metrics of {self.name} must be {', '.join(sums)}, got {name}")
        return sums[name]

    def open(self, unit: int) -> NamedSums:
        """Return empty sums for a unit, on the subject's device."""
        return {name: metric.to(self.subject.device) for name, metric in self.empty_sums().items()}

    @abstractmethod
    def observe(self, seen: Observation, sums: NamedSums) -> None:
        """Add one layer of one forward pass to the sums of its unit."""

    def close(self, unit: int, sums: NamedSums) -> NamedSums:
        """End a unit after its last batch, or without any image, and return its sums on the CPU."""
        return {name: metric.to("cpu") for name, metric in sums.items()}

    def finish(self, whole: NamedSums) -> None:
        """Take the sums over all units; a data set without units gives empty ones."""
        self._whole = whole or self.empty_sums()

    @property
    def whole(self) -> NamedSums:
        """The sums over the whole data set.

        Raises:
            RunError: They have not been added up.
        """
        if self._whole is None:
            raise RunError(f"the {self.name} statistics were not added up: the test did not end")
        return self._whole


def differences(masked: Mapping[str, Tensor], baseline: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Return masked minus baseline by name, in float64: the same numbers as those that are summed."""
    exact = {name: [value.to(device, torch.float64) for value in (masked[name], baseline[name])] for name in baseline}
    return {name: one - other for name, (one, other) in exact.items()}
