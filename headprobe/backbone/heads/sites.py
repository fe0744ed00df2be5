"""Where each attention class concatenates its heads: the one table of timm's module classes.

A class's entry, its `Site`, names its *point*: the first sub-module called after the heads are concatenated. Zeroing a
head's channels at the point's input is exactly zeroing the head's slice of the attention operator's own output. By
default the point is `.proj`, with the heads one after the other on the last axis. The table holds what differs from
that, by class and never by model name. A class without an entry is tried with the default and accepted only where the
proofs of `check` pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

Kind = Literal["global", "window", "local", "pool", "class", "channel", "linear"]
"""What a query attends to: all tokens; the tokens of its window; a neighbourhood of its own; all tokens, from a learned
or pooled query; all tokens, from the class token; its head's channels; a summary of all tokens, without weights."""


Form = Literal["axis", "inner", "merged", "by call", "every"]
"""Where the heads are in the attention operator's output: on axis 1; on axis 2, after the windows; in the rows, image
by image; one call for each head; on axis 1 of every product that has them."""


Maps = Literal["weights", "signed", "channels", "none"]
"""What a layer's attention map is: weights that sum to 1 over the keys of a query; sums or differences of such weights,
which may be negative; weights between channels; none."""


def _num_heads(module: nn.Module) -> Any:
    return getattr(module, "num_heads", None)


@dataclass(frozen=True)
class Site:
    """How the heads of one attention class are reached, and what they are.

    Attributes:
        points: Names of the point, the first that exists is used: an optional norm over all heads (`nn.Identity` when
            off) comes before the projection where a class has one.
        kind: What a query attends to. A layer with several rows per image is `window` where the entry has `global`.
        heads: Reads the number of heads from the module.
        axis: Axis of the channels at the point; None is 1 where the point holds a convolution, else the last.
        interleaved: Channel c belongs to head c % heads.
        leading: The heads are the first channels; others follow that belong to no head.
        form: Where the heads are in the operator's output.
        maps: What the attention map is.
        why: Why there is no map of weights over tokens, or what the map is instead.
        head_is: What counts as one head, where that is not plain.
        also: What else a head's slot holds, beside what the head attended to.
        cascades: A head's output is also an input of the next head of its layer; masking its slot leaves that input.
        columns: Nothing but linear code stands between the point and the output projection inside the module.
        ordered: The operator's output holds prefix tokens and then the image's patches, row by row.
        residual: The block around it is timm's usual one, with a residual stream that taps can reach.
        joins_itself: No path leads around the module, so a mask may join the growing pass at its very input.
    """

    points: tuple[str, ...] = ("proj",)
    kind: Kind = "global"
    heads: Callable[[nn.Module], Any] = _num_heads
    axis: int | None = None
    interleaved: bool = False
    leading: bool = False
    form: Form = "axis"
    maps: Maps = "weights"
    why: str = ""
    head_is: str = ""
    also: str = ""
    cascades: bool = False
    columns: bool = True
    ordered: bool = False
    residual: bool = False
    joins_itself: bool = False


def _of(attribute: str) -> Callable[[nn.Module], Any]:
    """Read the number of heads from another attribute."""
    return lambda module: getattr(module, attribute)


def _multi_scale_heads(module: nn.Module) -> int:
    """Count heads x scales of an EfficientViT, which has no attribute for it."""
    holder: Any = module
    return int(holder.proj.conv.in_channels) // int(holder.dim)


DEFAULT = Site()
_TOKENS = Site(ordered=True)
_BLOCK = Site(ordered=True, residual=True)
_INNER_NORM = replace(_BLOCK, points=("norm", "proj"))
_WINDOW = Site(kind="window")
_SWIN = Site(kind="window", residual=True)
_CLASS = Site(kind="class")
_CHANNEL = Site(
    kind="channel",
    maps="channels",
    why="its attention is between channels, not tokens",
    head_is="a group of channels",
    ordered=True,
)
_IN_BLOCK = Site(points=("pool",), axis=1, columns=False, form="merged")
_CONV_BLOCK = Site(points=("o_proj",), axis=1)
_DIFFERENCE = "its attention is the difference of two maps, which can be negative"
_MIXED = "its heads are mixed after the softmax (talking heads): the weights may be negative and do not sum to 1"
_VALUE_HEAD = "a value head, after the maps are mixed (talking heads)"
_LINEAR = "it is linear attention, which has no weights between tokens"

