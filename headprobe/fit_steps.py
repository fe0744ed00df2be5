"""How `fit` trains: the bundled models were made with these few steps."""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from headprobe.errors import RunError


class FitSteps(lightning.LightningModule):
    """The training half of `HeadProbe`; `test` needs none of it."""

    backbone: nn.Module

    def normalised(self, images: Tensor) -> Tensor:
        """Return uint8 images `[images, channels, height, width]` as the model takes them."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch of the training split."""
        smoothing = float(self.hparams["label_smoothing"])
        logits = self.backbone(self.normalised(batch.images))
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Top-1 of one batch of the test split."""
        if batch.failure is not None:
            raise RunError(batch.failure)
        if not len(batch.labels):
            return
        right = self.backbone(self.normalised(batch.images)).argmax(dim=-1) == batch.labels
        self.log("val_top1", right.float().mean(), prog_bar=True, batch_size=len(right), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay over all steps of `fit`."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.hparams["learning_rate"],
            total_steps=max(2, int(self.trainer.estimated_stepping_batches)),
            pct_start=self.hparams["warmup"],
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
