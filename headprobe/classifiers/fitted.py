"""What classifiers that are fitted on calibration images have in common."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from headprobe.classifiers.base import FeatureClassifier, named
from headprobe.metrics.arrays import IntArray
from headprobe.text import Decision, counted


@dataclass(frozen=True)
class Images:
    """The images that a classifier was fitted on.

    Attributes:
        per_class: `[classes]`.
        unlabelled: Images that were left out for want of a label.
    """

    per_class: IntArray
    unlabelled: int = 0

    @property
    def total(self) -> int:
        """All that it was fitted on."""
        return int(self.per_class.sum())


class Fitted(FeatureClassifier):
    """A classifier that is fitted on calibration images.

    Args:
        shape: Numbers of classes and channels.
        images: What it was fitted on.
        temperature: By which cosines are divided.
        class_names: Names of the classes.
    """

    kind: ClassVar[str]
    what_it_is_not: ClassVar[str]

    def __init__(
        self, shape: Sequence[int], images: Images, temperature: float, class_names: Sequence[str] | None
    ) -> None:
        self.classes, self.features = shape
        self.images, self.temperature = images, temperature
        self.class_names = None if class_names is None else list(class_names)

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return what it consists of, for the calibration's file."""

    @property
    def unseen(self) -> list[int]:
        """Classes without a calibration image."""
        return [int(number) for number in np.flatnonzero(self.images.per_class == 0)]

    @property
    def options(self) -> dict[str, Any]:
        """What a user may choose of it."""
        return {"temperature": self.temperature}

    @cached_property  # of a large bank it takes a second
    def digest(self) -> str:
        """SHA-256 of all that its logits follow from."""
        digest = hashlib.sha256(json.dumps([self.kind, self.classes, self.options]).encode())
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what it is and on how many images of each class it was fitted."""
        seen = self.images.per_class[self.images.per_class > 0]
        return {
            "kind": self.kind,
            **self.options,
            "classes": self.classes,
            "features": self.features,
            "images": self.images.total,
            "images_of_a_class": [int(min(seen, default=0)), int(max(seen, default=0))],
            "classes_without_images": self.unseen,
            "images_without_a_label": self.images.unlabelled,
            "digest": self.digest,
            "note": self.what_it_is_not,
        }

    def decisions(self) -> list[Decision]:
        """Return what it is, on how many images it was fitted, and which classes have none."""
        about = self.about()
        least, most = about["images_of_a_class"]
        of_each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        options = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
        text = (
            f"{self.kind}, {options}: of {counted(self.images.total, 'image')}, {of_each} of each class; "
            f"{self.what_it_is_not} (--model.classifier)"
        )
        found = [Decision("classifier", text, shown=True)]
        if self.images.unlabelled:
            text = f"{counted(self.images.unlabelled, 'calibration image')} without a label, left out"
            found.append(Decision("unlabelled calibration images", text, shown=True))
        if self.unseen:
            text = (
                f"{named(self.unseen, self.class_names)}: {len(self.unseen):,} of {counted(self.classes, 'class')}, "
                "left out of the choice, and their images out of all numbers (--data.on_bad_image skip)"
            )
            found.append(Decision("classes without calibration images", text, shown=True))
        return found