SITES: dict[str, Site] = {
    # ViT, DeiT, DINOv2 and v3, CLIP and SigLIP image towers, and whatever is built of timm's own layers
    "timm.layers.attention.Attention": _INNER_NORM,
    "timm.layers.attention.AttentionRope": _INNER_NORM,
    "timm.models.vision_transformer.Attention": _INNER_NORM,  # its home before timm 1.0.17
    "timm.models.eva.EvaAttention": _INNER_NORM,
    "timm.models.beit.Attention": _BLOCK,
    "timm.models.vision_transformer_relpos.RelPosAttention": _BLOCK,
    "timm.models.vision_transformer.ParallelScalingBlock": Site(
        points=("attn_out_proj", "out_proj"), leading=True, ordered=True, joins_itself=True
    ),
    "timm.models.vision_transformer.DiffParallelScalingBlock": Site(
        points=("out_proj",), leading=True, ordered=True, joins_itself=True, maps="signed", why=_DIFFERENCE
    ),
    "timm.layers.diff_attention.DiffAttention": replace(_INNER_NORM, maps="signed", why=_DIFFERENCE),
    "timm.models.gemma4_vit.Gemma4Attention": Site(points=("o_proj",), ordered=True),
    "timm.models.vision_transformer_sam.Attention": Site(form="merged"),
    "timm.models.hieradet_sam2.MultiScaleAttention": DEFAULT,
    "timm.models.hiera.MaskUnitAttention": Site(heads=_of("heads")),
    # pooling heads
    "timm.layers.attention_pool.AttentionPoolLatent": Site(kind="pool", joins_itself=True),
    "timm.layers.attention_pool2d.AttentionPool2d": Site(points=("drop",), axis=-1, kind="pool", joins_itself=True),
    "timm.layers.attention_pool.AttentionPoolPrr": Site(points=("post_norm",), kind="pool", joins_itself=True),
    # class attention
    "timm.models.cait.ClassAttn": _CLASS,
    "timm.models.crossvit.CrossAttention": _CLASS,
    "timm.models.volo.ClassAttention": _CLASS,
    # Swin v1, v2 and v2-CR
    "timm.models.swin_transformer.WindowAttention": _SWIN,
    "timm.models.swin_transformer_v2.WindowAttention": _SWIN,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _SWIN,
    # other windows
    "timm.models.davit.WindowAttention": _WINDOW,
    "timm.models.gcvit.WindowAttentionGlobal": _WINDOW,
    "timm.models.maxxvit.AttentionCl": _WINDOW,
    "timm.models.nest.Attention": Site(interleaved=True),
    "timm.models.tiny_vit.Attention": _WINDOW,
    "timm.models.twins.LocallyGroupedAttn": Site(kind="window", form="inner"),
    "timm.models.efficientvit_msra.CascadedGroupAttention": Site(kind="window", form="by call", cascades=True),
    # all tokens, among the feature maps of a hierarchical model
    "timm.models.convit.GPSA": _TOKENS,
    "timm.models.convit.MHSA": _TOKENS,
    "timm.models.efficientformer.Attention": _TOKENS,
    "timm.models.fastvit.Attention": _TOKENS,
    "timm.models.levit.Attention": _TOKENS,
    "timm.models.levit.AttentionDownsample": _TOKENS,
    "timm.models.maxxvit.Attention2d": _TOKENS,
    "timm.models.metaformer.Attention": _TOKENS,
    "timm.models.nextvit.EfficientAttention": _TOKENS,
    "timm.models.pvt_v2.Attention": _TOKENS,
    "timm.models.tnt.Attention": _TOKENS,
    "timm.models.twins.GlobalSubSampleAttn": _TOKENS,
    "timm.models.visformer.Attention": _TOKENS,
    "timm.models.volo.Attention": _TOKENS,
    "timm.models.cpubone.ConvAttention": _CONV_BLOCK,
    "timm.models.lowformer.ConvAttention": _CONV_BLOCK,
    "timm.layers.attention2d.MultiQueryAttention2d": Site(
        points=("output",), axis=1, head_is="a query head; keys and values are shared (multi-query)"
    ),
    "timm.models.mvitv2.MultiScaleAttention": Site(also="the pooled query", ordered=True),
    "timm.models.cait.TalkingHeadAttn": Site(ordered=True, maps="signed", why=_MIXED, head_is=_VALUE_HEAD),
    "timm.models.efficientformer_v2.Attention2d": Site(
        maps="signed", why=_MIXED, head_is=_VALUE_HEAD, also="a convolution of the head's values"
    ),
    "timm.models.efficientformer_v2.Attention2dDownsample": Site(also="a convolution of the head's values"),
    # neighbourhoods; the output projection of the first three is in the block around them
    "timm.layers.halo_attn.HaloAttn": replace(_IN_BLOCK, kind="local"),
    "timm.layers.bottleneck_attn.BottleneckAttn": _IN_BLOCK,
    "timm.layers.lambda_layer.LambdaLayer": replace(
        _IN_BLOCK, kind="linear", form="every", maps="none", why=_LINEAR, head_is="a query head; the keys are shared"
    ),
    "timm.models.volo.OutlookAttention": Site(kind="local", ordered=True),
    # channels
    "timm.models.davit.ChannelAttention": _CHANNEL,
    "timm.models.davit.ChannelAttentionV2": replace(_CHANNEL, heads=_of("groups")),
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNEL,
    "timm.models.xcit.XCA": _CHANNEL,
    # linear attention
    "timm.models.coat.FactorAttnConvRelPosEnc": Site(
        kind="linear", maps="none", why=_LINEAR, also="a convolutional relative position encoding of the head's values"
    ),
    "timm.models.efficientvit_mit.LiteMLA": Site(
        kind="linear", maps="none", why=_LINEAR, heads=_multi_scale_heads, head_is="a group of channels at one scale"
    ),
}

