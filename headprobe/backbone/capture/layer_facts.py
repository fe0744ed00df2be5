"""What the metrics need of each layer: where its tokens lie, how its heads write to the stream, what is undefined."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout, parent_of
from headprobe.backbone.sandbox import evaluating, example_images
from headprobe.metrics.attention.statistics import RATIOS, STATISTICS
from headprobe.metrics.projection import HeadProjection
from headprobe.metrics.token_grid import TokenGrid

NOT_MERGED = 0.45
"""How far from whole doublings of the stride two grids may be: 3 patches merged to 2, with padding, are 0.42 off."""


CONTRIBUTION = "contribution_spectrum"
"""What a head adds to the residual stream, by frequency."""


@dataclass(frozen=True)
class LayerFacts:
    """What the metrics need of one layer.

    Attributes:
        outputs: Where the tokens lie that leave the attention operator.
        attention: Where the tokens lie that attend to each other.
        projection: Its output projection by head, LayerScale included; None without a linear one.
        undefined: Statistics that the layer does not have, with the reasons, where its tokens are not the reason.
    """

    outputs: TokenGrid
    attention: TokenGrid
    projection: HeadProjection | None
    undefined: dict[str, str]


def layer_facts(backbone: nn.Module, layout: HeadLayout) -> tuple[LayerFacts, ...]:
    """Gather the facts of every layer, with one tapped forward pass of one image of noise.

    Projections are copies of the weights as they are now.
    """
    facts: list[LayerFacts] = []

    def gather(record: LayerRecord) -> None:
        layer = layout.layers[record.layer]
        outputs = _outputs(backbone, layout, layer)
        attention = _attention(backbone, layout, layer, record, outputs)
        projection = _projection(backbone, layer)
        undefined = _undefined(backbone, layer, record, projection)
        facts.append(LayerFacts(outputs, attention, projection, undefined))

    with evaluating(backbone), torch.no_grad(), tapping(backbone, layout, [Tap(gather)]):
        backbone(example_images(backbone, layout.input_size, 1))
    return tuple(facts)


def _outputs(backbone: nn.Module, layout: HeadLayout, layer: AttentionLayer) -> TokenGrid:
    """Describe the tokens that leave a layer's operator."""
    if layer.kind in ("pool", "class"):
        return TokenGrid(layer.tokens, pooled=True)

    class_token = layer.prefix > 0 and _has_class_token(backbone)
    if layer.grid is not None and (layer.window is not None or layer.rows == 1):
        patch = _patch_size(backbone, layout, layer.grid)
        return TokenGrid(layer.tokens, layer.prefix, class_token, layer.grid, patch, layer.window, layer.shift)
    # without a grid, or in windows of unknown places
    return TokenGrid(layer.tokens, layer.prefix, class_token, rows=layer.rows, unplaced=not _in_image_order(layer))


def _in_image_order(layer: AttentionLayer) -> bool:
    """Return whether each row is an image with its tokens in order, even if their grid is unknown."""
    return layer.site.ordered and layer.rows == 1


def _attention(
    backbone: nn.Module, layout: HeadLayout, layer: AttentionLayer, record: LayerRecord, outputs: TokenGrid
) -> TokenGrid:
    """Describe the tokens that a layer's queries can attend to."""
    if record.attention is None:
        return TokenGrid(outputs.tokens, rows=outputs.windows, unplaced=True)

    rows, _, queries, keys = record.attention.shape
    if layer.kind in ("pool", "class"):
        prefix = layout.prefix_tokens
        return TokenGrid(keys, prefix, prefix > 0 and _has_class_token(backbone), pooled=True)

    # pooled queries or keys are other tokens than the operator's output has
    all_to_all = queries == keys == outputs.tokens and rows == outputs.windows
    if all_to_all and layer.kind in ("global", "window"):
        return outputs
    return TokenGrid(keys, rows=rows, unplaced=True)


def _has_class_token(backbone: nn.Module) -> bool:
    """Return whether the first prefix token is a class token; NaFlex models keep it in their module `embeds`."""
    homes = (backbone, getattr(backbone, "embeds", None))
    return any(getattr(home, "cls_token", None) is not None for home in homes)


