"""How a plain vision transformer reads its logits from the residual stream: pooled tokens, a norm, a linear classifier.

A head's share of a logit follows, since all that the heads add is still there at the end of the stream. The norm's
scale is taken as the image has it, so that the share is linear in what a head adds.

Source: Gandelsman, Efros & Steinhardt, 2024, section 3, https://arxiv.org/abs/2310.05916.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import RmsNorm
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from headprobe.backbone.heads.layout import HeadLayout
from headprobe.metrics.projection import HeadProjection

PLAIN = {VisionTransformer: Block, Eva: EvaBlock}
"""Models whose blocks add what their heads give to one stream, and the blocks."""


@dataclass(frozen=True)
class Readout:
    """Where a model's logits come from.

    Attributes:
        norm: Name of the norm before the classifier.
        centred: Whether it takes away the mean over channels.
        eps: What it adds to the variance.
        weight: The classifier behind the norm's own scale `[classes, dim]`, centred where the norm centres.
        pools: Whether tokens are averaged; else the first is taken.
        norm_first: Whether the norm comes before the average.
        prefix: Leading tokens that the average leaves out.
    """

    norm: str
    centred: bool
    eps: float
    weight: Tensor
    pools: bool
    norm_first: bool
    prefix: int

    def token_weights(self, stream: Tensor, tokens: int) -> Tensor:
        """Return each token's weight in the logits: its share in the pooling over the norm's scale, `[images, tokens]`.

        Args:
            stream: What entered the norm, `[images, tokens, dim]`, or `[images, dim]` where tokens are pooled before.
            tokens: Tokens of the stream.
        """
        wide = stream.detach().double()
        squares = (wide - wide.mean(dim=-1, keepdim=True)) if self.centred else wide
        scale = torch.rsqrt(squares.square().mean(dim=-1) + self.eps)  # [images, tokens] or [images]
        if scale.dim() == 1:
            scale = scale[:, None].expand(-1, tokens)
        share = torch.zeros(tokens, dtype=scale.dtype, device=scale.device)
        if self.pools:
            share[self.prefix :] = 1 / (tokens - self.prefix)
        else:
            share[0] = 1
        return scale * share

    def direct(self, slots: Tensor, weights: Tensor, labels: Tensor, projection: HeadProjection) -> Tensor:
        """Return what each head adds to the logit of its image's label, `[images, heads]`, float64.

        Args:
            slots: What enters the output projection `[images, tokens, heads, head_dim]`.
            weights: From `token_weights`.
            labels: `[images]`.
            projection: The layer's output projection by head.
        """
        pooled = torch.einsum("it,ithd->ihd", weights, slots.detach().double())
        towards = self.weight.to(slots.device)[labels]  # [images, dim]
        by_head = torch.einsum("io,hod->ihd", towards, projection.weight.to(slots.device).double())
        return (pooled * by_head).sum(dim=-1)


def readout_of(backbone: nn.Module, layout: HeadLayout) -> Readout | str:
    """Return how a model's logits are read from its stream, or the reason why that is not known."""
    plain = next((block for kind, block in PLAIN.items() if type(backbone) is kind), None)
    model: Any = backbone
    if plain is None or not all(type(block) is plain for block in model.blocks):
        return "not a plain vision transformer, whose logits are sums over its heads"
    if getattr(model, "attn_pool", None) is not None or model.global_pool not in ("token", "avg"):
        return "its tokens are pooled by more than an average"
    if not isinstance(model.head, nn.Linear):
        return "it has no linear classifier"
    if any(layer.inner_norm for layer in layout.layers):
        return "a norm stands between its heads and their output projection"
    norms = {name: norm for name in ("norm", "fc_norm") if not isinstance(norm := getattr(model, name), nn.Identity)}
    if len(norms) != 1:
        return "it has no norm before its classifier, or two"
    ((name, norm),) = norms.items()
    centred = isinstance(norm, nn.LayerNorm)
    if not centred and not isinstance(norm, (RmsNorm, nn.RMSNorm)):
        return f"its norm before the classifier is a {type(norm).__name__}"
    own = torch.ones(1) if norm.weight is None else norm.weight
    weight = (model.head.weight * own).detach().double()  # [classes, dim]
    if centred:
        weight = weight - weight.mean(dim=1, keepdim=True)
    prefix = 0 if getattr(model, "pool_include_prefix", False) else int(model.num_prefix_tokens)
    pools = model.global_pool == "avg"
    eps = float(norm.eps if norm.eps is not None else torch.finfo(own.dtype).eps)
    return Readout(name, centred, eps, weight, pools, name == "norm", prefix if pools else 0)


@contextmanager
def seen_by_norm(backbone: nn.Module, readout: Readout | None) -> Iterator[list[Tensor]]:
    """Keep what enters the norm before the classifier while the context is open, pass after pass."""
    seen: list[Tensor] = []
    if readout is None:
        yield seen
        return
    norm = backbone.get_submodule(readout.norm)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
