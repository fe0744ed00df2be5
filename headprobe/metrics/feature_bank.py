"""The features of labelled images, kept one by one: what neighbours are sought among."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import RunError
from headprobe.metrics.arrays import IntArray
from headprobe.metrics.class_sums import unit_length
from headprobe.text import counted

MOST_BYTES = 2**31
"""Of a bank's features. ImageNet's 1.28 million training images at 768 channels would take 3.7 GiB in every process."""


def bank_bytes(images: int, features: int) -> int:
    """Return the bytes of the features of so many images."""
    return images * features * 4


def most_images(features: int) -> int:
    """Return how many images a bank of this width may hold."""
    return MOST_BYTES // bank_bytes(1, features)


class FeatureBank:
    """Features at unit length and classes of labelled images, in the order of units and rows.

    It is kept by unit as sums are: merging joins the images of neighbouring units.

    Args:
        features: Width of the features.

    Attributes:
        unlabelled: Images without a label.
        unusable: Images whose feature has no direction: NaN, infinite, or zero.
    """

    def __init__(self, features: int) -> None:
        self.features = features
        self.unlabelled = self.unusable = 0
        self._directions: list[NDArray[np.float32]] = []  # each [images, features]
        self._labels: list[IntArray] = []

    @property
    def images(self) -> int:
        """How many images it holds."""
        return sum(map(len, self._labels))

    @property
    def labelled(self) -> int:
        """The same: an image without a label is not kept."""
        return self.images

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            features: `[images, features]`, on a device with float64.
            labels: `[images]`, negative for images without a label.

        Raises:
            RunError: The bank would be too large.
        """
        directions, usable = unit_length(features)  # [images, features], [images]
        labels = labels.to(features.device)
        kept = usable & (labels >= 0)
        self._directions.append(directions[kept].float().cpu().numpy())
        self._labels.append(labels[kept].cpu().numpy())
        self.unlabelled += int((labels < 0).sum())
        self.unusable += int((~usable).sum())
        self._refuse_too_many()

    def merge(self, other: "FeatureBank") -> None:
        """Append the images of later units.

        Raises:
            ValueError: The other bank has another width.
            RunError: The bank would be too large.
        """
        if self.features != other.features:
            raise ValueError(f"only banks of equal width can be merged: {self.features} here, got {other.features}")
        self._directions += other._directions
        self._labels += other._labels
        self.unlabelled += other.unlabelled
        self.unusable += other.unusable
        self._refuse_too_many()

    def _refuse_too_many(self) -> None:
        most = most_images(self.features)
        if self.images > most:
            raise RunError(
                f"neighbours are sought among at most {MOST_BYTES // 2**30} GiB of features, {counted(most, 'image')} "
                f"of {self.features} channels: give --data.calibration_images {most}, or choose --model.classifier "
                f"class-mean, got {self.images:,} images so far"
            )

    def directions(self) -> NDArray[np.float32]:
        """Return the features at unit length, `[images, features]`."""
        self._directions = [np.concatenate([np.empty((0, self.features), dtype=np.float32), *self._directions])]
        return self._directions[0]

    def labels(self) -> IntArray:
        """Return the classes, `[images]`."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._labels])

    def to(self, device: Any) -> Self:
        """Return the bank: it stays in the memory of the process."""
        return self

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return everything as arrays."""
        return {
            "directions": self.directions(),
            "labels": self.labels(),
            "left_out": np.array([self.unlabelled, self.unusable], dtype=np.int64),
        }

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> "FeatureBank":
        """Return the bank that `to_arrays` was called on.

        Raises:
            ValueError: The arrays are another metric's.
        """
        if arrays.keys() != {"directions", "labels", "left_out"}:
            raise ValueError(f"the arrays must be directions, labels, left_out, got {', '.join(sorted(arrays))}")
        directions, labels = arrays["directions"], arrays["labels"]
        shape = (len(labels), self.features)
        if directions.shape != shape or directions.dtype != np.float32 or labels.dtype != np.int64:
            raise ValueError(
                f"directions must be float32 {list(shape)}, got {directions.dtype} {list(directions.shape)}"
            )
        bank = FeatureBank(self.features)
        bank._directions, bank._labels = [directions.astype(np.float32)], [labels.astype(np.int64)]
        bank.unlabelled, bank.unusable = (int(number) for number in arrays["left_out"].astype(np.int64))
        return bank


def as_tensor(directions: NDArray[np.float32]) -> Tensor:
    """Return features as a tensor that shares their memory."""
    return torch.from_numpy(directions)
