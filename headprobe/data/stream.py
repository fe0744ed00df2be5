"""The stream of batches: which process reads which unit, and what one unit becomes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from headprobe.data.batch import BadImage, ImageBatch
from headprobe.data.decode import ImageError, ImageReader
from headprobe.data.labels import LabelError, Numbering
from headprobe.data.source import Chunk, Source
from headprobe.errors import RunError


class UnitStream(IterableDataset[ImageBatch]):
    """Batches of the units that fall to one process, each image once over all processes and workers.

    Each process takes an equal run of neighbouring units, whose statistics can be merged as soon as they are there; its
    worker k takes every workers-th of these from the k-th on. It has no length: with workers, Lightning would stop
    after that many batches, partial ones included, and lose images.

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
        chunks = self.source.chunks(unit, self.batch_size) if left else iter(())
        for chunk in chunks:
            yield Chunk(chunk.images[:left], chunk.labels[:left], chunk.sources[:left])
            left -= len(chunk.images)
            if left <= 0:
                return

    def _batch(self, unit: int, first: int, chunk: Chunk, last: bool) -> ImageBatch:
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
