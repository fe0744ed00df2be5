"""Sums of features by class, from which class means follow."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.sums import SumMetric


class ClassSums(SumMetric):
    """Sums over images of their features at unit length, by the images' class.

    Args:
        classes: Number of classes.
        features: Width of the features.
    """

    MERGEABLE = "sums of equal (classes, features)"

    sums: Tensor  #: float64 `[classes, features]`
    images: Tensor  #: int64 `[classes]`
    unlabelled: Tensor  #: int64 `[]`, images without a label
    unusable: Tensor  #: int64 `[]`, images whose feature has no direction: NaN, infinite, or zero

    def __init__(self, classes: int, features: int) -> None:
        self.classes, self.features = classes, features
        super().__init__(
            {
                "sums": ((classes, features), torch.float64),
                "images": ((classes,), torch.int64),
                "unlabelled": ((), torch.int64),
                "unusable": ((), torch.int64),
            },
            synced=False,
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """Numbers of classes and channels."""
        return (self.classes, self.features)

    def empty(self) -> Self:
        """Return sums of the same classes and width without images."""
        return type(self)(self.classes, self.features)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            features: `[images, features]`, on a device with float64.
            labels: `[images]`, negative for images without a label.
        """
        directions, usable = unit_length(features)  # [images, features], [images]
        labels = labels.to(features.device)
        labelled = labels >= 0
        kept = usable & labelled
        # A product, of the classes that are there: index_add would add up in any order on a GPU.
        present, places = torch.unique(labels[kept], return_inverse=True)
        members = F.one_hot(places, max(1, len(present)))[:, : len(present)].double()  # [images, present classes]
        found = {"sums": members.T @ directions[kept], "images": members.sum(dim=0).long()}
        self.add(found, (present.to(self.sums.device),))
        self.add({"unlabelled": (~labelled).sum(), "unusable": (~usable).sum()})

    @property
    def labelled(self) -> int:
        """Images with a label whose feature has a direction."""
        return int(self.images.sum())

    def compute(self) -> tuple[FloatArray, IntArray]:
        """Return the means at unit length `[classes, features]`, and each class's images `[classes]`.

        NaN for a class without images, or one whose images cancel out.
        """
        means, usable = unit_length(self.sums)
        return torch.where(usable[:, None], means, torch.nan).cpu().numpy(), self.images.cpu().numpy()


def unit_length(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features at unit length, float64, and which of them have a direction.

    Args:
        features: `[..., features]`, on a device with float64.
    """
    wide = features.double()
    lengths = wide.norm(dim=-1, keepdim=True)  # of a NaN or infinite feature NaN or infinite
    return wide / lengths, ((lengths > 0) & lengths.isfinite())[..., 0]
