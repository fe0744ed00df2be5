"""Batches, and their stream: which units a process reads, what each unit gives, and how a dataset fits a model."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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


Rows = tuple[Sequence[int], Chunk]
"""Rows of a unit as they are read, with their numbers."""


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
        sources: The file (and the rows in it) that each image is from.
    """

    images: Tensor
    labels: Tensor
    unit: int
    rows: Tensor
    last: bool
    bad: list[BadImage] = field(default_factory=list)
    failure: str | None = None
    name: str = ""
    sources: list[str] = field(default_factory=list)

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
        rows: Numbers of the rows to take from each unit, ascending; None for all.
        together: Groups of so many neighbouring rows must not be cut; a single row left over joins the batch before.
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
        rows: Sequence[Sequence[int]] | None = None,
        together: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.source = source
        self.reader = reader
        self.numbering = numbering
        self.batch_size = batch_size
        self.rows, self.together = rows, together
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
        """Yield the batches of a unit; one is read ahead to know which is the last."""
        wanted = self._wanted(unit)
        if self.together > 1:
            wanted = _no_row_alone(wanted)
        found = next(wanted, None)
        if found is None:
            yield self._batch(unit, [], Chunk([], [], []), last=True)
        while found is not None:
            following = next(wanted, None)
            yield self._batch(unit, *found, last=following is None)
            found = following

    def _wanted(self, unit: int) -> Iterator[Rows]:
        """Read the rows to take from a unit, a batch at a time, with their numbers."""
        first = 0
        if self.rows is None:
            for chunk in self.source.chunks(unit, self.batch_size):
                yield range(first, first + len(chunk.images)), chunk
                first += len(chunk.images)
            return

        rows, place, held = self.rows[unit], 0, Chunk([], [], [])
        for chunk in self.source.chunks(unit, self.batch_size) if rows else ():
            while place < len(rows) and rows[place] < first + len(chunk.images):
                held.images.append(chunk.images[rows[place] - first])
                held.labels.append(chunk.labels[rows[place] - first])
                held.sources.append(chunk.sources[rows[place] - first])
                place += 1
                if len(held.images) == self.batch_size:
                    yield rows[place - self.batch_size : place], held
                    held = Chunk([], [], [])
            first += len(chunk.images)
            if place == len(rows):  # nothing is read behind the last one
                break
        if held.images:
            yield rows[place - len(held.images) : place], held

    def _batch(self, unit: int, numbers: Sequence[int], chunk: Chunk, last: bool) -> ImageBatch:
        """Decode rows of a unit, whose numbers are `numbers`."""
        images: list[Tensor] = []
        labels: list[int] = []
        rows: list[int] = []
        sources: list[str] = []
        bad: list[BadImage] = []
        for row, cell, label, source in zip(numbers, chunk.images, chunk.labels, chunk.sources, strict=True):
            try:
                model_class = self.numbering(label)
                images.append(self.reader(cell))
            except (ImageError, LabelError) as error:
                bad.append(BadImage(unit, row, source, str(error)))
                continue
            labels.append(model_class)
            rows.append(row)
            sources.append(source)

        stacked = torch.stack(images) if images else self.reader.empty()
        name = self.source.unit_name(unit)
        return ImageBatch(stacked, _int64(labels), unit, _int64(rows), last, bad, name=name, sources=sources)

    def _failed(self, unit: int, failure: str) -> ImageBatch:
        return ImageBatch(self.reader.empty(), _int64([]), unit, _int64([]), last=False, failure=failure)


def _no_row_alone(batches: Iterator[Rows]) -> Iterator[Rows]:
    """Join a last batch of one row with the one before it; where batches have several rows, only the last has one."""
    held: Rows | None = None
    for found in batches:
        if held is not None and len(found[0]) == 1:
            one, other = held[1], found[1]
            joined = Chunk([*one.images, *other.images], [*one.labels, *other.labels], [*one.sources, *other.sources])
            found = ([*held[0], *found[0]], joined)
        elif held is not None:
            yield held
        held = found
    if held is not None:
        yield held


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# -- a dataset fitted to a model ---------------------------------------------------------------------------------------


