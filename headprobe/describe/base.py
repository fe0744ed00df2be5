"""What every statistic of heads has in common: its sums over images, and the numbers that follow from them.

A new statistic is a metric in `headprobe.metrics`, a subclass of `HeadStatistic` in a file beside this one, and a
subclass of `HeadCallback` with a line in the list `DESCRIBING` of `headprobe.callbacks.describing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.errors import RunError
from headprobe.masks.spec import NONE
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.units.tree import Arrays, NamedSums

T = TypeVar("T")

Undefined = dict[str, dict[str, list[int]]]
"""Statistics that some layers do not have: by name and reason the layers."""


class Role(StrEnum):
    """Which model's numbers they are; sums and results are dicts by role."""

    BASELINE = "baseline"  #: the whole model's
    MASKED = "masked"  #: the masked model's, on the same images
    CHANGE = "change"  #: masked minus baseline, paired image by image


@dataclass(frozen=True)
class Subject:
    """The model that is described.

    Attributes:
        layout: Its attention layers.
        facts: What the metrics need from each layer.
        units: Units of the data set.
        mask: Name of the mask that is described beside the baseline; None where there is none.
        device: Where sums are kept while a unit is open; a device with float64.
    """

    layout: HeadLayout
    facts: tuple[LayerFacts, ...]
    units: int
    mask: str | None = None
    device: torch.device | str = "cpu"

    @property
    def models(self) -> tuple[Role, ...]:
        """The baseline, and the masked model if there is a mask."""
        return (Role.BASELINE,) if self.mask is None else (Role.BASELINE, Role.MASKED)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models, and their change where there are two."""
        return (Role.BASELINE,) if self.mask is None else (Role.BASELINE, Role.MASKED, Role.CHANGE)

    def mask_of(self, role: str) -> str:
        """Return what the column `mask` of a file holds; in files of changes it names the mask that made them."""
        return NONE if role == Role.BASELINE or self.mask is None else self.mask


def prefixed(role: str, name: str) -> str:
    """Return the name of an array in a file: `svcca` of the baseline, `masked_svcca` and `change_svcca`."""
    return name if role == Role.BASELINE else f"{role}_{name}"


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
        """Return the result of `describe` for each model's record; a record that both models share is used once."""
        first, *others = self.records
        found = [describe(first)]
        for record in others:
            found.append(found[0] if record is first else describe(record))
        return found


@dataclass(frozen=True)
class Judged:
    """A batch of images after all its forward passes.

    Attributes:
        unit: The unit that the images belong to.
        rows: `[images]`, their rows inside the unit.
        images: uint8 `[images, channels, height, width]`, as the model saw them but for the normalisation.
        labels: `[images]`, in the model's numbering.
        logits: Of the whole model, `[images, classes]`.
        classes: Number in the model of each of these classes, None where they are all of the model's.
        sources: The file (and the rows in it) that each image is from; none where that is unknown.
    """

    unit: int
    rows: Tensor
    images: Tensor
    labels: Tensor
    logits: Tensor
    classes: Tensor | None
    sources: Sequence[str]


class HeadStatistic(ABC):
    """One kind of statistic of every head.

    It keeps its options and, at the end, the sums over all units; the sums of open units are in
    `headprobe.units.unit_sums`. `begin` fits it to a model. `open` makes room for a unit, `observe` adds one layer of
    one forward pass to it and `judged` a whole batch, `close` ends it, and `finish` takes the sums over all units.
    After that the numbers are read on the first process: `columns`, and whatever else there is.
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

    # -- sums ------------------------------------------------------------------------------------------------------

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
    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Add one layer of one forward pass to the sums of its unit."""

    def judged(self, batch: Judged, sums: NamedSums) -> None:
        """Add what is known of a batch once it was judged; nothing by default."""
        return

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

    # -- numbers ---------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, Arrays]:
        """Return columns of `heads.csv` (of the baseline and the masked model) and `heads_change.csv` (of the change).

        A column has an entry for every head, in the order of (layer, head), NaN where it is not defined. `NAME_se`
        holds the standard errors of `NAME`. Each column gets TensorBoard curves and a figure by layer, which
        `headprobe.report.run_figures` may give a better title, or leave out.
        """
        return {}

    def csv_files(self) -> dict[str, Arrays]:
        """Return further tables by file name; one without rows is not written."""
        return {}

    def npz_files(self) -> dict[str, Arrays]:
        """Return further arrays by file name; a file without arrays is not written."""
        return {}

    def undefined(self) -> Undefined:
        """Return why cells are empty, for `run.json`."""
        return {}

    def summary(self) -> dict[str, ArrayLike]:
        """Return one number per layer of the baseline for the table on the terminal, by heading."""
        return {}

    def note(self) -> str:
        """Return a line for the terminal about what the numbers were taken over; empty for none."""
        return ""


def differences(masked: Mapping[str, Tensor], baseline: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Return masked minus baseline by name, in float64: of the same numbers that are summed."""
    found = {}
    for name in baseline:
        one, other = (values[name].to(device, torch.float64) for values in (masked, baseline))
        found[name] = one - other
    return found


def by_reason(layers: Sequence[Mapping[str, str]]) -> Undefined:
    """Return by statistic and reason the layers, from each layer's reasons by statistic."""
    found: Undefined = {}
    for layer, reasons in enumerate(layers):
        for name, reason in reasons.items():
            found.setdefault(name, {}).setdefault(reason, []).append(layer)
    return found


def by_layer_mean(layer: IntArray, values: FloatArray) -> FloatArray:
    """Return `[layers]`, the mean over each layer's heads, leaving out NaN.

    Args:
        layer: `[heads of the model]`, the number of each head's layer.
        values: `[heads of the model]`.
    """
    finite = np.isfinite(values)
    layers = int(layer.max()) + 1
    count = np.bincount(layer, finite, minlength=layers)
    total = np.bincount(layer, np.where(finite, values, 0), minlength=layers)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.asarray(mean, dtype=np.float64)
