"""`Fit`: the training steps of `headprobe fit`, which made the bundled models."""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from headprobe.backbone.preparation import normalised
from headprobe.backbone.weights import ModelSource, create_classifier
from headprobe.errors import RunError


class Fit(lightning.LightningModule):
    """Trains a timm model on a small dataset, with all of its heads.

    The loss is cross-entropy, the optimiser AdamW with a linear warm-up and a cosine decay. Validation gives top-1.

    Args:
        name: timm's name of the model, or a bundled one: digits_vit, digits_swin.
        weights: Local safetensors file; without it timm's pretrained weights are used.
        pretrained: False starts from random weights.
        num_classes: Classes of the classifier; without it the weights' own number.
        options: Further arguments of timm.create_model, such as {img_size: 384} or pretrained_cfg_overlay.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        warmup: Fraction of the steps with a rising learning rate.
        label_smoothing: Label smoothing.

    Attributes:
        source: What was built, and where its weights came from.
        backbone: The timm model.
        data_config: Its evaluation transform, as `headprobe.backbone.preparation.data_config` returns it.
        num_classes: Classes of its classifier.

    Raises:
        UsageError: The model cannot be built, has no classifier, or takes an unclear number of channels.
        RunError: Pretrained weights cannot be fetched.
    """

    def __init__(
        self,
        name: str = "digits_vit",
        weights: str | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
        options: dict[str, Any] | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.source = ModelSource(name, weights, pretrained, num_classes, options or {}, train_size=True)
        # A new classifier is what training is for.
        self.backbone, self.data_config, self.num_classes = create_classifier(self.source, trained=False)[:3]

    def setup(self, stage: str) -> None:
        """Put the backbone into training mode: it was built in evaluation mode, which Lightning would keep."""
        if stage == "fit":
            self.backbone.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch of the training split."""
        smoothing = float(self.hparams["label_smoothing"])
        loss = F.cross_entropy(self._logits(batch.images), batch.labels, label_smoothing=smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the top-1 of one batch of the validation split.

        Raises:
            RunError: The unit of the batch cannot be read any further.
        """
        if batch.failure is not None:
            raise RunError(batch.failure)
        if not len(batch.labels):  # an empty unit, or bad rows only
            return
        right = self._logits(batch.images).argmax(dim=-1) == batch.labels  # [images]
        self.log("val_top1", right.float().mean(), prog_bar=True, batch_size=len(right), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a linear warm-up and a cosine decay over all steps of `fit`."""
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

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits `[images, classes]` of uint8 images `[images, channels, height, width]`."""
        dtype = next(self.backbone.parameters()).dtype
        logits: Tensor = self.backbone(normalised(images, self.data_config, dtype))
        return logits
