"""Sums kept per unit of the data stream: any number of processes, in any order, gives the same numbers to the bit.

A unit is a fixed piece of the data (a file, a row group). Integers can be added in any order; floats are kept per
unit and added in one fixed order, a binary tree over the units' numbers, whoever computed them.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.metrics.accuracy import PairedAccuracy

Arrays = dict[str, NDArray[np.generic]]


class UnitSums:
    """The paired sums of every unit that this process has worked on.

    Args:
        units: Number of units of the whole data set.
        make: Makes an empty metric.
    """

    def __init__(self, units: int, make: Callable[[], PairedAccuracy]) -> None:
        self.units = units
        self._make = make
        self._open: dict[int, PairedAccuracy] = {}
        self._integers: Arrays = {}
        self._floats: dict[int, Arrays] = {}

    def open(self, unit: int) -> PairedAccuracy:
        """Return the metric that collects `unit`'s images.

        Raises:
            RunError: The unit is finished already, or there is no such unit.
        """
        if unit in self._floats or not 0 <= unit < self.units:
            raise RunError(f"unit {unit} of {self.units} was sent twice; its images would be counted double")
        if unit not in self._open:
            self._open[unit] = self._make()
        return self._open[unit]

    def close(self, unit: int) -> Arrays:
        """Finish `unit` and return its sums; of all finished units only their floats are kept apart."""
        sums = self.open(unit).to_arrays()
        del self._open[unit]
        integers, self._floats[unit] = _by_type(sums)
        for name, array in integers.items():
            self._integers[name] = np.add(self._integers.get(name, 0), array)
        return sums

    def stacked(self) -> Arrays:
        """Return what all processes must add up: integer sums, float sums `[units, ...]`, and `finished` `[units]`.

        Every entry of the float arrays and of `finished` is filled by one process and 0 in all others, so their sum
        over processes is exact.

        Raises:
            RunError: A unit was begun and not finished.
        """
        if self._open:
            raise RunError(f"units {sorted(self._open)} ended before their last batch; the data stream broke off")
        integers, floats = _by_type(self._make().to_arrays())
        arrays: Arrays = {name: np.asarray(self._integers.get(name, zero)) for name, zero in integers.items()}
        arrays["finished"] = np.zeros(self.units, dtype=np.int64)
        arrays |= {name: np.zeros((self.units, *zero.shape)) for name, zero in floats.items()}
        for unit, sums in self._floats.items():
            arrays["finished"][unit] = 1
            for name, array in sums.items():
                arrays[name][unit] = array
        return arrays

    def merged(self, stacked: Mapping[str, NDArray[np.generic]]) -> PairedAccuracy:
        """Return the metric of the whole data set from `stacked` arrays added over all processes.

        Raises:
            RunError: A unit is missing, or was counted more than once.
        """
        _check_finished(stacked["finished"])
        empty = self._make().to_arrays()
        sums = {
            name: tree_sum(array) if np.issubdtype(array.dtype, np.floating) else array
            for name, array in stacked.items()
            if name != "finished"
        }
        return type(self._make()).from_arrays({"classes": empty["classes"], **sums})


def _by_type(sums: Arrays) -> tuple[Arrays, Arrays]:
    """Split a metric's sums into integers, which add up in any order, and floats, which do not."""
    floats = {name: array for name, array in sums.items() if np.issubdtype(array.dtype, np.floating)}
    integers = {name: array for name, array in sums.items() if name not in floats and name != "classes"}
    return integers, floats


def tree_sum(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Add `[units, ...]` over units in a fixed binary tree: neighbours first, then pairs of neighbours, and so on."""
    level = values if len(values) else np.zeros((1, *values.shape[1:]), dtype=values.dtype)
    while len(level) > 1:
        if len(level) % 2:
            level = np.concatenate([level, np.zeros_like(level[:1])])
        level = level[0::2] + level[1::2]  # type: ignore[operator]  # floats
    return np.asarray(level[0])


def _check_finished(finished: NDArray[np.generic]) -> None:
    missing = np.flatnonzero(finished == 0).tolist()
    double = np.flatnonzero(finished > 1).tolist()  # type: ignore[operator]  # integers
    if missing or double:
        raise RunError(
            f"not every unit of the data was counted exactly once: {len(missing)} missing {missing[:10]}, "
            f"{len(double)} counted double {double[:10]}"
        )
