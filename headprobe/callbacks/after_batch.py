"""The short form of the hook that Lightning calls after each batch of a test."""

from typing import Any

import lightning

from headprobe.module import HeadProbe, StepResult


class AfterBatch(lightning.Callback):
    """A callback that looks at every scored batch of a `HeadProbe`; tests of other modules pass it by."""

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand the batch over."""
        if isinstance(pl_module, HeadProbe) and isinstance(outputs, StepResult):
            self.after_batch(trainer, pl_module, outputs, batch)

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Look at a scored batch.

        Args:
            trainer: Runs the test.
            probe: The model with its masks.
            step: What was measured.
            batch: The `ImageBatch` that was scored.
        """
        raise NotImplementedError
