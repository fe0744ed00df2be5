"""How many donors of resampled heads are of their image's own class: such heads take little away."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from headprobe.metrics.sums import SumMetric


class DonorLabels(SumMetric):
    """Counts images whose donor has their label.

    Args:
        draws: Number of draws.

    Attributes:
        images: Images, once for each draw.
        own_class: `[draws]`, images whose donor has their label.
    """

    images: Tensor
    own_class: Tensor

    def __init__(self, draws: int) -> None:
        super().__init__({"images": ((), torch.int64), "own_class": ((draws,), torch.int64)}, synced=False)
        self.draws = draws

    @property
    def signature(self) -> tuple[Any, ...]:
        """The number of draws."""
        return (self.draws,)

    def empty(self) -> Self:
        """Return counts of the same draws without images."""
        return type(self)(self.draws)

    def update(self, labels: Tensor, donors: Tensor) -> None:
        """Add a batch.

        Args:
            labels: int64 `[images]`.
            donors: int64 `[draws, images]`, the place of each image's donor in the batch.
        """
        self.add({"images": labels.new_tensor(donors.numel()), "own_class": (labels[donors] == labels).sum(dim=1)})

    def compute(self) -> float:
        """Return the share of images, over all draws, whose donor has their label; NaN without images."""
        images = int(self.images)
        return int(self.own_class.sum()) / images if images else float("nan")


class CountDonorLabels:
    """Keeps these counts by unit, as a statistic of `headprobe.units`.

    Args:
        draws: Number of draws.

    Attributes:
        share: Share of images whose donor has their label, once all units are added up.
    """

    name = "resample"

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.share: float | None = None

    def open(self, unit: int) -> dict[str, Any]:
        """Return empty counts for a unit."""
        return {"labels": DonorLabels(self.draws)}

    def close(self, unit: int, sums: dict[str, Any]) -> dict[str, Any]:
        """End a unit: its counts are on the CPU already."""
        return sums

    def empty(self, name: str) -> DonorLabels:
        """Return empty counts."""
        return DonorLabels(self.draws)

    def finish(self, whole: Mapping[str, Any]) -> None:
        """Take the counts over all units."""
        self.share = whole["labels"].compute() if whole else None
