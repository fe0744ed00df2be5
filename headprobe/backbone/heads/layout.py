"""What is known of a model's attention layers: the result of `find_heads`, as plain data."""

from dataclasses import dataclass
from typing import Literal

from headprobe.backbone.heads.sites import Kind, Site
from headprobe.backbone.heads.slots import HeadChannels, Operator

Size = tuple[int, int]


Semantics = Literal["slot", "attention"]
"""What masking a head takes away: all that its slot at the head-concat point holds, or what it attended to alone."""


@dataclass(frozen=True)
class AttentionLayer:
    """One multi-head attention module.

    Attributes:
        name: Qualified module name, as in `blocks.3.attn`.
        attention_class: Its class, as in `timm.layers.attention.Attention`.
        site: How the heads of that class are reached, and what they are.
        known: The class is in headprobe's table; else the table's default rule is tried, and proven.
        point: Qualified name of the sub-module whose input is the concatenated heads.
        channels: Which channels there belong to which head.
        operator: Where the attention operator computes the heads' outputs, None if that was not seen.
        kind: What a query attends to.
        rows: Rows of the module's batch per image, as at the point.
        tokens: Tokens of one row there (of one window, where it has windows).
        prefix: Leading tokens of them without a place on the image.
        stage: Number of the resolution stage, from 0.
        grid: Patch rows and columns of the whole image at the point, None where tokens have no known places.
        window: Rows and columns of a window of known place, None for all other attention.
        shift: Rows and columns that the windows are shifted by.
        inner_norm: A norm over all heads stands between the heads and the projection: masking a head rescales the
            others too.
        semantics: What masking takes away; differs only where a slot holds more than what its head attended to.
    """

    name: str
    attention_class: str
    site: Site
    known: bool
    point: str
    channels: HeadChannels
    operator: Operator | None
    kind: Kind
    rows: int
    tokens: int
    prefix: int
    stage: int
    grid: Size | None
    window: Size | None
    shift: Size
    inner_norm: bool
    semantics: Semantics = "slot"

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels.heads

    @property
    def head_dim(self) -> int:
        """Channels of one head at the head-concat point."""
        return self.channels.head_dim

    @property
    def projection(self) -> str:
        """Qualified name of the module that takes the heads on: the point itself, or what follows a norm or dropout."""
        behind = self.point.rpartition(".")[2] in ("norm", "drop")
        return f"{self.name}.proj" if behind and self.name else "proj" if behind else self.point

    @property
    def joins_itself(self) -> bool:
        """Whether a mask may join the growing pass at this module's own input."""
        return self.site.joins_itself

    @property
    def ambiguous(self) -> bool:
        """Whether masking a head's slot takes away something else than what the head attended to."""
        return bool(self.site.also) or self.site.cascades

    @property
    def masked_at_operator(self) -> bool:
        """Whether heads are masked in the attention operator's output, not where they are concatenated."""
        return self.semantics == "attention" and self.ambiguous


@dataclass(frozen=True)
class HeadLayout:
    """The attention layers of one model in execution order.

    Attributes:
        model: The model's name, for messages.
        layers: The layers; a layer's number is its place here.
        prefix_tokens: Class, distillation and register tokens: those with no place on the patch grid.
        input_size: `(channels, height, width)` of an image.
        headless: Modules that compute attention without heads, which no mask reaches.
    """

    model: str
    layers: tuple[AttentionLayer, ...]
    prefix_tokens: int
    input_size: tuple[int, int, int]
    headless: tuple[str, ...] = ()

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(layer.heads for layer in self.layers)


def parent_of(name: str) -> str:
    """Return the qualified name of the module around another."""
    return name.rpartition(".")[0]
