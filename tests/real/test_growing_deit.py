"""The growing pass on published weights and real images, held to one plain hooked forward pass per mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.heads.find import find_heads
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.masks.spec import MaskSpec, expand_all

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPECS = [MaskSpec("each:head"), MaskSpec("each:layer"), MaskSpec("each:index"), MaskSpec("random:6-30/12:0-1")]


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    weights = Path(__file__).resolve().parents[3] / "shared/deit_tiny/model.safetensors"
    if not weights.exists():
        pytest.skip("../shared/deit_tiny is absent: real weights are not part of the repository")
    model: nn.Module = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(weights))
    return model.eval()


@pytest.fixture(scope="module")
def images(deit: nn.Module) -> Tensor:
    folder = Path(__file__).resolve().parents[3] / "shared/imagenet_sample"
    if not folder.exists():
        pytest.skip("../shared/imagenet_sample is absent: real images are not part of the repository")
    data = ImageNetDataModule(path=str(folder), max_images=3, num_workers=0)
    config = timm.data.resolve_model_data_config(deit)
    data.prepare_data()
    data.bind(config, 1000)
    pixels = torch.cat([batch.images for batch in data.test_dataloader()]).float() / 255
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std


def plain_logits(model: Any, images: Tensor, heads: frozenset[tuple[int, int]]) -> Tensor:
    """Mask by hand: a pre-hook on each projection that zeroes the heads' 64 channels."""

    def hook_of(layer: int) -> Callable[..., tuple[Tensor]]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            for masked_layer, head in heads:
                if masked_layer == layer:
                    x[..., 64 * head : 64 * (head + 1)] = 0
            return (x,)

        return hook

    handles = [block.attn.proj.register_forward_pre_hook(hook_of(layer)) for layer, block in enumerate(model.blocks)]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def test_every_mask_of_deit_tiny_equals_its_own_forward_pass(deit: nn.Module, images: Tensor) -> None:
    layout = find_heads(deit, (3, 224, 224), "deit_tiny_patch16_224")
    masks = [variant.mask for variant in expand_all(SPECS, layout.heads_per_layer, layout.model)]
    assert len(masks) == 36 + 12 + 3 + 6
    keep = torch.stack([named.mask.keep() for named in masks])
    with GrowingPass(deit, layout, find_joins(deit, layout).joins, keep) as growing:
        plan = growing.plan(len(images), 64)
        found = torch.cat([growing.logits(part, plan) for part in images.split(plan.images)], dim=1)
    assert (found[0] - deit(images)).abs().max() <= 1e-5
    worst = [
        float((found[1 + number] - plain_logits(deit, images, named.mask.masked)).abs().max())
        for number, named in enumerate(masks)
    ]
    assert np.max(worst) <= 1e-5
