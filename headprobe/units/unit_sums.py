"""The sums of all units of the data: equal to the bit for any number of processes and any order of units.

A unit is a fixed piece of the data (a file, a row group). While its batches come, the unit is open: its scores, the
sums of every statistic and the rows that came are here and nowhere else. After its last batch they are merged with
neighbours in a fixed binary tree, sent to the first process, stored, and read back, always together.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.processes import broadcast_from, gather_lists
from headprobe.units.coverage import COVERAGE, SCORES, BadRow, Coverage, OpenRows
from headprobe.units.tree import (
    Arrays,
    NamedSums,
    Node,
    Sums,
    UnitTree,
    merge_sums,
    one_thread,
    read_sums,
    units_of,
    write_sums,
)


class Statistic(Protocol):
    """A statistic that gives sums for every unit: `headprobe.describe` has them."""

    @property
    def name(self) -> str:
        """Its name among other statistics."""

    def open(self, unit: int) -> NamedSums:
        """Return empty sums for a unit."""

    def close(self, unit: int, sums: NamedSums) -> NamedSums:
        """End a unit after its last batch and return its sums, on the CPU."""

    def empty(self, name: str) -> Sums:
        """Return empty sums of this name, one of those that `close` gives."""

    def finish(self, whole: NamedSums) -> None:
        """Take the sums over all units."""


@dataclass
class OpenUnit:
    """A unit between its first and its last batch.

    Attributes:
        scores: Sums of its scores.
        statistics: Sums of every statistic, by the statistic's name.
        rows: The rows that came.
    """

    scores: Any
    statistics: dict[str, NamedSums]
    rows: OpenRows = field(default_factory=OpenRows)


class UnitSums:
    """The units that this process has worked on, and those taken over from other processes or an earlier run.

    Args:
        units: Number of units of the whole data set.
        make_scores: Makes empty scores.
        rows: Row numbers of each unit, None where they are known only after reading the data.
        statistics: The statistics that give sums too.
    """

    def __init__(
        self,
        units: int,
        make_scores: Callable[[], Any],
        rows: Sequence[Sequence[int]] | None = None,
        statistics: Sequence[Statistic] = (),
    ) -> None:
        self.units, self.statistics = units, tuple(statistics)
        self._make_scores, self._rows = make_scores, rows
        self._open: dict[int, OpenUnit] = {}
        self._tree: UnitTree[NamedSums] = UnitTree(units, merge_sums)

    def open(self, unit: int, rows: Sequence[int], bad: Sequence[BadRow], name: str) -> OpenUnit:
        """Note the rows of a batch and return the open unit that takes its images.

        Args:
            unit: The unit that the batch belongs to.
            rows: Rows of its images.
            bad: Its rows that could not be used.
            name: The unit's name in messages.

        Raises:
            RunError: There is no such unit, it is finished already, or a row came before.
        """
        if not 0 <= unit < self.units or self._tree.holds(unit):
            raise RunError(f"unit {unit} of {self.units} was sent twice; its images would be counted double")
        if unit not in self._open:
            statistics = {statistic.name: statistic.open(unit) for statistic in self.statistics}
            self._open[unit] = OpenUnit(self._make_scores(), statistics)
        opened = self._open[unit]
        opened.rows.add(rows, bad, name)
        return opened

    def close(self, unit: int, budget: int, name: str) -> None:
        """Finish a unit after its last batch; a unit without images is finished too.

        Raises:
            RunError: It did not give all its rows.
        """
        opened = self._open[unit]
        expected = self._rows[unit] if self._rows is not None else None
        sums: NamedSums = {
            COVERAGE: opened.rows.close(unit, expected, budget, name),
            SCORES: opened.scores.to("cpu"),
        }

        with self._adding():
            for statistic in self.statistics:
                closed = statistic.close(unit, opened.statistics[statistic.name])
                sums |= {f"{statistic.name}/{own}": metric for own, metric in closed.items()}
            del self._open[unit]
            self._tree.add(unit, sums)

    @property
    def nodes(self) -> Mapping[Node, NamedSums]:
        """The sums of finished units, merged as far as they are neighbours."""
        return self._tree.nodes

    def add_node(self, node: Node, arrays: Mapping[str, Arrays]) -> None:
        """Take over finished units, as the arrays of their metrics by name.

        Raises:
            RunError: Units are there already, or the arrays belong to other units.
            ValueError: The arrays are not those of this run's metrics.
        """
        sums: NamedSums = {name: self._metric(name, of_metric) for name, of_metric in arrays.items()}
        if not sums.keys() >= {COVERAGE, SCORES}:
            raise ValueError(f"a unit must have {COVERAGE} and {SCORES}, got {', '.join(sums) or 'nothing'}")
        wanted = units_of(node, self.units)
        if sorted(sums[COVERAGE].rows) != list(wanted):
            raise ValueError(f"units {wanted.start} to {wanted.stop - 1} must be there, got others")
        with self._adding():
            self._tree.add_node(node, sums)

    def _adding(self) -> AbstractContextManager[None]:
        """Return the context to add sums in: one thread for statistics, whose sums are many small matrices."""
        return one_thread() if self.statistics else nullcontext()

    def _metric(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
        """Return the metric of this name with the sums of `arrays`."""
        if name == COVERAGE:
            return Coverage.from_arrays(arrays)
        if name == SCORES:
            return self._make_scores().from_arrays(arrays)
        owner, _, own = name.partition("/")
        statistic = next((one for one in self.statistics if one.name == owner), None)
        if statistic is None:
            raise ValueError(f"the metrics must be those of {[one.name for one in self.statistics]}, got {name}")
        return statistic.empty(own).from_arrays(arrays)

    def whole(self) -> NamedSums:
        """Return the sums of the whole data set, and give each statistic its own.

        Raises:
            RunError: Units are missing or were never finished.
        """
        if self._open:
            raise RunError(f"units {sorted(self._open)} ended before their last batch; the data stream broke off")
        sums = self._tree.whole() or {COVERAGE: Coverage(), SCORES: self._make_scores()}
        for statistic in self.statistics:
            prefix = f"{statistic.name}/"
            own: NamedSums = {}
            for name, metric in sums.items():
                if name.startswith(prefix):
                    own[name.removeprefix(prefix)] = metric
            statistic.finish(own)
        return sums


def gather_nodes(trainer: lightning.Trainer, sums: UnitSums) -> None:
    """Bring the units that other processes have finished to process 0, a few at a time. A collective."""
    if trainer.world_size == 1:
        return
    nodes = dict(sums.nodes)
    for rank, level, index in gather_lists(trainer, [[trainer.global_rank, *node] for node in nodes]):
        if rank == 0:
            continue
        file = io.BytesIO()
        if rank == trainer.global_rank:
            write_sums(nodes[level, index], file)
        content = broadcast_from(trainer, file.getvalue(), rank, wanted=trainer.is_global_zero)
        if trainer.is_global_zero:
            sums.add_node((level, index), read_sums(io.BytesIO(content)))
