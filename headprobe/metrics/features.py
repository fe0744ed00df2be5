"""How far each mask moves the pooled feature of the very images that the baseline is run on, as sums over images.

No label is needed: the masked model's feature is compared with the unmasked model's, image by image.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.paired_accuracy import GROUPS
from headprobe.metrics.accuracy.paired_tests import mean_interval
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.sums import Layout, SumMetric

ROWS_AT_ONCE = 64
"""Rows whose features are float64 at the same time."""

POWERS = ("", "_square", "_cube", "_fourth")
"""What the sums of a quantity's powers end in."""

QUANTITIES = ("away", "distance")
"""What is summed of each image: 1 - cosine, which keeps its digits near 0, and the relative distance."""


class FeatureScores(NamedTuple):
    """One entry per row, `[1 + masks]`, the baseline first; a mean over no image is NaN.

    The baseline's cosine with itself is 1 and its distance 0; their intervals are NaN.
    """

    feature_cosine: FloatArray  #: mean cosine of the masked and the unmasked feature
    feature_cosine_low: FloatArray  #: lower limit of its 95% interval (`mean_interval`)
    feature_cosine_high: FloatArray  #: upper limit
    feature_distance: FloatArray  #: mean of |masked - unmasked| / |unmasked|
    feature_distance_low: FloatArray  #: lower limit of its 95% interval
    feature_distance_high: FloatArray  #: upper limit
    images: IntArray  #: images that were run, the same in every row
    nonfinite: (
        IntArray  #: of them those left out: a NaN or infinite feature here or in the baseline, or a zero baseline
    )
    group_images: IntArray  #: images that count of each group, `[1 + masks, 64]` (`image_groups`)
    group_cosine: FloatArray  #: sums of the cosine over the images of each group, `[1 + masks, 64]`
    group_distance: FloatArray  #: the same of the distance


class FeatureSums(SumMetric):
    """Sums over images of how the features of masks differ from the baseline's, streamed over batches.

    Args:
        masks: Masks beside the baseline.

    Raises:
        UsageError: `masks` is below 0.
    """

    MERGEABLE = "equal numbers of masks"

    images: Tensor  #: int64 `[]`
    nonfinite: Tensor  #: int64 `[1 + masks]`, images that are left out of a row's sums
    away: Tensor  #: float64 `[1 + masks]`, 1 - cosine; `away_square`, `_cube` and `_fourth` its powers
    distance: Tensor  #: float64 `[1 + masks]`, |masked - unmasked| / |unmasked|, and its powers
    group_images: Tensor  #: int64 `[1 + masks, 64]`, images that count of each group (`image_groups`)
    group_away: Tensor  #: float64 `[1 + masks, 64]`
    group_distance: Tensor  #: float64 `[1 + masks, 64]`

    def __init__(self, masks: int) -> None:
        if masks < 0:
            raise UsageError(f"masks must be 0 or more, got {masks}")
        self.masks = masks
        super().__init__(_layout(masks))

    @property
    def signature(self) -> tuple[Any, ...]:
        """The number of masks."""
        return (self.masks,)

    def empty(self) -> Self:
        """Return the metric of as many masks without images."""
        return type(self)(self.masks)

    def update(self, features: Tensor, groups: Tensor) -> None:
        """Add a batch.

        Args:
            features: `[1 + masks, images, features]`, the baseline first.
            groups: `[images]`, the group of each image, an int64 that `image_groups` gave.

        Raises:
            UsageError: A shape or dtype is wrong; nothing is added then.
        """
        if features.ndim != 3 or len(features) != 1 + self.masks or not features.is_floating_point():
            raise UsageError(
                f"features must be [{1 + self.masks}, images, features] in floating point, got "
                f"{list(features.shape)} in {features.dtype}"
            )
        if groups.shape != features.shape[1:2]:
            raise UsageError(f"groups must be [{features.shape[1]}], one per image, got {list(groups.shape)}")
        members = F.one_hot(groups, GROUPS).double()  # [images, groups]
        baseline = features[0].double()
        found = [_sums(part.double(), baseline, members) for part in torch.split(features, ROWS_AT_ONCE)]
        sums = {name: torch.cat([of_part[name] for of_part in found]) for name in found[0]}
        self.add({"images": groups.new_tensor(len(groups)), **sums})

    def compute(self) -> FeatureScores:
        """Return scores of all images so far, the states of all processes added."""
        return feature_scores(self.to_arrays())


def _layout(masks: int) -> Layout:
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"images": ((), torch.int64)}
    layout["nonfinite"] = ((1 + masks,), torch.int64)
    layout |= {f"{name}{power}": ((1 + masks,), torch.float64) for name in QUANTITIES for power in POWERS}
    layout["group_images"] = ((1 + masks, GROUPS), torch.int64)
    return layout | {f"group_{name}": ((1 + masks, GROUPS), torch.float64) for name in QUANTITIES}


