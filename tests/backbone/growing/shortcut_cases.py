"""A small ViT with its joins and shortcuts, masks for it, and plain forward passes to hold them to."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from headprobe.backbone.growing.beginnings import Join
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.shortcuts import Shortcuts
from headprobe.backbone.growing.trials import Company, find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.masking.ablation import masked_logits
from tests.conftest import perturbed

TOKENS, HEADS, DEPTH = 17, 3, 3
SIZE = (3, 64, 64)


def small(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"img_size": 64, "embed_dim": 48, "num_heads": HEADS, "depth": DEPTH, "num_classes": 10}
    return perturbed(timm.create_model(name, **size | options))


Found = tuple[HeadLayout, tuple[Join, ...], Shortcuts, tuple[Company, ...]]


def found_in(model: nn.Module, semantics: Semantics = "slot") -> Found:
    """Look for joins and shortcuts as a run does."""
    layout = find_heads(model, SIZE, "small", semantics)
    joins, companies, calls = find_joins(model, layout)
    return layout, joins, find_shortcuts(model, layout, joins, companies, calls), companies


@cache
def setup() -> tuple[Any, Found]:
    """Give a model that no test changes."""
    model = small()
    return model, found_in(model)


def noise(images: int) -> Tensor:
    return torch.randn(images, *SIZE, generator=torch.Generator().manual_seed(5))


def masks(*heads: Sequence[tuple[int, int]]) -> Tensor:
    """Give masks of heads as (layer, head)."""
    keep = torch.ones(len(heads), DEPTH, HEADS, dtype=torch.bool)
    for mask, of_mask in enumerate(heads):
        for layer, head in of_mask:
            keep[mask, layer, head] = False
    return keep


SINGLE = masks(*([(layer, head)] for layer in range(DEPTH) for head in range(HEADS)))


def random_masks() -> Tensor:
    """Give masks of several layers, one of them without heads, one of a whole layer and two of the same heads."""
    keep = torch.rand(8, DEPTH, HEADS, generator=torch.Generator().manual_seed(3)) < 0.7
    keep[1] = True
    keep[2, 1] = False
    keep[4] = keep[3]
    return keep


def growing_logits(
    model: nn.Module, found: Found, keep: Tensor, images: Tensor, shortcuts: Shortcuts, budget: int = 10_000
) -> Tensor:
    layout, joins, _, _ = found
    with GrowingPass(model, layout, joins, keep, shortcuts) as growing:
        plan = growing.plan(len(images), budget)
        return torch.cat([growing.logits(part, plan) for part in images.split(plan.images)], dim=1)


def plain_logits(model: nn.Module, layout: HeadLayout, keep: Tensor, images: Tensor) -> Tensor:
    return torch.stack([model(images), *(masked_logits(model, layout, images, mask) for mask in keep)])


def hold_to_plain_passes(model: nn.Module, found: Found) -> None:
    """Compare all kinds of masks with plain passes, and make sure that the masks do something."""
    for keep in (SINGLE, random_masks()):
        expected = plain_logits(model, found[0], keep, noise(3))
        assert (expected[1:] - expected[0]).abs().amax() > 1e-3 * expected.abs().max()
        torch.testing.assert_close(
            growing_logits(model, found, keep, noise(3), found[2]), expected, atol=1e-5, rtol=1e-5
        )
