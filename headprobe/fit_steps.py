"""`Fit`: the training steps of `headprobe fit`, which made the bundled models."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from headprobe.backbone.preparation import normalised
from headprobe.backbone.weights import ModelSource, create_classifier, mask_of_weights
from headprobe.errors import RunError, UsageError

if TYPE_CHECKING:
    from headprobe.backbone.pruned.fixed_mask import FixedMask


class Fit(lightning.LightningModule):
    """Trains a timm model on a small dataset: from nothing, further, or without some of its heads.

    The loss is cross-entropy, the optimiser AdamW with a linear warm-up and a cosine decay. Validation gives top-1.
    Masked heads are set to zero in every forward pass, get no gradient, and write nothing in the weights that are
    saved; a model that headprobe prune wrote is trained with the heads that it has.

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
        mask_spec: Heads that stay masked, such as layer:3; those of weights that were trained so before, if not given.

    Attributes:
        source: What was built, and where its weights came from.
        backbone: The timm model.
        data_config: Its evaluation transform, as `headprobe.backbone.preparation.data_config` returns it.
        num_classes: Classes of its classifier.
        options: Arguments of `timm.create_model` that it was built with.
        masked: What is masked, None where nothing is.

    Raises:
        UsageError: The model cannot be built, has no classifier, or takes an unclear number of channels; or the mask
            is not one mask of heads that could be removed.
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
        mask_spec: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.source = ModelSource(name, weights, pretrained, num_classes, options or {}, train_size=True)
        # A new classifier is what training is for.
        classifier = create_classifier(self.source, trained=False)
        self.backbone, self.data_config, self.num_classes, self.options = classifier[:4]
        self.masked = _masked(self.backbone, self.data_config["input_size"], mask_spec, mask_of_weights(self.source))
        self._hooks = ExitStack()

    def setup(self, stage: str) -> None:
        """Put the backbone into training mode: it was built in evaluation mode, which Lightning would keep."""
        if stage == "fit":
            self.backbone.train()
        if self.masked is not None:
            self._hooks.enter_context(self.masked.applied(self.backbone))

    def teardown(self, stage: str) -> None:
        """Remove the mask's hooks, and what masked heads would write without it."""
        self._hooks.close()
        if self.masked is not None:
            self.masked.silence(self.backbone)

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


def _masked(
    backbone: Any, input_size: tuple[int, int, int], wanted: str | None, before: str | None
) -> "FixedMask | None":
    """Return the mask to train under: what is wanted, else that of the weights.

    Raises:
        UsageError: It is no mask of heads that could be removed, or heads that the weights were trained without are
            not in it: they would learn again.
    """
    spec = wanted or before
    if spec is None:
        return None
    from headprobe.backbone.pruned.fixed_mask import fixed_mask  # here: few models are trained under a mask

    found = fixed_mask(backbone, input_size, spec)
    if before is not None and bool((found.keep & ~fixed_mask(backbone, input_size, before).keep).any()):
        raise UsageError(
            f"model.mask_spec must hold the heads that the weights were trained without, {before}: they would learn "
            f"again; leave it out, or give {wanted}+{before}, got {wanted}"
        )
    return found
