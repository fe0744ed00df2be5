"""What every kind of per-head statistic has in common: it observes layers, and adds its units up in a fixed order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.backbone.facts import LayerFacts
from headprobe.backbone.heads import HeadLayout
from headprobe.backbone.layer_record import LayerRecord
from headprobe.errors import RunError
from headprobe.metrics.unit_tree import UnitTree
from headprobe.statistics.threads import one_thread

T = TypeVar("T")

Arrays = dict[str, NDArray[np.generic]]

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


Part = dict[str, Any]
"""The metrics of one piece of the data, by name: each has `merge`, `to_arrays` and `from_arrays`."""

NodeKey = tuple[int, int, int]
"""Number of the tree, level and index: what is sent from process to process."""


class HeadStatistic(ABC):
    """One kind of statistic of every head.

    `begin` makes room, `observe` is called for each layer of each forward pass, `close` ends a unit. Units are added up
    in fixed binary trees, so that the result does not depend on which process saw which unit. `nodes` and `add_node`
    carry finished units between processes.
    """

    subject: Subject

    def begin(self, subject: Subject) -> None:
        """Forget everything and make room for the sums of a model.

        Raises:
            UsageError: The statistic's options do not suit the model.
        """
        self.subject = subject
        self._open: dict[int, Part] = {}
        self._trees = [UnitTree(leaves, _merge_parts) for leaves in self.leaves_per_tree()]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the statistic's name and options as plain data, for a run's record and key."""

    @abstractmethod
    def observe(self, seen: Seen) -> None:
        """Add one layer of one forward pass. Keeps nothing of it but sums."""

    @abstractmethod
    def make_part(self) -> Part:
        """Make the empty metrics of one piece of the data."""

    def leaves_per_tree(self) -> list[int]:
        """Return how many pieces of the data each tree adds up: all units in one tree, if not said otherwise."""
        return [self.subject.units]

    def place_of(self, leaf: int) -> tuple[int, int]:
        """Return the tree that a piece belongs to, and its number there."""
        return 0, leaf

    def leaves_of(self, unit: int) -> range:
        """Return the pieces that a unit is made of: itself, if not said otherwise."""
        return range(unit, unit + 1)

    def part(self, leaf: int) -> Part:
        """Return the open metrics of a piece of the data."""
        if leaf not in self._open:
            self._open[leaf] = {name: metric.to(self.subject.device) for name, metric in self.make_part().items()}
        return self._open[leaf]

    def close(self, unit: int) -> None:
        """End a unit after its last batch; a unit without images is closed too."""
        with one_thread():
            for leaf in self.leaves_of(unit):
                part = {name: metric.to("cpu") for name, metric in self.part(leaf).items()}
                del self._open[leaf]
                tree, number = self.place_of(leaf)
                self._trees[tree].add(number, part)

    @property
    def nodes(self) -> dict[NodeKey, Part]:
        """The sums of finished units, merged as far as they are neighbours."""
        return {
            (number, level, index): part
            for number, tree in enumerate(self._trees)
            for (level, index), part in tree.nodes.items()
        }

    def add_node(self, key: NodeKey, arrays: Mapping[str, Arrays]) -> None:
        """Add what another process has summed, as the arrays of its metrics by name."""
        tree, level, index = key
        part = {name: metric.from_arrays(arrays[name]) for name, metric in self.make_part().items()}
        self._trees[tree].add_node((level, index), part)

    def whole(self, tree: int = 0) -> Part:
        """Return the metrics of all of a tree's pieces.

        Raises:
            RunError: Units are missing, or still open.
        """
        if self._open:
            raise RunError(f"pieces {sorted(self._open)} of the data ended before their last batch")
        return self._trees[tree].whole() or self.make_part()


def _merge_parts(one: Part, other: Part) -> None:
    for name, metric in one.items():
        metric.merge(other[name])


def differences(masked: Mapping[str, Tensor], baseline: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Return masked minus baseline by name, in float64: the same numbers as those that are summed."""
    exact = {name: [value.to(device, torch.float64) for value in (masked[name], baseline[name])] for name in baseline}
    return {name: one - other for name, (one, other) in exact.items()}
