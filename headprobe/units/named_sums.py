"""The sums of a piece of the data, by name: added to other pieces' sums, written and read back as arrays."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Arrays = dict[str, NDArray[np.generic]]


class Sums(Protocol):
    """What a metric must do to be kept by unit: `headprobe.metrics` has the metrics that do."""

    def merge(self, other: Any) -> None:
        """Add the sums of other images."""

    def to_arrays(self) -> Arrays:
        """Return everything as arrays."""

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Any:
        """Return the metric that `to_arrays` was called on; refuse another metric's arrays with a ValueError."""

    def to(self, device: Any) -> Self:
        """Move the sums to a device."""


NamedSums = dict[str, Any]
"""The sums of one piece of the data, by name. Each value is a `Sums`, or a `Coverage`, which has no device."""


def merge_sums(one: NamedSums, other: NamedSums) -> None:
    """Add the sums of another piece to the first; take over what only the other has."""
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


def write_sums(sums: NamedSums, file: IO[bytes]) -> None:
    """Write the arrays of metrics as an npz file, each under `metric/array`."""
    # Not numpy's savez: older releases leave the archive open and complain later, when the disk is full.
    with zipfile.ZipFile(file, "w") as archive:
        for name, metric in sums.items():
            for key, array in metric.to_arrays().items():
                with archive.open(f"{name}/{key}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)


def read_sums(file: IO[bytes], names: str = "") -> dict[str, Arrays]:
    """Return the arrays that `write_sums` was given, by metric and array.

    Args:
        file: The npz file.
        names: Read only the metrics with names that begin like this.

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
