"""A small training set, decoded once and kept in memory, shuffled and lightly augmented: for `headprobe fit`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from headprobe.data.fitted import FittedData
from headprobe.data.stream import ImageBatch
from headprobe.errors import RunError, UsageError

MOST_IMAGES = 50_000
TRAINING_UNIT = -1


class TrainingSet(Dataset[tuple[Tensor, int, int]]):
    """Images `[channels, height, width]` (uint8), their labels and their row numbers.

    Args:
        images: uint8 `[images, channels, height, width]`.
        labels: int64 `[images]`.
        augment: Whether to shift (up to 10%), turn (10 degrees) and scale (10%) each image at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images = images
        self.labels = labels
        self.augment = (
            v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
            if augment
            else None
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        """Return an image, its label and its row."""
        image = self.images[row]
        return image if self.augment is None else self.augment(image), int(self.labels[row]), row


def collate(rows: Sequence[tuple[Tensor, int, int]]) -> ImageBatch:
    """Stack rows of a training set into a batch."""
    images, labels, numbers = zip(*rows, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(labels), TRAINING_UNIT, torch.tensor(numbers), last=False)


def load_training_set(data: FittedData, augment: bool) -> TrainingSet:
    """Read a whole split into memory.

    Raises:
        UsageError: It is too large for that.
        RunError: An image or a file is broken.
    """
    if data.images is None or data.images > MOST_IMAGES:
        count = "an unknown number" if data.images is None else data.images
        raise UsageError(f"fit is for small datasets, up to {MOST_IMAGES} training images, got {count}")
    batches = []
    for batch in data.stream():
        if batch.failure:
            raise RunError(batch.failure)
        if batch.bad:
            first = batch.bad[0]
            raise RunError(
                f"a training image is bad: {first.source}, row {first.row} of unit {first.unit}: {first.reason}"
            )
        batches.append(batch)
    images = torch.cat([batch.images for batch in batches])
    return TrainingSet(images, torch.cat([batch.labels for batch in batches]), augment)
