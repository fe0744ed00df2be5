"""What fitting a classifier would cost, for `test --dry-run`: images, memory and time, measured on noise."""

from dataclasses import dataclass
from typing import Any

import lightning

from headprobe.classifiers.choice import CLASS_MEAN
from headprobe.classifiers.fitting import stand_in
from headprobe.commands.dry.fitting import seconds_and_sums, size_in_words
from headprobe.metrics.feature_bank import bank_bytes
from headprobe.module import HeadProbe
from headprobe.probe.calibrating import FittingClassifier
from headprobe.text import counted, duration

MEANS_AT_THE_PEAK, BANKS_AT_THE_PEAK = 55, 5
"""So many times the size of all means, or of the whole bank, fits into memory at the peak of fitting, in the process
that adds up. Measured with 100,000 images in 100 units, 768 channels and 1,000 classes: 302 MiB, which is 51 times, and
1,268 MiB, which is 4.3 times. With 5,000 classes of 1,024 channels it was 33 times."""

UNKNOWN_IMAGES = 10_000
"""As many stand in for a bank of nobody knows how many."""


@dataclass(frozen=True)
class ClassifierCost:
    """What a classifier costs.

    Attributes:
        text: The choice.
        images: Images that it is fitted on, None where nobody knows.
        classes: How many classes.
        features: Width of the feature.
        means: Whether it is made of means; else of a bank.
        seconds: Seconds of the pass that fits, an image.
    """

    text: str
    images: int | None
    classes: int
    features: int
    means: bool
    seconds: float

    @property
    def size(self) -> int | None:
        """Bytes of what it consists of."""
        if self.means:
            return self.classes * self.features * 8
        return None if self.images is None else bank_bytes(self.images, self.features)

    def lines(self) -> list[str]:
        """Return all but the time in words."""
        images = "an unknown number of images" if self.images is None else counted(self.images, "image")
        found = [f"fitting the classifier: {self.text} on {images}, in one forward pass of the unmasked model each"]
        if self.size is None:
            each = f"a bank of {bank_bytes(1, self.features):,} bytes an image"
            return [*found, f"classifier: {each}, and {BANKS_AT_THE_PEAK} times as much at the peak of fitting"]
        what = f"means of {counted(self.classes, 'class')}" if self.means else f"a bank of {images}"
        peak = self.size * (MEANS_AT_THE_PEAK if self.means else BANKS_AT_THE_PEAK)
        return [
            *found,
            f"classifier: {what}, {size_in_words(self.size)} in every process and in calibration.safetensors, up to "
            f"about {size_in_words(peak)} at the peak of fitting",
        ]

    def seconds_in_all(self, processes: int) -> float:
        """Return how long fitting takes."""
        return 0.0 if self.images is None else self.images * self.seconds / processes

    def time_line(self, processes: int) -> str:
        """Return the time in words."""
        each = f"{self.seconds * 1000:.3g} ms an image, model only"
        if self.images is None:
            return f"time to fit the classifier: {each}"
        took = duration(self.seconds_in_all(processes))
        return f"time to fit the classifier: about {took} for {counted(self.images, 'image')} ({each})"


def plan_classifier(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> ClassifierCost | None:
    """Measure what fitting the classifier costs; None where none is fitted.

    The probe has a classifier that was fitted on noise from then on.

    Raises:
        UsageError: The bank would be too large.
    """
    classifying = probe.classifying
    if classifying is None or not classifying.fits:
        return None
    images, _, _ = data.calibrates_on(trainer.world_size)
    features = probe.outputs.features
    classifying.fit(features).refuse_too_many(images)
    classifying.begin()
    seconds = seconds_and_sums(trainer, probe, data.batch_size, FittingClassifier(probe, classifying))[1]
    choice = classifying.choice
    classifying.take_fitted(stand_in(choice, classifying.classes, features, images or UNKNOWN_IMAGES))
    return ClassifierCost(choice.text, images, classifying.classes, features, choice.kind == CLASS_MEAN, seconds)
