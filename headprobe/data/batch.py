"""What travels from a loader to the module: images of one unit, their labels, and the rows that could not be used."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadImage:
    """A row that could not be decoded or labelled; `row` counts from 0 inside its unit."""

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
        unit: Id of the unit, or -1 for a training batch, which mixes units.
        rows: int64 `[images]`, row number inside the unit.
        last: True on exactly one batch of each unit, its last one.
        bad: Rows of this batch that are not in `images`.
        failure: Why the unit cannot be read any further, None if all is well. No batch follows it from that worker.
        name: The file (and part of it) that the unit is read from, for messages.
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
        """Return the batch with its images and labels on `device`; the bookkeeping stays on the CPU."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory, from which a GPU can copy while it computes."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())
