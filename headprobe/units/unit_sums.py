"""The sums of all units of the data stream: any number of processes, in any order, gives the same numbers to the bit.

A unit is a fixed piece of the data (a file, a row group). What a unit gives (scores, statistics, and which rows it was
made of) stays together from its last batch on: merged with its neighbours in a fixed binary tree, sent to the first
process, stored, and read back.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning

from headprobe.describe.base import HeadStatistic
from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.sums import one_thread
from headprobe.processes import broadcast_from, gather_lists
from headprobe.units.coverage import BadRow, Coverage, OpenUnit
from headprobe.units.parts import Arrays, Part, merge_parts, read_part, write_part
from headprobe.units.tree import Node, UnitTree

COVERAGE, SCORES = "coverage", "scores"
"""Names of what every unit gives; those of statistics begin with the statistic's name."""


class UnitBook:
    """The units that this process has worked on, and those that it has taken over from others or from an earlier run.

    Args:
        units: Number of units of the whole data set.
        make_scores: Makes empty scores.
        sizes: Rows of each unit, None where only reading the data would tell.

    Attributes:
        statistics: Who else gives sums; set before the first batch.
    """

    def __init__(
        self, units: int, make_scores: Callable[[], PairedAccuracy], sizes: Sequence[int] | None = None
    ) -> None:
        self.units = units
        self.statistics: tuple[HeadStatistic, ...] = ()
        self._make_scores, self._sizes = make_scores, sizes
        self._open: dict[int, tuple[PairedAccuracy, OpenUnit]] = {}
        self._tree: UnitTree[Part] = UnitTree(units, merge_parts)

    def open(self, unit: int, rows: Sequence[int], bad: Sequence[BadRow], name: str) -> PairedAccuracy:
        """Note the rows of a batch and return the scores that take them.

        Args:
            unit: The unit that the batch belongs to.
            rows: Rows of its images.
            bad: Its rows that could not be used.
            name: What the unit is called in messages.

        Raises:
            RunError: There is no such unit, it is finished already, or a row came before.
        """
        if not 0 <= unit < self.units or self._tree.holds(unit):
            raise RunError(f"unit {unit} of {self.units} was sent twice; its images would be counted double")
        if unit not in self._open:
            self._open[unit] = self._make_scores(), OpenUnit()
        scores, seen = self._open[unit]
        seen.add(rows, bad, name)
        return scores

    def close(self, unit: int, budget: int, name: str) -> None:
        """Finish a unit after its last batch; a unit without images is finished too.

        Raises:
            RunError: It did not give all its rows.
        """
        scores, seen = self._open[unit]
        expected = self._sizes[unit] if self._sizes is not None else None
        part: Part = {COVERAGE: seen.close(unit, expected, budget, name), SCORES: scores.to("cpu")}
        with self._adding():
            for statistic in self.statistics:
                part |= {f"{statistic.name}/{own}": metric for own, metric in statistic.close(unit).items()}
            del self._open[unit]
            self._tree.add(unit, part)

    @property
    def nodes(self) -> Mapping[Node, Part]:
        """The sums of finished units, merged as far as they are neighbours."""
        return self._tree.nodes

    def add_node(self, node: Node, arrays: Mapping[str, Arrays]) -> None:
        """Take over finished units, as the arrays of their metrics by name.

        Raises:
            RunError: Units are there already, or the arrays are those of other units.
            ValueError: The arrays are not those of this run's metrics.
        """
        part: Part = {name: self._metric(name, of_metric) for name, of_metric in arrays.items()}
        if not part.keys() >= {COVERAGE, SCORES}:
            raise ValueError(f"a unit must have {COVERAGE} and {SCORES}, got {', '.join(part) or 'nothing'}")
        level, index = node
        wanted = range(index << level, min((index + 1) << level, self.units))
        if sorted(part[COVERAGE].rows) != list(wanted):
            raise ValueError(f"units {wanted.start} to {wanted.stop - 1} must be there, got others")
        with self._adding():
            self._tree.add_node(node, part)

    def _adding(self) -> AbstractContextManager[None]:
        """Return the context to add sums in: those of statistics are many small matrices."""
        return one_thread() if self.statistics else nullcontext()

    def _metric(self, name: str, arrays: Arrays) -> object:
        if name == COVERAGE:
            return Coverage.from_arrays(arrays)
        if name == SCORES:
            return self._make_scores().from_arrays(arrays)
        owner, _, own = name.partition("/")
        statistic = next((one for one in self.statistics if one.name == owner), None)
        if statistic is None:
            raise ValueError(f"the metrics must be those of {[one.name for one in self.statistics]}, got {name}")
        return statistic.empty(own).from_arrays(arrays)

    def whole(self) -> Part:
        """Return the metrics of the whole data set, and hand the statistics theirs.

        Raises:
            RunError: Units are missing or were never finished.
        """
        if self._open:
            raise RunError(f"units {sorted(self._open)} ended before their last batch; the data stream broke off")
        part = self._tree.whole() or {COVERAGE: Coverage(), SCORES: self._make_scores()}
        for statistic in self.statistics:
            first = f"{statistic.name}/"
            statistic.finish({name.removeprefix(first): part[name] for name in part if name.startswith(first)})
        return part


def gather_nodes(trainer: lightning.Trainer, book: UnitBook) -> None:
    """Bring the units that other processes have finished to process 0, a few at a time."""
    if trainer.world_size == 1:
        return
    nodes = dict(book.nodes)
    for rank, level, index in gather_lists(trainer, [[trainer.global_rank, *node] for node in nodes]):
        if rank == 0:
            continue
        file = io.BytesIO()
        if rank == trainer.global_rank:
            write_part(nodes[level, index], file)
        content = broadcast_from(trainer, file.getvalue(), rank, wanted=trainer.is_global_zero)
        if trainer.is_global_zero:
            book.add_node((level, index), read_part(io.BytesIO(content)))
