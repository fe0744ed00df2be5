"""Takes heads out of a model's attention layers, and says which layers allow it: the one table of their classes."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import nn

from headprobe.backbone.heads.layout import parent_of
from headprobe.backbone.heads.sites import class_path
from headprobe.backbone.pruned.beit import shrink_beit
from headprobe.backbone.pruned.eva import shrink_eva
from headprobe.backbone.pruned.no_heads import PRENORM, NoHeads, NoNorm
from headprobe.backbone.pruned.plain import shrink_attention, shrink_swin
from headprobe.backbone.pruned.rope import shrink_rope
from headprobe.backbone.pruned.swin_v2 import shrink_swin_v2
from headprobe.errors import UsageError

Shrink = Callable[[Any, Sequence[int]], None]

SHRINKS: dict[str, Shrink] = {
    "timm.layers.attention.Attention": shrink_attention,
    "timm.models.vision_transformer.Attention": shrink_attention,  # its home before timm 1.0.17
    "timm.models.swin_transformer.WindowAttention": shrink_swin,
    "timm.layers.attention.AttentionRope": shrink_rope,
    "headprobe.backbone.pruned.rope.PrunedAttentionRope": shrink_rope,
    "timm.models.eva.EvaAttention": shrink_eva,
    "headprobe.backbone.pruned.eva.PrunedEvaAttention": shrink_eva,
    "timm.models.beit.Attention": shrink_beit,
    "headprobe.backbone.pruned.beit.PrunedBeitAttention": shrink_beit,
    "timm.models.swin_transformer_v2.WindowAttention": shrink_swin_v2,
    "headprobe.backbone.pruned.swin_v2.PrunedSwinV2Attention": shrink_swin_v2,
}
"""How heads are taken out of each class. A class's own subclasses elsewhere may compute something else: they have no
entry and are refused."""

WIDTH_APART = (shrink_attention, shrink_rope)
"""Those for classes that keep the width of all heads apart from the model's, from timm 1.0.23 on."""

SUPPORTED = "ViT, DeiT, DINOv2 and v3, CLIP, EVA, rotary ViTs, BEiT, Swin v1 and v2"


def refuse_unprunable(backbone: nn.Module, name: str) -> None:
    """Refuse an attention layer that no head can be taken out of.

    Args:
        backbone: The model.
        name: The layer's qualified name.

    Raises:
        UsageError: With the reason.
    """
    attention: Any = backbone.get_submodule(name)
    kind = class_path(attention)
    if kind not in SHRINKS:
        raise UsageError(
            f"no head of {name!r} can be removed: its class is not among those that are supported ({SUPPORTED}); mask "
            f"it with headprobe test instead, got {kind}"
        )
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise UsageError(
            f"no head of {name!r} can be removed: a norm over all heads stands between them and the output "
            "projection, and each changes the others; mask it with headprobe test instead, got "
            f"{type(attention.norm).__name__}"
        )
    if SHRINKS[kind] in WIDTH_APART and not hasattr(attention, "attn_dim"):
        raise UsageError(
            f"the attention of timm {timm.__version__} has as many channels as its model, whatever its number of "
            f"heads: install timm 1.0.23 or later to remove heads of {name!r}, got {kind}"
        )
    if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
        raise UsageError(
            f"no head of {name!r} can be removed: its heads share keys and values (grouped queries), which is not "
            f"supported; choose other layers, got {attention.num_heads} heads on {attention.num_kv_heads}"
        )
    linear = [getattr(attention, part, None) for part in ("qkv", "q_proj", "k_proj", "v_proj", "gate", "proj")]
    strange = [part for part in linear if part is not None and type(part) is not nn.Linear]
    if strange:
        raise UsageError(
            f"no head of {name!r} can be removed: its projections must be plain linear layers; merge adapters and undo "
            f"quantisation first, got {class_path(strange[0])}"
        )


def shrink_layer(backbone: nn.Module, name: str, kept: Sequence[int], bias: bool = False) -> None:
    """Keep some heads of one attention layer and remove the others for good.

    Args:
        backbone: The model, changed in place.
        name: The layer's qualified name.
        kept: The heads; without any the layer becomes the bias of its projection.
        bias: Make a bias of zeros where the projection has none, for what is folded into it.

    Raises:
        UsageError: The layer's class or the installed timm does not allow it.
    """
    refuse_unprunable(backbone, name)
    attention: Any = backbone.get_submodule(name)
    projection: nn.Linear = attention.proj
    if projection.bias is None and (bias or not kept):
        zeros = torch.zeros_like(projection.weight[:, 0])
        projection.bias = nn.Parameter(zeros.detach(), requires_grad=projection.weight.requires_grad)
    if kept:
        SHRINKS[class_path(attention)](attention, kept)
        return
    block = backbone.get_submodule(parent_of(name))
    setattr(block, name.rpartition(".")[2], NoHeads(projection.bias.detach(), attention.proj_drop))
    if class_path(block) in PRENORM:
        block.norm1 = NoNorm(projection.bias)
