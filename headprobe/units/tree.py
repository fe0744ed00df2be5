"""Sums of finished units, merged in one fixed order: a binary tree over the units' numbers.

The same sums are merged in the same pairs, whichever process computed a unit and whenever: first neighbours, then pairs
of neighbours, and so on. So floats are equal to the last bit. Neighbours merge as soon as both are finished, so only a
few sums are kept, whatever the number of units. Processes send each other nodes of the tree, and a file of the unit
store holds one.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.text import ranges

Arrays = dict[str, NDArray[np.generic]]


class Sums(Protocol):
    """A metric that can be kept by unit; those of `headprobe.metrics` can."""

    def merge(self, other: Any) -> None:
        """Add the sums of other images."""

    def to_arrays(self) -> Arrays:
        """Return everything as arrays."""

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Any:
        """Return the metric that `to_arrays` was called on; refuse another metric's arrays with a ValueError."""

    def to(self, device: Any) -> Self:
        """Move the sums to a device."""


NamedSums = dict[str, Any]
"""The sums of some units, by name. Each value is a `Sums`, or a `Coverage`, which has no device."""


def merge_sums(one: NamedSums, other: NamedSums) -> None:
    """Add the sums of other units to the first; take over what only the others have."""
    for name, metric in other.items():
        if name in one:
            one[name].merge(metric)
        else:
            one[name] = metric


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and BLAS compute on one thread while the context is open: for sums that are many small matrices.

    Threads wait for each other after each small matrix: on two shared cores this took sixty times as long as the work.
    """
    # not at module level: `status` reads units without torch, and benchmarks/gpu.sh runs without threadpoolctl
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


def write_sums(sums: NamedSums, file: IO[bytes]) -> None:
    """Write the arrays of metrics as an npz file, each under `metric/array`."""
    # Not numpy's savez: after an error, such as a full disk, older releases leave the archive open.
    with zipfile.ZipFile(file, "w") as archive:
        for name, metric in sums.items():
            for key, array in metric.to_arrays().items():
                with archive.open(f"{name}/{key}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)


def read_sums(file: IO[bytes], names: str | tuple[str, ...] = "") -> dict[str, Arrays]:
    """Return the arrays that `write_sums` was given, by metric and array.

    Args:
        file: The npz file.
        names: Read only the metrics with names that begin like this, or like one of these.

    Raises:
        ValueError: The content is no such file (or zipfile.BadZipFile, OSError, EOFError, zlib.error, KeyError).
    """
    found: dict[str, Arrays] = {}
    with np.load(file, allow_pickle=False) as arrays:
        for entry in arrays.files:
            name, _, key = entry.rpartition("/")
            if name.startswith(names):
                found.setdefault(name, {})[key] = arrays[entry]
    return found


M = TypeVar("M")

Node = tuple[int, int]
"""Level and index: the metric of units `index * 2**level` up to, but without, `(index + 1) * 2**level`."""


class UnitTree(Generic[M]):
    """The metrics of the units finished so far.

    Args:
        units: Number of units of the whole data set.
        merge: Adds its second metric to its first.
    """

    def __init__(self, units: int, merge: Callable[[M, M], None]) -> None:
        self.units = units
        self._merge = merge
        self._nodes: dict[Node, M] = {}

    @property
    def nodes(self) -> Mapping[Node, M]:
        """The metrics whose neighbour is not finished; a whole tree has one."""
        return self._nodes

    def add(self, unit: int, metric: M) -> None:
        """Add the metric of a finished unit.

        Raises:
            RunError: There is no such unit, or it was added before.
        """
        self.add_node((0, unit), metric)

    def add_node(self, node: Node, metric: M) -> None:
        """Add the metric of a finished unit, or of neighbours that another process has merged.

        Raises:
            RunError: There is no such unit, or one of them was added before.
        """
        level, index = node
        units = units_of(node, self.units)
        if not 0 <= units.start < units.stop:
            raise RunError(
                f"unit {units.start} of {self.units} is none of the data set's; its images must not be counted"
            )
        twice = [other for other in self._nodes if _overlap(node, other)]
        if twice:
            first, last = units.start, units.stop - 1
            raise RunError(f"units {first} to {last} of {self.units} were sent twice; images would count double")
        # Node `index ^ 1` is the neighbour: 0 and 1 are a pair, 2 and 3 are one. Their sum is node `index >> 1` above.
        while (level, index ^ 1) in self._nodes or self._alone(level, index):
            neighbour = self._nodes.pop((level, index ^ 1), None)
            if neighbour is not None:
                left, right = (neighbour, metric) if index & 1 else (metric, neighbour)
                self._merge(left, right)
                metric = left
            level, index = level + 1, index >> 1
        self._nodes[level, index] = metric

    def holds(self, unit: int) -> bool:
        """Return whether a unit is finished."""
        return any(index == unit >> level for level, index in self._nodes)

    def whole(self) -> M | None:
        """Return the metric of all units, None where the data set has no unit.

        Raises:
            RunError: Units are missing.
        """
        if not self.units:
            return None
        found = sum(len(units_of(node, self.units)) for node in self._nodes)
        if found < self.units:
            missing = [unit for unit in range(self.units) if not self.holds(unit)]
            raise RunError(f"{len(missing)} of {self.units} units of the data were not counted: {ranges(missing)}")
        (metric,) = self._nodes.values()
        return metric

    def _alone(self, level: int, index: int) -> bool:
        """Return whether a node's neighbour lies behind the last unit, so that it moves up as it is."""
        return index > 0 and not index & 1 and (index + 1) << level >= self.units


def _overlap(one: Node, other: Node) -> bool:
    """Return whether two nodes hold a common unit."""
    low, high = sorted((one, other))
    return high[1] == low[1] >> (high[0] - low[0])


def units_of(node: Node, units: int) -> range:
    """Return the units of a node, of `units` in all; a node behind the last unit has none."""
    level, index = node
    return range(index << level, min((index + 1) << level, units))


# -- nodes as files ----------------------------------------------------------------------------------------------------

Span = tuple[int, int]
"""The first and the last unit of a file."""


_NAME = re.compile(r"units-(\d{5,})-(\d{5,})\.npz")


def unit_files(directory: Path) -> dict[Span, Path]:
    """Return the files of finished units."""
    files: dict[Span, Path] = {}
    for path in directory.glob("units-*.npz"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            files[int(match[1]), int(match[2])] = path
    return files


def file_of(span: Span) -> str:
    """Return the name of the file of neighbouring units."""
    return f"units-{span[0]:05d}-{span[1]:05d}.npz"


def span_of(node: Node, units: int) -> Span:
    """Return the first and the last unit of a node of the unit tree."""
    found = units_of(node, units)
    return found.start, found.stop - 1


def node_of(span: Span, units: int) -> Node:
    """Return the lowest node of the unit tree that holds exactly these units.

    Raises:
        ValueError: There is none.
    """
    level = max(0, (span[1] - span[0]).bit_length())
    node = level, span[0] >> level
    if span_of(node, units) != span:
        raise ValueError(f"units {span[0]} to {span[1]} are no node of {units} units")
    return node


def within(inner: Span, outer: Span) -> bool:
    """Return whether another file holds all units of a file, and more."""
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
