"""Where each attention class concatenates its heads: the one table that knows timm's module classes.

A *site* is the first sub-module called after the heads are concatenated: what enters it is `[rows, tokens,
heads * head_dim]`, and zeroing a head's channels there is exactly zeroing that head's slice of the attention operator's
output. The classes below are those proven so far; a model with any other attention class is refused, never run
unmasked. Adding a class is adding a line.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["global", "window", "pool"]


@dataclass(frozen=True)
class Site:
    """How the heads of one attention class are reached.

    Attributes:
        points: Names of the sub-module at the head-concat point, the first that exists is used: the optional inner norm
            (`nn.Identity` when off) comes before the projection where a class has one.
        kind: `global` attends over all tokens, `window` inside windows, `pool` from a learned query over all tokens.
        joins_itself: No path leads around the module, so a mask may join the growing pass at its very input.
    """

    points: tuple[str, ...] = ("proj",)
    kind: Kind = "global"
    joins_itself: bool = False


_INNER_NORM = Site(points=("norm", "proj"))
_WINDOW = Site(kind="window")

SITES: dict[str, Site] = {
    # ViT, DeiT, DINOv2 and v3, CLIP and SigLIP image towers
    "timm.layers.attention.Attention": _INNER_NORM,
    "timm.layers.attention.AttentionRope": _INNER_NORM,
    "timm.models.vision_transformer.Attention": _INNER_NORM,  # its home before timm 1.0.17
    # EVA, EVA-02, DINOv3 and the RoPE ViTs built on them
    "timm.models.eva.EvaAttention": _INNER_NORM,
    # BEiT
    "timm.models.beit.Attention": Site(),
    # SigLIP's attention pooling head
    "timm.layers.attention_pool.AttentionPoolLatent": Site(kind="pool", joins_itself=True),
    # Swin v1, v2 and v2-CR
    "timm.models.swin_transformer.WindowAttention": _WINDOW,
    "timm.models.swin_transformer_v2.WindowAttention": _WINDOW,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _WINDOW,
}


def class_path(module: nn.Module) -> str:
    """Return the module's class as `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def site_of(module: nn.Module) -> Site | None:
    """Return how `module`'s heads are reached, or None where neither its class nor a parent class is known."""
    for cls in type(module).__mro__:
        site = SITES.get(f"{cls.__module__}.{cls.__qualname__}")
        if site is not None:
            return site
    return None


def looks_like_attention(module: nn.Module) -> bool:
    """Say whether an unknown module has heads and an output projection, the usual form of attention in timm."""
    return isinstance(getattr(module, "num_heads", None), int) and isinstance(getattr(module, "proj", None), nn.Module)
