"""Saves the model that `fit` trained as safetensors, which open anywhere and can run no code."""

from pathlib import Path

import lightning

from headprobe.backbone.weights import save_backbone
from headprobe.callbacks.identity import run_directory
from headprobe.fit_steps import Fit
from headprobe.report.table import console


class WeightsExport(lightning.Callback):
    """Writes `model.safetensors` with the recipe of its architecture after training."""

    def __init__(self) -> None:
        self._directory = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the weights once, from the first process."""
        if trainer.is_global_zero and isinstance(pl_module, Fit):
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._directory / "model.safetensors"
            save_backbone(pl_module.backbone, file, pl_module.source)
            console.print(f"Weights: {file}", soft_wrap=True)
