"""Batches, and their stream: which units a process reads, what each unit gives, and how a dataset fits a model."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from headprobe.data.decode import ImageError, ImageReader
from headprobe.data.labels.numbering import LabelError, Numbering
from headprobe.data.sources.source import Chunk, Source
from headprobe.errors import RunError, UsageError


@dataclass(frozen=True)
class BadImage:
    """A row that could not be decoded or labelled.

    Attributes:
        unit: Number of its unit.
        row: Its number in the unit, from 0.
        source: The file (and the rows in it) that it is from.
        reason: What is wrong with it, for the user.
    """

    unit: int
    row: int
    source: str
    reason: str


@dataclass
class ImageBatch:
    """Rows of exactly one unit, in order; it may hold no image (an empty unit, or only bad rows).

    Attributes:
        images: uint8 `[images, channels, height, width]`, not normalised.
        labels: int64 `[images]`, in the model's class numbering.
        unit: Number of the unit, or -1 for a training batch, which mixes units.
        rows: int64 `[images]`, row number inside the unit.
        last: True on exactly one batch of each unit, its last one.
        bad: Rows of this batch that are not in `images`.
        failure: Why the unit cannot be read any further, None if all is well. No batch follows it from that worker.
        name: The file (and the rows in it) that the unit is read from, for messages.
    """

    images: Tensor
    labels: Tensor
    unit: int
    rows: Tensor
    last: bool
    bad: list[BadImage] = field(default_factory=list)
    failure: str | None = None
    name: str = ""

    # Lightning and DataLoader look for these two methods; without them Lightning would walk through the frozen
    # BadImages field by field and refuse.
    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Return the batch with its images and labels on `device`; the row numbers stay on the CPU."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory, from which a GPU can copy while it computes."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class UnitStream(IterableDataset[ImageBatch]):
    """Batches of the units that one process reads, each image once over all processes and workers.

    Each process takes an equal run of neighbouring units, so that their sums can be merged as soon as they are there.
    Its worker k takes every workers-th of these from the k-th on.

    The stream has no length: with workers, Lightning would stop after that many batches, partial ones included, and
    lose images.

    Args:
        source: The dataset.
        reader: Decodes an image.
        numbering: Maps a label to the model's class.
        batch_size: Images per batch; batches never cross a unit.
        todo: Units to read, in order.
        shares: Rows to take from each unit, None for all.
        process: Number of this process.
        processes: Number of processes.
    """

    def __init__(
        self,
        source: Source,
        reader: ImageReader,
        numbering: Numbering,
        *,
        batch_size: int,
        todo: Sequence[int],
        shares: Sequence[int] | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.source = source
        self.reader = reader
        self.numbering = numbering
        self.batch_size = batch_size
        self.shares = shares
        first, stop = (len(todo) * end // processes for end in (process, process + 1))
        self.units = list(todo)[first:stop]

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield the batches of this process, or of this worker of it."""
        worker = get_worker_info()
        units = self.units if worker is None else self.units[worker.id :: worker.num_workers]
        for unit in units:
            # An error inside a worker would reach the user as a traceback without the file's name, and on one
            # process only, so it travels as data and the module decides.
            try:
                yield from self._unit(unit)
            except RunError as error:
                yield self._failed(unit, str(error))
                return

    def _unit(self, unit: int) -> Iterator[ImageBatch]:
        """Yield the batches of a unit; one chunk is read ahead to know which is the last."""
        first = 0
        chunks = self._limited(unit)
        chunk = next(chunks, None)
        if chunk is None:
            yield self._batch(unit, first, Chunk([], [], []), last=True)
        while chunk is not None:
            following = next(chunks, None)
            yield self._batch(unit, first, chunk, last=following is None)
            first += len(chunk.images)
            chunk = following

    def _limited(self, unit: int) -> Iterator[Chunk]:
        """Read the unit's share of rows."""
        if self.shares is None:
            yield from self.source.chunks(unit, self.batch_size)
            return

        left = self.shares[unit]
        if not left:
            return
        for chunk in self.source.chunks(unit, self.batch_size):
            yield Chunk(chunk.images[:left], chunk.labels[:left], chunk.sources[:left])
            left -= len(chunk.images)
            if left <= 0:
                return

    def _batch(self, unit: int, first: int, chunk: Chunk, last: bool) -> ImageBatch:
        """Decode a chunk that begins at row `first` of its unit."""
        images: list[Tensor] = []
        labels: list[int] = []
        rows: list[int] = []
        bad: list[BadImage] = []
        for index, (cell, label, source) in enumerate(zip(chunk.images, chunk.labels, chunk.sources, strict=True)):
            row = first + index
            try:
                model_class = self.numbering(label)
                images.append(self.reader(cell))
            except (ImageError, LabelError) as error:
                bad.append(BadImage(unit, row, source, str(error)))
                continue
            labels.append(model_class)
            rows.append(row)

        stacked = torch.stack(images) if images else self.reader.empty()
        return ImageBatch(stacked, _int64(labels), unit, _int64(rows), last, bad, name=self.source.unit_name(unit))

    def _failed(self, unit: int, failure: str) -> ImageBatch:
        return ImageBatch(self.reader.empty(), _int64([]), unit, _int64([]), last=False, failure=failure)


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# -- a dataset fitted to a model ---------------------------------------------------------------------------------------


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
