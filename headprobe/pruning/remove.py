"""Removes masked heads from a timm model for good, and proves that its logits are those of the masked model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.masking.replacement import Replacement
from headprobe.backbone.pruned.no_heads import NoHeads
from headprobe.backbone.pruned.record import add_to_record
from headprobe.backbone.pruned.shrink import refuse_unprunable, shrink_layer
from headprobe.backbone.sandbox import copied, evaluating, example_images, in_single, relative, trying
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import ZERO
from headprobe.pruning.fold import FOLDED, folded, why_not_folded, write_projection
from headprobe.text import counted

TOLERANCE = 1e-5
"""Largest difference of the logits in float32, relative to the largest logit."""

IMAGES_OF_NOISE = 4


def without_heads(backbone: nn.Module, layout: HeadLayout, keep: Tensor, fill: Replacement) -> nn.Module:
    """Return a copy of a model without some heads, which computes what the model computes under their mask.

    Args:
        backbone: The model; it stays as it is.
        layout: Its attention layers.
        keep: `[layers, max heads]` bool, True = keep.
        fill: What fills the masked slots.

    Raises:
        UsageError: What fills the slots cannot be folded into weights, or a layer's class does not allow it.
    """
    hit = [(number, layer) for number, layer in enumerate(layout.layers) if not bool(keep[number, : layer.heads].all())]
    refuse_unfoldable(backbone, [layer for _, layer in hit], fill.name)
    smaller = copied(backbone, layout.model)
    for number, layer in hit:
        _remove(smaller, number, layer, keep[number, : layer.heads].cpu(), fill)
    return smaller


def refuse_unfoldable(backbone: nn.Module, layers: Sequence[AttentionLayer], kind: str) -> None:
    """Refuse layers whose heads cannot be removed, or not with what fills their slots.

    Args:
        backbone: The model.
        layers: Layers of which heads are to be removed.
        kind: What fills their slots, a kind of ablation.

    Raises:
        UsageError: With the layer and the reason.
    """
    if kind not in FOLDED:
        raise UsageError(why_not_folded(kind))
    for layer in layers:
        refuse_unprunable(backbone, layer.name)
        gated = getattr(backbone.get_submodule(layer.name), "gate", None) is not None
        if gated and kind != ZERO:
            raise UsageError(
                f"the ablation {kind} cannot be folded into weights: a gate stands between the heads of "
                f"{layer.name!r} and their projection; choose zero, got {kind}"
            )


def _remove(smaller: nn.Module, number: int, layer: AttentionLayer, kept: Tensor, fill: Replacement) -> None:
    """Remove the masked heads of one layer, in place."""
    attention: Any = smaller.get_submodule(layer.name)
    new = folded(attention.proj, number, kept, fill)
    heads = torch.nonzero(kept).flatten().tolist()
    shrink_layer(smaller, layer.name, heads, bias=new.bias is not None)
    add_to_record(smaller, layer.name, layer.heads, heads)
    left: Any = smaller.get_submodule(layer.name)
    if not isinstance(left, NoHeads):
        write_projection(left.proj, new)
    elif new.bias is not None:
        with torch.no_grad():
            left.bias.copy_(left.bias.double() + new.bias)


# -- the proof ---------------------------------------------------------------------------------------------------------


def prove_same(
    smaller: nn.Module,
    backbone: nn.Module,
    layout: HeadLayout,
    keep: Tensor,
    fill: Replacement,
    images: Tensor | None = None,
) -> float:
    """Return how far a smaller model's logits are from the masked model's, relative to the largest.

    Models in half precision are compared in float32, where rounding hides nothing.

    Args:
        smaller: The model without the heads.
        backbone: The model with them.
        layout: Its attention layers.
        keep: `[layers, max heads]` bool, True = keep.
        fill: What fills the masked slots.
        images: `[images, channels, height, width]`, normalised; noise without them.

    Raises:
        RunError: The logits differ by more than rounding.
    """
    whole, pruned = in_single(backbone, layout.model), in_single(smaller, layout.model)
    if images is None:
        images = example_images(whole, layout.input_size, IMAGES_OF_NOISE, seed=3)
    with evaluating(whole), trying(whole, layout.gradients):
        masks = masks_of_rows(keep[None].to(images.device))
        with ablating(whole, layout, masks, lambda: (fill,)) as count:
            expected: Tensor = whole(images)
        count.check(layout)
    with evaluating(pruned), trying(pruned, layout.gradients):
        found: Tensor = pruned(images)
    difference = relative(found, expected)
    if not difference <= TOLERANCE:  # NaN too
        raise RunError(
            f"the logits of the pruned {layout.model!r} are not those of the masked model on "
            f"{counted(len(images), 'image')}: nothing was written; choose another ablation or mask, got a difference "
            f"of {difference:.1e} of the largest logit, where {TOLERANCE:.0e} is rounding"
        )
    return difference
