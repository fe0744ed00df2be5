"""Prints how many of the first predictions a cheaper number format changes."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from headprobe.backbone.sandbox import evaluating, in_single
from headprobe.module import AfterBatch, HeadProbe, StepResult
from headprobe.report.table import console
from headprobe.text import counted

EXACT = ("32-true", "64-true")
FIRST_IMAGES = 64


class PrecisionCheck(AfterBatch):
    """Runs the baseline again in float32 on the first images of a run in another precision, and prints what differs.

    It refuses nothing: the user decides how much rounding a study allows.
    """

    def __init__(self) -> None:
        self.images = 0  #: images compared
        self.predictions = 0  #: of them, those with another predicted class
        self.logits = 0.0  #: largest difference of a logit
        self._single: nn.Module | None = None
        self._done = False

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Compare the first batches of the first process."""
        if self._done or trainer.precision in EXACT or not trainer.is_global_zero:
            return
        if len(batch.images):
            self._compare(probe, batch.images, step.logits[0])
        if self.images >= FIRST_IMAGES:
            self._print(trainer)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print now where the data has fewer images."""
        if self.images and not self._done:
            self._print(trainer)

    def _compare(self, probe: HeadProbe, images: Tensor, found: Tensor) -> None:
        if self._single is None:
            self._single = in_single(probe.backbone, probe.source.name)
        with evaluating(self._single), torch.inference_mode():
            expected: Tensor = self._single(probe.normalised(images, torch.float32))
        if probe.valid_classes is not None:
            expected = expected[:, probe.valid_classes.to(expected.device)]
        # found and expected: [images, classes]
        self.images += len(images)
        self.predictions += int((expected.argmax(dim=1) != found.argmax(dim=1)).sum())
        self.logits = max(self.logits, float((expected - found.float()).abs().max()))

    def _print(self, trainer: lightning.Trainer) -> None:
        self._done, self._single = True, None
        console.print(
            f"{trainer.precision}: {self.predictions:,} of the first {counted(self.images, 'baseline prediction')} "
            f"differ from float32 (largest difference of a logit: {self.logits:.2g})",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