MOST_WORKERS = 16  # beside an H200, 15 processes read 2,001 images/s and 8 read 1,328 (benchmarks/README.md)
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
        chosen: Rows of each unit to read instead, ascending: where some of the data calibrate and others are judged.
        together: Groups of so many neighbouring rows of a unit stay in one batch.
    """

    source: Source
    reader: ImageReader
    numbering: Numbering
    max_images: int | None
    batch_size: int
    chosen: list[list[int]] | None = None
    together: int = 1

    @cached_property  # progress looks at it after every batch
    def shares(self) -> list[int] | None:
        """Rows to read of each unit, None for all; where sizes are unknown, as if each unit had enough rows."""
        if self.max_images is None:
            return None
        sizes = self.source.unit_sizes
        return even_shares(sizes if sizes is not None else [self.max_images] * self.source.units, self.max_images)

    @cached_property
    def rows(self) -> list[Sequence[int]] | None:
        """Numbers of the rows to read of each unit, ascending; None for all.

        They are spread over the unit. The first ones are taken only where the unit's size is unknown, or where its rows
        are in a random order anyway: reading a folder's other files would be for nothing.
        """
        if self.chosen is not None:
            return list(self.chosen)
        shares, sizes = self.shares, self.source.unit_sizes
        if shares is None:
            return None
        if sizes is None or self.source.shuffled:
            return [range(share) for share in shares]
        return [spread(size, share, unit) for unit, (size, share) in enumerate(zip(sizes, shares, strict=True))]

    @property
    def spreads(self) -> bool:
        """Whether the images that are read stand for all, also where the rows of a unit come sorted by class."""
        return self.max_images is None or self.source.unit_sizes is not None or self.source.shuffled

    @property
    def shares_in_words(self) -> str:
        """Which images are read, for the run's decisions."""
        if not self.spreads:
            return (
                f"the first rows of every unit, {self.max_images:,} in all if there are so many (--data.max_images): "
                "the units' sizes are unknown, and where classes come sorted some are left out"
            )
        images = f"{self.images:,} of {self.source.images:,}"
        return f"{images}, an even share of every unit, spread over its rows (--data.max_images)"

    @property
    def expected_rows(self) -> list[Sequence[int]] | None:
        """Numbers of the rows that each unit gives, None where only reading the data would show them."""
        sizes = self.source.unit_sizes
        if sizes is None:
            return None
        return self.rows or [range(size) for size in sizes]

    @property
    def unit_sizes(self) -> list[int] | None:
        """Rows that each unit gives, None where only reading the data would show them."""
        if self.chosen is not None:
            return [len(rows) for rows in self.chosen]
        return self.source.unit_sizes if self.source.unit_sizes is None or self.max_images is None else self.shares

    @property
    def images(self) -> int | None:
        """Rows that all units give, None where only reading the data would show them."""
        if self.max_images is None and self.chosen is None:
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
            rows=self.rows,
            together=self.together,
            process=process,
            processes=processes,
        )


def even_shares(sizes: Sequence[int], images: int) -> list[int]:
    """Share `images` evenly among units of these sizes; what a small unit cannot give, larger ones do.

    The shares add up to `images`, or to all rows where there are fewer. What is left over, or the few images of many
    units, goes to units spread over all of them: classes may come sorted.
    """
    # The most rows of each unit that are not too many in all; some units give one more.
    levels = range(max(sizes, default=0) + 1)
    level = bisect_right(levels, images, key=lambda rows: sum(min(size, rows) for size in sizes)) - 1
    shares = [min(size, level) for size in sizes]
    larger = [unit for unit, size in enumerate(sizes) if size > level]
    for place in spread(len(larger), images - sum(shares)) if larger else ():
        shares[larger[place]] += 1
    return shares


def fewer_rows(rows: Sequence[Sequence[int]], images: int) -> list[list[int]]:
    """Return an even share of each unit's rows, spread over them, `images` in all."""
    shares = even_shares([len(own) for own in rows], images)
    found = []
    for unit, (own, share) in enumerate(zip(rows, shares, strict=True)):
        found.append([own[place] for place in spread(len(own), share, unit)])
    return found


def spread(size: int, share: int, seed: int = 0) -> list[int]:
    """Return `share` of the numbers from 0 to `size - 1`, ascending and spread evenly.

    One of each of `share` equal stretches, chosen in it by a hash: at equal distances, rows whose classes come in turn
    (0, 1, ... 9, 0, 1, ...) would all be of one class.
    """
    rows = []
    for part in range(share):
        first, stop = part * size // share, (part + 1) * size // share
        digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
        rows.append(first + int.from_bytes(digest[:8], "big") % (stop - first))
    return rows


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
