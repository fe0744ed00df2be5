"""The round that fits a classifier: one pass of the unmasked model over the calibration images, before anything else.

Its sums depend on neither temperature nor neighbours, so that units of a run are resumed by one with others of these.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headprobe.classifiers.base import named
from headprobe.classifiers.choice import CLASS_MEAN, ClassifierChoice
from headprobe.classifiers.class_mean import ClassMean
from headprobe.classifiers.fitted import Fitted, Images
from headprobe.classifiers.neighbours import NearestNeighbours
from headprobe.errors import RunError, UsageError
from headprobe.metrics.class_sums import ClassSums
from headprobe.metrics.feature_bank import MOST_BYTES, FeatureBank, bank_bytes, most_images
from headprobe.text import counted

Sums = ClassSums | FeatureBank


class ClassifierFit:
    """A fit under way.

    Args:
        choice: `class-mean` or `knn`.
        classes: Classes of the data.
        features: Width of the model's feature.
        class_names: Names of the classes.
    """

    def __init__(
        self, choice: ClassifierChoice, classes: int, features: int, class_names: Sequence[str] | None
    ) -> None:
        self.choice, self.classes, self.features, self.class_names = choice, classes, features, class_names

    def empty(self) -> Sums:
        """Return empty sums of a unit."""
        return ClassSums(self.classes, self.features) if self.choice.kind == CLASS_MEAN else FeatureBank(self.features)

    def identity(self) -> dict[str, Any]:
        """Return what changes the sums."""
        return {"name": self.choice.kind, "classes": self.classes, "features": self.features}

    def refuse_too_many(self, images: int | None) -> None:
        """Refuse a bank that would be too large, where the number of images is known.

        Raises:
            UsageError: With the number that fits.
        """
        if self.choice.kind == CLASS_MEAN or images is None or images <= most_images(self.features):
            return
        raise UsageError(
            f"neighbours are sought among at most {MOST_BYTES / 2**30:g} GiB of features, and {images:,} images of "
            f"{self.features} channels take {bank_bytes(images, self.features) / 2**30:.1f} GiB: give "
            f"--data.calibration_images {most_images(self.features)} or fewer, or choose --model.classifier "
            f"class-mean, got {self.choice.text}"
        )

    def update(self, sums: Sums, features: Tensor, labels: Tensor) -> None:
        """Add images `[images, features]` with labels `[images]`, negative for none, to the sums of their unit."""
        sums.update(features, labels)

    def fitted(self, sums: Sums) -> Fitted:
        """Return the classifier that follows from the sums of all units.

        Raises:
            RunError: Features have no direction, or the images of a class cancel out.
            UsageError: No image has a label.
        """
        if unusable := int(sums.unusable):
            raise RunError(
                f"{counted(unusable, 'calibration image')} gave a feature of the unmasked model that is NaN, infinite "
                "or zero, so no classifier can be fitted: try --trainer.precision 32-true"
            )
        arrays, per_class = _arrays(sums, self.classes)
        if not per_class.any():
            raise UsageError(
                f"no calibration image has a label, which --model.classifier {self.choice.kind} is fitted on: choose "
                "another --data.calibration, or --model.classifier none, got labels of -1"
            )
        found = made_of(self.choice, arrays, Images(per_class, int(sums.unlabelled)), self.class_names)
        if isinstance(found, ClassMean):
            there = np.flatnonzero(per_class)
            broken = there[~np.isfinite(found.means[there]).all(axis=1)]
            if len(broken):
                raise RunError(
                    f"the features of all images of a class cancel out, so it has no mean: "
                    f"{named(broken.tolist(), self.class_names)}"
                )
        return found


def _arrays(sums: Sums, classes: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Return what a classifier consists of, and the images of each class `[classes]`."""
    if isinstance(sums, ClassSums):
        means, per_class = sums.compute()
        return {"means": means}, per_class
    labels = sums.labels()
    return {"bank": sums.directions(), "labels": labels}, np.bincount(labels, minlength=classes)


def made_of(
    choice: ClassifierChoice,
    arrays: Mapping[str, NDArray[Any]],
    images: Images,
    class_names: Sequence[str] | None,
) -> Fitted:
    """Return a classifier of what it consists of, as `arrays` of a fitted one gave it.

    Raises:
        KeyError: It is of another kind.
    """
    if choice.kind == CLASS_MEAN:
        return ClassMean(arrays["means"], images, choice.temperature, class_names)
    return NearestNeighbours(arrays["bank"], arrays["labels"], images, choice.k, choice.temperature, class_names)


def stand_in(choice: ClassifierChoice, classes: int, features: int, images: int) -> Fitted:
    """Return a classifier that was fitted on noise: with it a dry run costs what a run costs."""
    random = np.random.default_rng(0)
    if choice.kind == CLASS_MEAN:
        arrays: dict[str, NDArray[Any]] = {"means": _unit(random.standard_normal((classes, features)))}
    else:
        bank = _unit(random.standard_normal((images, features), dtype=np.float32))
        arrays = {"bank": bank, "labels": random.integers(0, classes, images)}
    return made_of(choice, arrays, Images(np.full(classes, -(-images // classes))), None)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