def _patch_size(backbone: nn.Module, layout: HeadLayout, grid: tuple[int, int]) -> tuple[float, float]:
    """Return the distance from one patch to the next, `(height, width)` in pixels.

    Later stages merge 2 x 2 patches and pad a grid with an odd number of them. So the grid's ratio to the first grid,
    rounded to a power of two, gives the stride; its ratio to the image is off where padding came in.
    """
    # how often the patches were merged since the first grid, by rows and by columns
    first = next((layer.grid for layer in layout.layers if layer.grid is not None), grid)
    doublings = [math.log2(a / b) for a, b in zip(first, grid, strict=True)]
    if any(abs(number - round(number)) > NOT_MERGED for number in doublings):  # a branch of its own, not a later stage
        first, doublings = grid, [0.0, 0.0]
    merged = [2.0 ** round(number) for number in doublings]

    # the stride of the first grid: as the image divides, or the patch embedding's own where that fits the grid
    # (it does not where other stages come before the first attention layer)
    sizes = list(zip(layout.input_size[1:], first, strict=True))  # pixels and patches, by rows and by columns
    height, width = (pixels / patches for pixels, patches in sizes)
    embedded = _strides(getattr(backbone, "patch_embed", None))
    if embedded is not None:
        fits = [abs(pixels / stride - patches) < 1 for stride, (pixels, patches) in zip(embedded, sizes, strict=True)]
        height, width = embedded if all(fits) else (height, width)
    return (float(height) * merged[0], float(width) * merged[1])


def _strides(embed: Any) -> tuple[float, float] | None:
    """Return a patch embedding's stride on the image, `(height, width)` in pixels; None where it is not known."""
    if hasattr(embed, "feat_ratio"):  # hybrids embed a convolutional network's map, so its stride counts too
        height, width = embed.feat_ratio(as_scalar=False)
        return float(height), float(width)
    size = getattr(embed, "patch_size", None)
    if size is None:
        return None
    return (float(size), float(size)) if isinstance(size, int) else (float(size[0]), float(size[1]))


def _projection(backbone: nn.Module, layer: AttentionLayer) -> HeadProjection | None:
    """Return a layer's output projection, its rows scaled by LayerScale where the block has it.

    None where it is not linear, or takes other channels too.
    """
    linear = backbone.get_submodule(layer.projection)
    if not isinstance(linear, nn.Linear) or linear.in_features != layer.channels.channels:
        return None

    # [out, channels] to [out, 1, heads, head_dim] to [out, heads x head_dim]: heads in order, interleaved or not
    weight = layer.channels.split(linear.weight.detach()[:, None]).flatten(1)

    block: Any = backbone.get_submodule(parent_of(layer.name))
    scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls")]  # ls: parallel branches
    for scale in (*scales, getattr(block, "gamma_1", None)):
        if isinstance(scale, Tensor) and layer.site.residual:
            weight = weight * scale.detach()[:, None]  # [out, 1]
    return HeadProjection.split(weight, layer.heads)


def _undefined(
    backbone: nn.Module, layer: AttentionLayer, record: LayerRecord, projection: HeadProjection | None
) -> dict[str, str]:
    """Return which statistics a layer does not have for reasons beyond its tokens, with the reasons."""
    reasons: dict[str, str] = {}
    if record.attention is None:
        without = [name for name in (*STATISTICS, *RATIOS) if name != "output_norm_ratio"]
        reasons |= dict.fromkeys(without, layer.site.why or "its attention operator was not found")

    if projection is None:
        reason = "the layer has no linear output projection of its own"
        return dict.fromkeys(("value_weighted_attention", "output_norm_ratio", CONTRIBUTION), reason) | reasons
    if record.norm_follows:
        reason = "a norm stands between the output projection and the residual stream"
        reasons |= dict.fromkeys(("output_norm_ratio", CONTRIBUTION), reason)
    elif record.stream_before is None:
        reason = "the layer adds to no residual stream that can be seen"
        reasons |= dict.fromkeys(("output_norm_ratio", CONTRIBUTION), reason)

    if record.attention is None:
        return reasons
    if layer.inner_norm or getattr(backbone.get_submodule(layer.name), "gate", None) is not None:
        reasons["value_weighted_attention"] = "a norm or gate stands between the values and the output projection"
    elif record.values is None or record.values.shape[-1] != projection.weight.shape[-1]:
        reasons["value_weighted_attention"] = "the values that enter its output projection were not found"
    return reasons