class OfImages(NamedTuple):
    """How far each image's feature has moved, `[rows, images]` each."""

    away: Tensor  #: 1 - cosine, float64
    distance: Tensor  #: |masked - unmasked| / |unmasked|, float64
    counts: Tensor  #: whether both are defined: nothing is NaN or infinite, and the unmasked feature is not all zeros


def of_images(features: Tensor, baseline: Tensor) -> OfImages:
    """Compare features with those of the unmasked model.

    A feature of zeros has no direction: its cosine is 0. Equal features give exactly 1.

    Args:
        features: float64 `[rows, images, features]`.
        baseline: float64 `[images, features]`.
    """
    own, size = features.square().sum(dim=-1), baseline.square().sum(dim=-1)  # [rows, images], [images]
    moved = (features - baseline).square().sum(dim=-1)  # [rows, images]
    product = (own * size).sqrt()
    cosine = (features * baseline).sum(dim=-1) / torch.where(product > 0, product, 1)
    distance = (moved / torch.where(size > 0, size, 1)).sqrt()
    return OfImages(1 - cosine.clamp(-1, 1), distance, own.isfinite() & size.isfinite() & (size > 0))


def _sums(features: Tensor, baseline: Tensor, members: Tensor) -> dict[str, Tensor]:
    """Return the sums of some rows over the images of a batch, by state.

    Args:
        features: float64 `[rows, images, features]`.
        baseline: float64 `[images, features]`.
        members: float64 `[images, groups]`, 1 where an image belongs to a group, else 0.
    """
    found = of_images(features, baseline)
    sums = {"nonfinite": (~found.counts).sum(dim=1), "group_images": (found.counts.double() @ members).long()}
    for name, values in {"away": found.away, "distance": found.distance}.items():
        value = torch.where(found.counts, values, 0)  # [rows, images]
        sums[f"group_{name}"] = value @ members
        for power, ending in enumerate(POWERS, start=1):
            sums[f"{name}{ending}"] = value.pow(power).sum(dim=1)
    return sums


def feature_scores(arrays: Mapping[str, NDArray[np.generic]]) -> FeatureScores:
    """Derive everything from the sums of `FeatureSums.to_arrays`."""
    nonfinite = np.asarray(arrays["nonfinite"], dtype=np.int64)
    images = np.broadcast_to(np.asarray(arrays["images"], dtype=np.int64), nonfinite.shape).copy()
    counting = images - nonfinite
    groups = {name: np.asarray(arrays[f"group_{name}"]) for name in ("images", *QUANTITIES)}
    away, distance = (_with_limits(arrays, name, counting) for name in QUANTITIES)
    return FeatureScores(
        feature_cosine=1 - away[0],
        feature_cosine_low=np.maximum(1 - away[2], -1),
        feature_cosine_high=np.minimum(1 - away[1], 1),
        feature_distance=distance[0],
        feature_distance_low=np.maximum(distance[1], 0),
        feature_distance_high=distance[2],
        images=images,
        nonfinite=nonfinite,
        group_images=groups["images"].astype(np.int64),
        group_cosine=groups["images"] - groups["away"].astype(np.float64),
        group_distance=groups["distance"].astype(np.float64),
    )


def _with_limits(
    arrays: Mapping[str, NDArray[np.generic]], name: str, images: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the mean of a quantity by row and its limits; those of the baseline are NaN."""
    powers = np.array([arrays[f"{name}{power}"] for power in POWERS], dtype=np.float64)
    mean = powers[0] / np.where(images > 0, images, np.nan)
    low, high = (np.concatenate([[np.nan], limit[1:]]) for limit in mean_interval(powers, images))
    return mean, low, high


class CountFeatures:
    """Keeps these sums by unit, as a statistic of `headprobe.units`.

    Args:
        masks: Masks beside the baseline.

    Attributes:
        whole: The sums of all units, on the process that has them all.
    """

    name = "features"

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.whole: FeatureSums | None = None

    def open(self, unit: int) -> dict[str, Any]:
        """Return empty sums for a unit."""
        return {"sums": FeatureSums(self.masks)}

    def close(self, unit: int, sums: dict[str, Any]) -> dict[str, Any]:
        """End a unit: its sums go to the CPU."""
        return {name: metric.to("cpu") for name, metric in sums.items()}

    def empty(self, name: str) -> FeatureSums:
        """Return empty sums."""
        return FeatureSums(self.masks)

    def finish(self, whole: Mapping[str, Any]) -> None:
        """Take the sums over all units."""
        self.whole = whole.get("sums") or FeatureSums(self.masks)


class ImageCount(SumMetric):
    """Counts images: what a unit's scores are where nothing classifies."""

    images: Tensor  #: int64 `[]`

    def __init__(self) -> None:
        super().__init__({"images": ((), torch.int64)}, synced=False)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Nothing: there is one kind."""
        return ()

    def empty(self) -> Self:
        """Return a count without images."""
        return type(self)()

    def update(self, images: int) -> None:
        """Add a batch of so many images."""
        self.add({"images": torch.tensor(images)})

    def compute(self) -> int:
        """Return how many images there are."""
        return int(self.images)
