"""Models that were trained without a classifier, or with an embedding in its place: random weights at small sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import headprobe
from headprobe.errors import UsageError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}

FEATURES = {
    "vit_small_patch14_dinov2": (SMALL, 48),
    "vit_small_patch16_dinov3": (SMALL, 48),
    "vit_base_patch16_siglip_224": (SMALL, 48),
    "vit_base_patch16_clip_224.openai": (SMALL, 512),  # the space of texts
    "vit_base_patch16_224.mae": (SMALL, 48),
}
"""Options, and the width of the feature that text embeddings and class means live in."""


@pytest.mark.parametrize("classifier", ["class-mean", "knn:5"])
@pytest.mark.parametrize("name", sorted(FEATURES))
def test_means_and_neighbours_are_fitted_on_what_timm_gives(
    name: str, classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, width = FEATURES[name]
    torch.manual_seed(0)
    probe = headprobe.HeadProbe(name, pretrained=False, options=options, classifier=classifier)
    probe.choose_masks("layer:0")
    data = headprobe.ImageNetDataModule(max_images=60, num_workers=0)
    trainer = headprobe.ProbeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(probe, datamodule=data, verbose=False)
    assert probe.classifying is not None
    assert probe.classifying.classifier is not None
    assert (probe.classifying.classifier.features, probe.num_classes) == (width, 10)
    assert probe.scores is not None
    assert np.isfinite(probe.scores.nll).all()
    assert probe.scores.nll[0] != probe.scores.nll[1]


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_a_file_of_text_embeddings_must_have_the_features_width(name: str, tmp_path: Path) -> None:
    options, width = FEATURES[name]
    file = tmp_path / "texts.safetensors"
    tensors = {"weight": torch.randn(7, width), "logit_scale": torch.tensor(4.6)}
    save_file(tensors, file)
    torch.manual_seed(0)
    probe = headprobe.HeadProbe(name, pretrained=False, options=options, classifier=str(file))
    probe.choose_masks("none")
    probe.plan_passes(2)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        logits = probe.masked_logits(images)[0]
        model: Any = probe.backbone
        feature = (
            model(probe.normalised(images))
            if width == 512
            else model.forward_head(model.forward_features(probe.normalised(images)), pre_logits=True)
        )
    cosines = torch.nn.functional.cosine_similarity(feature.double()[:, None], tensors["weight"].double(), dim=-1)
    torch.testing.assert_close(logits, cosines * float(tensors["logit_scale"].exp()), rtol=1e-5, atol=1e-5)

    save_file({"weight": torch.randn(7, width + 1)}, file)
    other = headprobe.HeadProbe(name, pretrained=False, options=options, classifier=str(file))
    other.choose_masks("none")
    with pytest.raises(
        UsageError, match=f"for features of {width + 1} numbers, and the feature of model .* has {width}"
    ):
        other.plan_passes(2)


def test_timm_has_these_names() -> None:
    assert all(timm.is_model(name) for name in FEATURES)