ONE_HEAD: dict[str, str] = {
    "timm.models.iformer.SHMA": "single-head modulation attention",
    "timm.models.shvit.SHSA": "single-head self-attention",
    "timm.models.swiftformer.EfficientAdditiveAttention": "additive attention with one query",
    "timm.models.mobilevit.LinearSelfAttention": "one context score per token",
}
"""Attention classes that have a single head by design, and what they are."""


def class_path(module: nn.Module) -> str:
    """Return the module's class as `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def known_site(module: nn.Module) -> Site | None:
    """Return the table's entry of the module's class or of a parent class, None without one."""
    return next((site for cls in type(module).__mro__ if (site := SITES.get(_path(cls))) is not None), None)


def site_of(module: nn.Module) -> Site | None:
    """Return how the module's heads are reached, None where it is no attention with heads.

    Where neither the class nor a parent class is in the table, the default is tried: in timm, attention usually has a
    number of heads and an output projection.
    """
    return known_site(module) or (DEFAULT if _looks_like_attention(module) else None)


def one_head_by_design(module: nn.Module) -> str | None:
    """Return in words what a module with a single head by design computes; None for any other module."""
    return next((what for cls in type(module).__mro__ if (what := ONE_HEAD.get(_path(cls)))), None)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _looks_like_attention(module: nn.Module) -> bool:
    heads = getattr(module, "num_heads", None)
    return isinstance(heads, int) and heads > 0 and isinstance(getattr(module, "proj", None), nn.Module)
