"""Fewer heads in attention classes of timm whose own forward pass allows any number: they stay what they are."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from headprobe.backbone.pruned.linear import head_channels, keep_inputs, keep_outputs, taken


def shrink_attention(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of timm's plain attention (ViT, DeiT, DINOv2, CLIP and others).

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    shrink_projections(attention, kept)
    attention.attn_dim = len(kept) * attention.head_dim


def shrink_swin(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads of Swin's window attention, with their biases by relative position.

    Args:
        attention: The module, changed in place.
        kept: The heads.
    """
    table = attention.relative_position_bias_table  # [relative positions, heads]
    attention.relative_position_bias_table = taken(table, head_channels(kept, 1), axis=1)
    shrink_projections(attention, kept)


def shrink_projections(attention: Any, kept: Sequence[int]) -> None:
    """Keep some heads in the projections of an attention module, fused or not, and in its gate.

    Args:
        attention: The module, changed in place; its number of heads too.
        kept: The heads.
    """
    head_dim = attention.proj.in_features // attention.num_heads
    own = head_channels(kept, head_dim)
    if attention.qkv is not None:
        keep_outputs(attention.qkv, head_channels(kept, head_dim, parts=3, of=attention.num_heads))
    else:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            keep_outputs(projection, own)
    gate = getattr(attention, "gate", None)
    if isinstance(gate, nn.Linear):
        keep_outputs(gate, own)
    keep_inputs(attention.proj, own)
    attention.num_heads = len(kept)
