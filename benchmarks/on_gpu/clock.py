"""When each batch of a test in this process was scored."""

import time
from typing import Any, ClassVar

import lightning
import torch

from headprobe.module import AfterBatch, HeadProbe, StepResult


class Clock(AfterBatch):
    """Notes when each batch has been scored, and how many images it had, of the last test of this process."""

    ends: ClassVar[list[tuple[float, int]]] = []

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget an earlier test."""
        Clock.ends = []

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Wait for the device, and note the time."""
        if step.logits.device.type == "cuda":
            torch.cuda.synchronize(step.logits.device)
        Clock.ends.append((time.perf_counter(), len(step.labels)))

    @staticmethod
    def sustained() -> float | None:
        """Return images/s of the second half of the batches; None where there are too few."""
        half = Clock.ends[len(Clock.ends) // 2 :]
        if len(half) < 2:
            return None
        return sum(images for _, images in half[1:]) / (half[-1][0] - half[0][0])
