"""timm's attention with rotary positions, with fewer heads; EVA's is in its own file."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import AttentionRope
from torch import Tensor, nn

from headprobe.backbone.pruned.linear import head_channels
from headprobe.backbone.pruned.plain import shrink_projections


class PrunedAttentionRope(AttentionRope):  # type: ignore[misc]  # timm's classes have no types
    """timm's `AttentionRope`, whose model may hand it rotary positions of more heads than it has."""

    kept_heads: Tensor  #: which heads of the architecture it has `[heads]`
    heads_before: int  #: how many heads the architecture has

    def forward(self, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Take the positions of the heads that are there."""
        found: Tensor = super().forward(x, rope_of_kept(self, rope), *args, **kwargs)
        return found


def shrink_rope(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of attention with rotary positions.

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    become(attention, PrunedAttentionRope, kept)
    shrink_projections(attention, kept)
    attention.attn_dim = len(kept) * attention.head_dim
    if hasattr(attention, "num_kv_heads"):
        attention.num_kv_heads, attention.kv_dim = attention.num_heads, attention.attn_dim


def become(attention: Any, kind: type[nn.Module], kept: Sequence[int]) -> None:
    """Turn a module of timm into our subclass of its class, which knows which heads of the architecture it has.

    Args:
        attention: The module, changed in place; perhaps one of our subclass already.
        kind: Our subclass.
        kept: The heads to keep, by their numbers now.
    """
    device = attention.proj.weight.device
    chosen = head_channels(kept, 1).to(device)
    before = getattr(attention, "kept_heads", None)
    if before is None:
        attention.__class__ = kind
        attention.heads_before = attention.num_heads
    else:
        chosen = before[chosen]
    attention.register_buffer("kept_heads", chosen, persistent=False)


def rope_of_kept(attention: Any, rope: Tensor | None) -> Tensor | None:
    """Return the rotary positions of the heads that an attention module has.

    Args:
        attention: The module.
        rope: `[tokens, 2 * head_dim]` for all heads alike, `[heads, tokens, 2 * head_dim]` where each has its own, or
            these with images before them; None without positions.
    """
    if rope is None or rope.dim() < 3 or rope.shape[-3] != attention.heads_before or attention.heads_before == 1:
        return rope
    return torch.index_select(rope, rope.dim() - 3, attention.kept_heads)
