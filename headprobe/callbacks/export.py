"""Saves what `fit` trained as safetensors, which open anywhere and can run no code."""

from pathlib import Path

import lightning

from headprobe.backbone.weights import save_backbone
from headprobe.module import HeadProbe


class WeightsExport(lightning.Callback):
    """Writes `model.safetensors` with the recipe of its architecture after training."""

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the weights once, from the first process."""
        if trainer.is_global_zero and isinstance(pl_module, HeadProbe):
            directory = Path(trainer.log_dir or trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_backbone(pl_module.backbone, directory / "model.safetensors", pl_module.source)
            pl_module.print(f"weights: {directory / 'model.safetensors'}")
