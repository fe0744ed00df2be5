"""Who classifies for a `HeadProbe` where its model's own classifier does not: chosen, fitted or read, asked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headprobe.classifiers.base import FeatureClassifier
from headprobe.classifiers.choice import ClassifierChoice
from headprobe.classifiers.fitted import Fitted, Images
from headprobe.classifiers.fitting import ClassifierFit, made_of
from headprobe.classifiers.head_file import LinearHead, read_head
from headprobe.errors import RunError, UsageError
from headprobe.text import Decision, counted

ABOUT = "classifier"
"""Where a calibration's description has the classifier's."""


class Classifying:
    """The classifier of a probe.

    Args:
        text: The option `--model.classifier`; not `none`.
        num_classes: The number of classes that the user gave, None for none.

    Attributes:
        choice: The option, checked.
        asked: The number of classes that the user gave.
        classes: How many classes there are; 0 until a classifier that is fitted has seen its data.
        class_names: Their names, None where they have none.
        classifier: The classifier, None until it is fitted.

    Raises:
        UsageError: There is no such choice, or its file holds no head, or one of other classes.
    """

    def __init__(self, text: str, num_classes: int | None) -> None:
        self.choice, self.asked = ClassifierChoice.read(text), num_classes or None  # 0 builds a model without one
        self.classifier: FeatureClassifier | None = None
        self.classes = num_classes or 0
        self.class_names: list[str] | None = None
        self._given = False
        if not self.choice.fitted:
            head = read_head(self.choice.path)
            if self.asked not in (None, head.classes):
                raise UsageError(
                    f"--model.classifier {self.choice.path} has {counted(head.classes, 'class')}: leave "
                    f"--model.num_classes out, got {num_classes}"
                )
            self._take(head)

    def _take(self, classifier: FeatureClassifier) -> None:
        self.classifier, self.classes, self.class_names = classifier, classifier.classes, classifier.class_names

    @property
    def fits(self) -> bool:
        """Whether it is to be fitted in this run: it is of a kind that is fitted, and none was given."""
        return self.choice.fitted and not self._given

    def take_classes(self, classes: int, class_names: Sequence[str] | None) -> None:
        """Take the classes of the data that it is fitted on."""
        self.classes, self.class_names = classes, None if class_names is None else list(class_names)

    def check_width(self, features: int, model: str) -> None:
        """Refuse a head of a file for features of another width; what was fitted is refused for another model.

        Raises:
            UsageError: With both widths.
        """
        if isinstance(self.classifier, LinearHead) and self.classifier.features != features:
            turned = " (its weight is [features, classes]? transpose it)" if self.classes == features else ""
            raise UsageError(
                f"--model.classifier {self.choice.text} is for features of {self.classifier.features} numbers, and the "
                f"feature of model {model!r} has {features}: give a head that was made for this model{turned}, got "
                f"{self.classifier.features} for {features}"
            )

    def logits(self, features: Tensor) -> Tensor:
        """Return logits `[..., classes]` of features `[..., features]`, float64 where the device has it.

        Raises:
            RunError: It is not fitted yet.
        """
        if self.classifier is None:
            raise RunError(
                f"the classifier {self.choice.text} is fitted by ProbeTrainer.test, before images are judged"
            )
        found = self.classifier.logits(features)
        return found.float().to(features.device) if features.device.type == "mps" else found

    # -- the fit ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to fit; an earlier classifier is forgotten."""
        self.classifier = None

    def fit(self, features: int) -> ClassifierFit:
        """Return the fit under way, for features of this width."""
        return ClassifierFit(self.choice, self.classes, features, self.class_names)

    def take_fitted(self, classifier: FeatureClassifier) -> None:
        """End the fit with what came of it."""
        self._take(classifier)

    def restored(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Fitted:
        """Return the classifier that a calibration holds.

        Args:
            arrays: What it consists of, with the images of each class.
            about: What the calibration says of it.

        Raises:
            UsageError: It is of another kind, or was fitted with other options.
        """
        own = about.get(ABOUT)
        if own is None or not arrays:
            raise UsageError(
                f"the calibration holds no classifier, and --model.classifier is {self.choice.text}: fit it anew "
                "without --calibration-file, got a calibration without one"
            )
        if own["text"] != self.choice.text:
            raise UsageError(
                f"the calibration holds another classifier: give --model.classifier {own['text']}, or fit anew without "
                f"--calibration-file, got {self.choice.text}"
            )
        images = Images(np.array(arrays["images"], dtype=np.int64), int(own["images_without_a_label"]))
        return made_of(self.choice, arrays, images, own["class_names"])

    def take_given(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
        """Take the classifier of an earlier run's calibration, and fit none."""
        self._take(self.restored(arrays, about))
        self._given = True

    @property
    def unseen(self) -> list[int]:
        """Classes that a fitted classifier has seen no image of."""
        return self.classifier.unseen if isinstance(self.classifier, Fitted) else []

    def saved(self) -> dict[str, NDArray[Any]]:
        """Return what a fitted classifier consists of, with the images of each class; nothing of any other."""
        if not isinstance(self.classifier, Fitted):
            return {}
        return {**self.classifier.arrays(), "images": self.classifier.images.per_class}

    # -- what a run says -------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what its logits follow from; while it is fitted only its kind, which the sums follow from."""
        if self.classifier is None:
            return {"kind": self.choice.kind}
        return {"kind": self.choice.kind, "digest": self.classifier.digest}

    def about(self) -> dict[str, Any] | None:
        """Return what it is as JSON values; None before it is fitted."""
        if self.classifier is None:
            return None
        return {"text": self.choice.text, **self.classifier.about(), "class_names": self.class_names}

    def decisions(self, own_classes: int) -> list[Decision]:
        """Return what a run says of it.

        Args:
            own_classes: Classes of the model's own classifier, 0 without one.
        """
        found = [] if self.classifier is None else self.classifier.decisions()
        if own_classes:
            text = f"of {counted(own_classes, 'class')}, set aside: its pooled feature is classified instead"
            found.append(Decision("own classifier", f"{text} (--model.classifier)", shown=True))
        return found
