"""BEiT's attention with fewer heads than its model has channels for."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention
from torch import Tensor

from headprobe.backbone.pruned.eva import biased_projection, shrink_biases
from headprobe.backbone.pruned.linear import head_channels, taken
from headprobe.backbone.pruned.plain import shrink_projections
from headprobe.backbone.pruned.rope import become


class PrunedBeitAttention(Attention):  # type: ignore[misc]  # timm's classes have no types
    """timm's BEiT attention, whose own forward pass takes the width of all heads for the model's."""

    kept_heads: Tensor  #: which heads of the architecture it has `[heads]`
    heads_before: int  #: how many heads the architecture has

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Return the attention's output `[rows, tokens, dim]`, as timm's does.

        Args:
            x: `[rows, tokens, dim]`.
            shared_rel_pos_bias: Biases of all layers `[heads, tokens, tokens]`, of the architecture's heads.
        """
        parts = biased_projection(self, x).chunk(3, dim=-1)
        query, key, value = (torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        bias = self._biases(shared_rel_pos_bias)

        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            heads = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=drop)
        else:
            scores = (query * self.scale) @ key.transpose(-2, -1)
            if bias is not None:
                scores = scores + bias
            heads = self.attn_drop(scores.softmax(dim=-1)) @ value
        found: Tensor = self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))
        return found

    def _biases(self, shared: Tensor | None) -> Tensor | None:
        """Return the biases by relative position `[..., heads, tokens, tokens]`: its own, shared ones, their sum."""
        if shared is not None:
            shared = shared.index_select(shared.dim() - 3, self.kept_heads)
        if self.relative_position_bias_table is None:
            return shared
        own: Tensor = self._get_rel_pos_bias()
        return own if shared is None else own + shared


def shrink_beit(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of BEiT's attention, with their biases by relative position.

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    become(attention, PrunedBeitAttention, kept)
    if attention.relative_position_bias_table is not None:
        table = attention.relative_position_bias_table  # [relative positions, heads]
        attention.relative_position_bias_table = taken(table, head_channels(kept, 1), axis=1)
    shrink_biases(attention, kept)
    shrink_projections(attention, kept)
