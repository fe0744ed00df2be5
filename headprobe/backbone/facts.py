"""Tells the metrics where a model's tokens lie, how its heads write to the stream, and what it has no number for."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.heads import AttentionLayer, HeadLayout, parent_of
from headprobe.backbone.layer_record import LayerRecord
from headprobe.backbone.taps import Tap, tapping
from headprobe.backbone.trace import evaluating, example_images
from headprobe.metrics.projection import HeadProjection
from headprobe.metrics.token_grid import TokenGrid

CONTRIBUTION = "contribution_spectrum"
"""What a head adds to the residual stream, by frequency."""


@dataclass(frozen=True)
class LayerFacts:
    """What the metrics must know of one layer.

    Attributes:
        grid: Where its tokens lie.
        projection: Its output projection by head, LayerScale included; None without a linear one.
        undefined: Statistics that it does not have for reasons beyond its tokens, with the reasons.
    """

    grid: TokenGrid
    projection: HeadProjection | None
    undefined: dict[str, str]


def layer_facts(backbone: nn.Module, layout: HeadLayout) -> tuple[LayerFacts, ...]:
    """Gather the facts of every layer, with one tapped forward pass of one image of noise.

    Projections are copies of the weights as they are now.
    """
    facts: list[LayerFacts] = []

    def gather(record: LayerRecord) -> None:
        layer = layout.layers[record.layer]
        projection = _projection(backbone, layer)
        undefined = _undefined(backbone, layer, record, projection)
        facts.append(LayerFacts(_token_grid(backbone, layout, layer, record), projection, undefined))

    with evaluating(backbone), torch.no_grad(), tapping(backbone, layout, [Tap(gather)]):
        backbone(example_images(backbone, layout.input_size, 1))
    return tuple(facts)


def _token_grid(backbone: nn.Module, layout: HeadLayout, layer: AttentionLayer, record: LayerRecord) -> TokenGrid:
    """Describe the tokens that a layer's queries can attend to."""
    keys = record.attention.shape[3]
    prefix = 0 if layer.window is not None else layout.prefix_tokens
    class_token = prefix > 0 and _has_class_token(backbone)
    if layer.kind == "pool":
        return TokenGrid(keys, prefix, class_token, pooled=True)
    if layer.grid is None or (layer.window is None and prefix + math.prod(layer.grid) != keys):
        return TokenGrid(keys, prefix, class_token)
    patch = _patch_size(backbone, layout, layer.grid)
    return TokenGrid(keys, prefix, class_token, layer.grid, patch, layer.window, layer.shift)


def _has_class_token(backbone: nn.Module) -> bool:
    """Say whether the first prefix token is a class token; NaFlex models keep theirs in a module of its own."""
    homes = (backbone, getattr(backbone, "embeds", None))
    return any(getattr(home, "cls_token", None) is not None for home in homes)


def _patch_size(backbone: nn.Module, layout: HeadLayout, grid: tuple[int, int]) -> tuple[float, float]:
    """Return pixels from one patch to the next; later stages merge 2 x 2 patches, with padding where one is left over.

    So the ratio of the grids, rounded to a power of two, tells the stride; the ratio of image and grid need not.
    """
    first = next((layer.grid for layer in layout.layers if layer.grid is not None), grid)
    merged = [2.0 ** round(math.log2(a / b)) for a, b in zip(first, grid, strict=True)]
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):  # hybrids embed the map of a convolutional network, whose stride counts too
        height, width = embed.feat_ratio(as_scalar=False)
    elif hasattr(embed, "patch_size"):
        height, width = embed.patch_size
    else:
        height, width = (size / places for size, places in zip(layout.input_size[1:], first, strict=True))
    return (float(height) * merged[0], float(width) * merged[1])


def _projection(backbone: nn.Module, layer: AttentionLayer) -> HeadProjection | None:
    """Return a layer's output projection, its rows scaled by LayerScale where the block has it."""
    linear = backbone.get_submodule(f"{layer.name}.proj")
    if not isinstance(linear, nn.Linear):
        return None
    weight = linear.weight.detach()
    block: Any = backbone.get_submodule(parent_of(layer.name))
    scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls")]  # ls: parallel branches
    for scale in (*scales, getattr(block, "gamma_1", None)):
        if isinstance(scale, Tensor) and layer.kind != "pool":
            weight = weight * scale.detach()[:, None]
    return HeadProjection.split(weight, layer.heads)


def _undefined(
    backbone: nn.Module, layer: AttentionLayer, record: LayerRecord, projection: HeadProjection | None
) -> dict[str, str]:
    """Return which norms and spectra a layer does not have, with the reasons."""
    if projection is None:
        reason = "the layer has no linear output projection"
        return dict.fromkeys(("value_weighted_attention", "output_norm_ratio", CONTRIBUTION), reason)
    reasons: dict[str, str] = {}
    if record.norm_follows:
        reason = "a norm stands between the output projection and the residual stream"
        reasons |= dict.fromkeys(("output_norm_ratio", CONTRIBUTION), reason)
    elif record.stream_before is None:
        reasons["output_norm_ratio"] = "the layer adds to no residual stream that can be seen"
    if layer.inner_norm or getattr(backbone.get_submodule(layer.name), "gate", None) is not None:
        reasons["value_weighted_attention"] = "a norm or gate stands between the values and the output projection"
    elif record.values is None:
        reasons["value_weighted_attention"] = "the layer's values cannot be seen"
    return reasons
