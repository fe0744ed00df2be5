"""A dataset fitted to a model: which rows each unit gives, and how many worker processes read them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from headprobe.data.decode import ImageReader
from headprobe.data.labels.numbering import Numbering
from headprobe.data.sources.source import Source
from headprobe.data.stream import UnitStream
from headprobe.errors import UsageError

MOST_WORKERS = 8  # decoding is 3 ms an image: 8 processes outrun all but the smallest models on the fastest GPUs


FEW_IMAGES = 2000  # read in seconds: starting processes would take longer


@dataclass(frozen=True)
class FittedData:
    """A source with the model's transform and class numbering.

    Attributes:
        source: The dataset.
        reader: Decodes an image for the model.
        numbering: Maps a label to the model's class.
        max_images: How many images to read, None for all.
        batch_size: Images per batch.
    """

    source: Source
    reader: ImageReader
    numbering: Numbering
    max_images: int | None
    batch_size: int

    @property
    def shares(self) -> list[int] | None:
        """Rows to read of each unit, None for all; where sizes are unknown, as if each unit had enough rows."""
        if self.max_images is None:
            return None
        sizes = self.source.unit_sizes
        return even_shares(sizes if sizes is not None else [self.max_images] * self.source.units, self.max_images)

    @property
    def unit_sizes(self) -> list[int] | None:
        """Rows that each unit gives, None where only reading the data would show them."""
        return self.source.unit_sizes if self.source.unit_sizes is None or self.max_images is None else self.shares

    @property
    def images(self) -> int | None:
        """Rows that all units give, None where only reading the data would show them."""
        if self.max_images is None:
            return self.source.images
        return sum(self.unit_sizes) if self.unit_sizes is not None else None

    def stream(self, todo: Sequence[int] | None = None, process: int = 0, processes: int = 1) -> UnitStream:
        """Return the batches of one process of several, for the units of `todo` (None: all of them).

        Raises:
            UsageError: `todo` names a unit that is not there.
        """
        todo = range(self.source.units) if todo is None else todo
        for unit in todo:
            if not 0 <= unit < self.source.units:
                raise UsageError(f"units must be in 0..{self.source.units - 1}, got {unit}")
        return UnitStream(
            self.source,
            self.reader,
            self.numbering,
            batch_size=self.batch_size,
            todo=todo,
            shares=self.shares,
            process=process,
            processes=processes,
        )


def even_shares(sizes: Sequence[int], images: int) -> list[int]:
    """Share `images` evenly among units of these sizes; what a small unit cannot give, larger ones do.

    The shares add up to `images`, or to all rows where there are fewer.
    """
    shares = [0] * len(sizes)
    smallest_first = sorted(range(len(sizes)), key=lambda unit: (sizes[unit], unit))
    for done, unit in enumerate(smallest_first):
        units_left = len(sizes) - done
        shares[unit] = min(sizes[unit], images // units_left)
        images -= shares[unit]
    return shares


def default_workers(units: int, images: int | None, processes: int, local_processes: int) -> int:
    """Choose how many worker processes read for one process of a run.

    Never more than its units or its share of the machine's cores, less one for itself; none for a small dataset.

    Args:
        units: Units of the dataset.
        images: Images of the dataset, None where nobody knows.
        processes: Processes of the run.
        local_processes: Processes of the run on this machine.
    """
    if images is not None and images <= FEW_IMAGES:
        return 0
    # macOS and Windows do not say which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_units = -(-units // processes)
    return max(0, min(MOST_WORKERS, cores // local_processes - 1, own_units))
