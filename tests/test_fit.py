from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything

from headprobe.data.training import TrainingDataModule
from headprobe.errors import UsageError
from headprobe.fit_steps import Fit

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "pretrained_cfg_overlay": {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small() -> Fit:
    return Fit("vit_tiny_patch16_224", pretrained=False, num_classes=10, options=SMALL)


def fitted(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of a small model before and after an epoch over the digits."""
    seed_everything(0)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_model_summary=False, **options)
    trainer.fit(model, datamodule=TrainingDataModule(batch_size=64))
    assert 0 <= float(trainer.callback_metrics["val_top1"]) <= 1
    return before, model.backbone.state_dict()


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_fit_changes_every_weight_and_the_same_seed_changes_them_alike(tmp_path: Path) -> None:
    (before, first), (_, second) = fitted(tmp_path), fitted(tmp_path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in first.items())


def test_the_backbone_is_built_for_evaluation_and_set_to_training() -> None:
    model = small()
    assert not model.backbone.training
    model.setup("fit")
    assert model.backbone.training


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(UsageError, match="'test_vit' has no classifier to score"):
        Fit("test_vit", pretrained=False, num_classes=0)


def test_channels_that_disagree_are_refused() -> None:
    with pytest.raises(UsageError, match=r"different numbers of channels.*'in_chans': 1"):
        Fit("test_vit", pretrained=False, options={"in_chans": 1})
