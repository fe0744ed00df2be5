"""The published DeiT-Ti weights at a smaller image size: timm's filter resamples them, and they still classify."""

from pathlib import Path

import lightning
import pytest

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.module import HeadProbe

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_deit_at_160_pixels_keeps_most_of_its_accuracy(
    deit_tiny_weights: Path, sample_images: Path, tmp_path: Path
) -> None:
    probe = HeadProbe("deit_tiny_patch16_224", str(deit_tiny_weights), options={"img_size": 160})
    assert any(decision.shown and "pos_embed from [1, 197, 192] to [1, 101, 192]" in decision.text
               for decision in probe.decisions())  # fmt: skip
    probe.choose_masks(["none"])
    data = ImageNetDataModule(str(sample_images), num_workers=0)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.test(probe, data, verbose=False)
    assert probe.scores is not None
    # 396 of 500 at 224 pixels; DeiT loses several points at 160 (Touvron 2019, arXiv 1906.06423, on why), not all
    assert 330 <= int(probe.scores.top1_count[0]) <= 396
