"""Class means: the cosine of a feature to the mean of each class over calibration images, over a temperature.

The mean is that of features at unit length, and has unit length itself. It is no linear probe: nothing is trained, so
its accuracy says how classes lie around their means, not what a trained classifier could read.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from headprobe.classifiers.base import OnDevices, equal_rows, named, unit_rows, wide
from headprobe.classifiers.choice import CLASS_MEAN
from headprobe.classifiers.fitted import Fitted, Images
from headprobe.metrics.arrays import FloatArray
from headprobe.text import Decision, counted


class ClassMean(Fitted):
    """The means of classes.

    Args:
        means: Of unit length, `[classes, features]`; NaN for classes without images.
        images: On what they were fitted.
        temperature: By which cosines are divided.
        class_names: Names of the classes.
    """

    kind: ClassVar[str] = CLASS_MEAN
    what_it_is_not: ClassVar[str] = "a class-mean classifier is not a linear probe"

    def __init__(
        self, means: FloatArray, images: Images, temperature: float, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(means.shape, images, temperature, class_names)
        self.means = means
        # a class without a mean is never chosen among, and NaN would spoil the others
        self._constants = OnDevices(np.nan_to_num(means, nan=0.0))

    def logits(self, features: Tensor) -> Tensor:
        """Return cosine / temperature, `[..., classes]`; 0 for a class without a mean."""
        own = wide(features)
        return unit_rows(own) @ self._constants.on(own.device).T / self.temperature

    def arrays(self) -> dict[str, Any]:
        """Return the means."""
        return {"means": self.means}

    def decisions(self) -> list[Decision]:
        """Return what it is, and classes whose means are equal."""
        found = super().decisions()
        there = np.flatnonzero(self.images.per_class)
        pairs = [(there[one], there[other]) for one, other in equal_rows(self.means[there])]
        if pairs:
            texts = "; ".join(named([int(one), int(other)], self.class_names) for one, other in pairs[:3])
            text = f"{counted(len(pairs), 'pair')} of classes with equal means, between which rounding decides: {texts}"
            found.append(Decision("duplicate classes", text, shown=True))
        return found
