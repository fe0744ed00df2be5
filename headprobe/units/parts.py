"""The metrics of a piece of the data, by name: added to those of other pieces, written and read back as arrays."""

import zipfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]


Part = dict[str, Any]
"""The metrics of one piece of the data, by name: each has `merge`, `to_arrays` and `from_arrays`."""


def merge_parts(one: Part, other: Part) -> None:
    """Add the metrics of another piece to those of the first; what only the other has is taken over."""
    for name, metric in other.items():
        if name in one:
            one[name].merge(metric)
        else:
            one[name] = metric


def write_part(part: Part, file: IO[bytes]) -> None:
    """Write the arrays of metrics as an npz file, each under `metric/array`."""
    # not numpy's savez, which in older releases leaves the archive open, and complains later, when the disk is full
    with zipfile.ZipFile(file, "w") as archive:
        for name, metric in part.items():
            for key, array in metric.to_arrays().items():
                with archive.open(f"{name}/{key}.npy", "w", force_zip64=True) as place:
                    np.lib.format.write_array(place, np.asarray(array), allow_pickle=False)


def read_part(file: IO[bytes], metrics: str = "") -> dict[str, Arrays]:
    """Return the arrays that `write_part` was given, by metric and name.

    Args:
        file: The npz file.
        metrics: Read only those metrics whose names begin with this.

    Raises:
        ValueError: The content is no such file (or zipfile.BadZipFile, OSError, EOFError, zlib.error, KeyError).
    """
    parts: dict[str, Arrays] = {}
    with np.load(file, allow_pickle=False) as arrays:
        for place in arrays.files:
            name, _, key = place.rpartition("/")
            if name.startswith(metrics):
                parts.setdefault(name, {})[key] = arrays[place]
    return parts
