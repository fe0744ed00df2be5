"""Saves the model that `fit` trained as safetensors, which open anywhere and can run no code."""

from pathlib import Path

import lightning

from headprobe.backbone.weights import pruned_source, save_backbone
from headprobe.callbacks.identity import run_directory
from headprobe.fit_steps import Fit
from headprobe.report.table import console


class WeightsExport(lightning.Callback):
    """Writes `model.safetensors` with the recipe of its architecture after training, or a pruned model's folder."""

    def __init__(self) -> None:
        self._directory = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the weights once, from the first process."""
        if trainer.is_global_zero and isinstance(pl_module, Fit):
            self._directory.mkdir(parents=True, exist_ok=True)
            console.print(_saved(pl_module, self._directory), soft_wrap=True)


def _saved(fit: Fit, directory: Path) -> str:
    """Write the trained weights and return where: a model with fewer heads becomes a pruned model's folder again."""
    pruned = pruned_source(fit.source)
    mask_spec = None if fit.masked is None else fit.masked.spec
    if fit.masked is not None:
        fit.masked.silence(fit.backbone)
    if pruned is None:
        file = directory / "model.safetensors"
        save_backbone(fit.backbone, file, fit.source, mask_spec)
        return f"Weights: {file}"
    from headprobe.backbone.pruned.directory import save_directory

    folder = directory / "pruned"
    about = {name: pruned[name] for name in ("parent", "mask", "ablation", "calibration") if name in pruned}
    about["fine_tuned"] = {"name": fit.source.name, "weights_sha256": pruned["weights_sha256"]}
    if mask_spec is not None:
        about["fine_tuned"]["mask_spec"] = mask_spec
    architecture = str(fit.backbone.pretrained_cfg["architecture"])  # type: ignore[index]  # timm: dict
    save_directory(fit.backbone, folder, architecture, fit.options, about)
    return f"Pruned model: {folder}"
