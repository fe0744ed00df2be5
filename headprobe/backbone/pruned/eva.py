"""EVA's attention with fewer heads than its model has channels for; DINOv3 is built of it too."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from headprobe.backbone.pruned.linear import head_channels, taken
from headprobe.backbone.pruned.plain import shrink_projections
from headprobe.backbone.pruned.rope import become, rope_of_kept


class PrunedEvaAttention(EvaAttention):  # type: ignore[misc]  # timm's classes have no types
    """timm's `EvaAttention`, whose own forward pass takes the width of all heads for the model's."""

    kept_heads: Tensor  #: which heads of the architecture it has `[heads]`
    heads_before: int  #: how many heads the architecture has

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the attention's output `[rows, tokens, dim]`, as timm's does.

        Args:
            x: `[rows, tokens, dim]`.
            rope: Rotary positions of the patches, of the architecture's heads.
            attn_mask: As `scaled_dot_product_attention` takes it.
            is_causal: The same.
        """
        rope = rope_of_kept(self, rope)
        query, key, value = self._projected(x)  # each [rows, heads, tokens, head_dim]
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = (self._turned(part, rope).type_as(value) for part in (query, key))

        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            heads = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal
            )
        else:
            heads = self._weights(query, key, attn_mask, is_causal) @ value

        concatenated = self.norm(heads.transpose(1, 2).flatten(2))  # [rows, tokens, heads * head_dim]
        gate = getattr(self, "gate", None)
        if gate is not None:
            concatenated = concatenated * gate(x).sigmoid()
        found: Tensor = self.proj_drop(self.proj(concatenated))
        return found

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, `[rows, heads, tokens, head_dim]` each."""
        if self.qkv is None:
            parts = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            parts = list(biased_projection(self, x).chunk(3, dim=-1))
        query, key, value = (torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def _turned(self, part: Tensor, rope: Tensor) -> Tensor:
        """Turn queries or keys of patches by their positions; class token and registers have none."""
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        turned = apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)
        return torch.cat([part[:, :, :prefix], turned], dim=2)

    def _weights(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return the attention weights `[rows, heads, tokens, tokens]`, where attention is not fused."""
        scores = (query * self.scale) @ key.transpose(-2, -1)
        if is_causal:
            scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights: Tensor = self.attn_drop(scores.softmax(dim=-1))
        return weights


def biased_projection(attention: Any, x: Tensor) -> Tensor:
    """Return queries, keys and values side by side; keys have a bias of 0 that is not trained.

    Args:
        attention: An attention module of EVA, BEiT or Swin v2.
        x: `[rows, tokens, dim]`.
    """
    weight, bias = attention.qkv.weight, None
    if attention.q_bias is not None:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if bias is not None and attention.qkv_bias_separate:
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def shrink_eva(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of EVA's attention.

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    become(attention, PrunedEvaAttention, kept)
    shrink_biases(attention, kept)
    shrink_projections(attention, kept)


def shrink_biases(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads in biases that are apart from their projections, as EVA, BEiT and Swin v2 have them."""
    if attention.q_bias is None:
        return
    own = head_channels(kept, attention.proj.in_features // attention.num_heads)
    attention.q_bias, attention.v_bias = taken(attention.q_bias, own), taken(attention.v_bias, own)
    attention.register_buffer("k_bias", attention.k_bias[own.to(attention.k_bias.device)], persistent=False)
