"""TrainingDataModule: a small training split, kept in memory, shuffled and lightly augmented, for `headprobe fit`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.sources.source import open_source
from headprobe.data.stream import FittedData, ImageBatch
from headprobe.errors import RunError, UsageError

MOST_IMAGES = 50_000
TRAINING_UNIT = -1  # the unit of a training batch, which mixes units


class TrainingDataModule(ImageNetDataModule):
    """A small image dataset to train on: one split trains, another one validates after each epoch.

    Args:
        train_split: Split to train on.
        augment: Whether to shift, turn and scale training images a little at random.
        seed: Seed of the order of the training images.
        **options: The arguments of `ImageNetDataModule`, but for `restrict_classes`, `on_bad_image`, `calibration` and
            `calibration_images`. Its `split` and `max_images` choose the images of the validation.

    Raises:
        UsageError: An option is out of its range.
    """

    trains = True

    def __init__(self, *, train_split: str = "train", augment: bool = True, seed: int = 0, **options: Any) -> None:
        # The arguments given here belong to `test`: that hides them from the options of the command line.
        super().__init__(
            restrict_classes=True, on_bad_image="error", calibration=None, calibration_images=None, **options
        )
        self._train_split = train_split
        self._augment = augment
        self._seed = seed
        self._training: TrainingSet | None = None

    def setup(self, stage: str) -> None:
        """Fit the dataset to the trainer's model; for `fit`, read the training split into memory.

        Raises:
            UsageError: The dataset's classes cannot be matched to the model's, or the training split is too large.
            RunError: The dataset cannot be reached or read, or a training image is bad.
        """
        super().setup(stage)
        if stage == "fit":
            source = open_source(replace(self._request, split=self._train_split))
            self._training = load_training_set(replace(self._fitted, source=source, max_images=None), self._augment)

    def train_dataloader(self) -> "DataLoader[tuple[Tensor, int, int]]":
        """Return the shuffled training images, as batches of unit -1.

        Raises:
            RunError: `setup` has not read them yet.
        """
        if self._training is None:
            raise RunError('the training split is not read yet: call setup("fit"), or use a Trainer')
        return DataLoader(
            self._training,
            self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=collate,
            num_workers=self.num_workers or 0,
            pin_memory=self._on_gpu(),
        )

    def val_dataloader(self) -> "DataLoader[ImageBatch]":
        """Return the loader of the other split, for the end of each epoch."""
        return self.test_dataloader()


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
        if self.augment is not None:
            image = self.augment(image)
        return image, int(self.labels[row]), row


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
