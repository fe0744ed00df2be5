"""Window attention of Swin v2 with fewer heads than its model has channels for."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor

from headprobe.backbone.pruned.eva import biased_projection, shrink_biases
from headprobe.backbone.pruned.linear import head_channels, keep_outputs, taken
from headprobe.backbone.pruned.plain import shrink_projections

LARGEST_SCALE = math.log(100.0)
"""Logits are multiplied by at most 100 (Liu et al., 2022, section 3.2, https://arxiv.org/abs/2111.09883)."""


class PrunedSwinV2Attention(WindowAttention):  # type: ignore[misc]  # timm's classes have no types
    """timm's attention of Swin v2, whose own forward pass takes the width of all heads for the model's."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention's output `[windows, tokens, dim]`, as timm's does.

        Args:
            x: `[windows, tokens, dim]`, windows of an image one after the other.
            mask: `[windows of an image, tokens, tokens]`, 0 or -100 where windows are shifted.
        """
        parts = biased_projection(self, x).chunk(3, dim=-1)
        query, key, value = (torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=LARGEST_SCALE).exp() + self._biases()
        if mask is not None:
            # [images, windows of an image, heads, tokens, tokens]
            by_image = torch.unflatten(scores, 0, (-1, mask.shape[0])) + mask[None, :, None]
            scores = by_image.flatten(0, 1)
        heads = self.attn_drop(scores.softmax(dim=-1)) @ value  # [windows, heads, tokens, head_dim]
        found: Tensor = self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))
        return found

    def _biases(self) -> Tensor:
        """Return the biases by relative position `[1, heads, tokens, tokens]`."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)  # [relative positions, heads]
        tokens = self.window_size[0] * self.window_size[1]
        biases = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(biases[None])


def shrink_swin_v2(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of Swin v2's attention, with their scales and biases.

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    attention.__class__ = PrunedSwinV2Attention
    own = head_channels(kept, 1)
    attention.logit_scale = taken(attention.logit_scale, own)
    keep_outputs(attention.cpb_mlp[-1], own)
    shrink_biases(attention, kept)
    shrink_projections(attention, kept)
