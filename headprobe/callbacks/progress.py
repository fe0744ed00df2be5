"""A progress bar that counts images: how many of how many, images per second, time left."""

import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class ImageProgress(TQDMProgressBar):
    """Counts images while testing, those of all processes together; elsewhere it is Lightning's own bar."""

    def init_test_tqdm(self) -> Tqdm:
        """Make the bar."""
        return Tqdm(
            desc="Scoring", unit=" images", disable=self.is_disabled, leave=True, dynamic_ncols=True, file=sys.stderr, smoothing=0.05
        )

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the bar moves at the end of a batch."""

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar with its length."""
        super().on_test_start(trainer, pl_module)
        self.test_progress_bar.reset(total=getattr(trainer.datamodule, "expected_images", None))  # type: ignore[attr-defined]

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move on by the images of this batch, times the processes that work beside this one."""
        bar = self.test_progress_bar
        step = (len(batch.labels) + len(batch.bad)) * trainer.world_size
        bar.update(min(step, bar.total - bar.n) if bar.total is not None else step)
