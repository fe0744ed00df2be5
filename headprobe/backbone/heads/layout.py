"""What is known of a model's attention layers, as plain data: the result of `find_heads`.

From small to large: which channels are a head's (`HeadChannels`), which calls compute a layer's heads (`Operator`), one
layer (`AttentionLayer`), all layers of a model (`HeadLayout`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headprobe.backbone.heads.sites import Form, Kind, Site
from headprobe.backbone.heads.trace import CallKind
from headprobe.errors import RunError
from headprobe.metrics.token_grid import Size
from headprobe.text import Decision, counted

Semantics = Literal["slot", "attention"]
"""What masking a head takes away: all that its slot holds, or only what the head attended to."""


@dataclass(frozen=True)
class HeadChannels:
    """Which channels belong to which head at a layer's point.

    Attributes:
        heads: Number of heads.
        head_dim: Channels of one head.
        axis: Axis of the channels: 1 or -1.
        interleaved: Channel c belongs to head c % heads; else the heads follow one after the other.
    """

    heads: int
    head_dim: int
    axis: int = -1
    interleaved: bool = False

    @property
    def channels(self) -> int:
        """Channels of all heads; channels behind them belong to none."""
        return self.heads * self.head_dim

    def of_heads(self, chosen: Tensor) -> Tensor:
        """Spread `[..., heads]` over the heads' channels, `[..., channels]`."""
        if self.interleaved:
            # heads 0 1 2 | 0 1 2 | ...: the whole row of heads, once for each of a head's channels
            return chosen.repeat(*[1] * (chosen.dim() - 1), self.head_dim)
        # heads 0 0 ... | 1 1 ... | ...
        return chosen.repeat_interleave(self.head_dim, dim=-1)

    @property
    def of_split(self) -> Tensor:
        """Channel of the tensor at the point for each channel of `split`, in the order of heads, `[channels]`."""
        order = torch.arange(self.channels)
        return order.view(self.head_dim, self.heads).T.flatten() if self.interleaved else order

    def split(self, tensor: Tensor) -> Tensor:
        """Return a tensor at the point as `[rows, tokens, heads, head_dim]`, whatever its own shape.

        Args:
            tensor: `[rows, channels]`, `[rows, ..., channels]` or `[rows, channels, ...]`, by `axis`.
        """
        last = tensor.movedim(1, -1) if self.axis == 1 else tensor  # [rows, ..., channels]
        tokens = last.flatten(1, -2) if last.dim() > 2 else last[:, None]  # [rows, tokens, channels]

        # channels of an mlp may follow
        own = tokens[..., : self.channels]
        if self.interleaved:
            # channel = number in the head * heads + head, so the head is the inner axis
            return torch.unflatten(own, -1, (self.head_dim, self.heads)).transpose(-1, -2)
        return torch.unflatten(own, -1, (self.heads, self.head_dim))


@dataclass(frozen=True)
class Operator:
    """The calls in which a layer's attention operator computes its output, and where the heads are in it.

    Attributes:
        fused: It is `scaled_dot_product_attention`; else a matrix product.
        calls: Which of the layer's calls of that kind, counted from 0.
        form: Where the heads are.
        heads: Number of heads.
    """

    fused: bool
    calls: tuple[int, ...]
    form: Form
    heads: int

    @property
    def kind(self) -> CallKind:
        """Kind of its calls."""
        return "fused" if self.fused else "product"

    def zeroed(self, call: int, result: Tensor, keep: Tensor) -> Tensor:
        """Return the result of one of its calls with the masked heads set to zero.

        Args:
            call: Which call it is, counted as in `calls`.
            result: The result of the call.
            keep: `[groups, heads]` bool, True = keep; group g owns the g-th equal share of the rows.
        """
        if self.form == "by call":
            # [rows, ...] of one head: a row is kept or zeroed as a whole
            kept = by_row(keep[:, self.calls.index(call)], len(result))  # [rows]
            return filled(result, ~kept.view(-1, *[1] * (result.dim() - 1)))

        if self.form == "merged":
            # [rows x heads, ...]: the heads of a row follow one another on axis 0
            kept = by_row(keep, len(result) // self.heads).flatten()  # [rows x heads]
            return filled(result, ~kept.view(-1, *[1] * (result.dim() - 1)))

        # [rows, heads, ...], or with windows in between [rows, windows, heads, ...]
        axis = 2 if self.form == "inner" else 1
        kept = by_row(keep, len(result))  # [rows, heads]
        shape = [len(result), *[1] * (result.dim() - 1)]
        shape[axis] = self.heads
        return filled(result, ~kept.view(shape))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return an operand or result of the operator as `[rows, heads, ..., ...]`, windows moved into the rows.

        With one call per head it holds one head, `[rows, 1, ..., ...]`.
        """
        if self.form == "by call":
            return tensor[:, None]
        if self.form == "merged":
            tensor = torch.unflatten(tensor, 0, (-1, self.heads))  # [rows x heads, ...] to [rows, heads, ...]
        elif self.form == "inner":
            tensor = tensor.transpose(1, 2)  # [rows, windows, heads, ...] to [rows, heads, windows, ...]
        if tensor.dim() == 5:
            # [rows, heads, windows, ..., ...] to [rows x windows, heads, ..., ...]
            return tensor.transpose(1, 2).flatten(0, 1)
        return tensor


@dataclass(frozen=True)
class AttentionLayer:
    """One multi-head attention module.

    Attributes:
        name: Qualified module name, as in `blocks.3.attn`.
        attention_class: Its class, as in `timm.layers.attention.Attention`.
        site: How the heads of that class are reached, and what they are.
        known: The class is in headprobe's table; else the table's default rule is tried, and proven.
        point: Qualified name of the sub-module with the concatenated heads at its input.
        channels: Which channels there belong to which head.
        operator: The calls that compute the heads' outputs, None where they were not found.
        kind: What a query attends to.
        rows: Rows of the module's batch per image, as at the point.
        tokens: Tokens of one row there (of one window, where it has windows).
        prefix: How many of these tokens come first and have no place on the image.
        stage: Number of the resolution stage, from 0.
        grid: Patch rows and columns of the whole image at the point, None where tokens have no known places.
        window: Rows and columns of a window of known place, None for all other attention.
        shift: Rows and columns that the windows are shifted by.
        inner_norm: A norm over all heads stands between the heads and the projection: masking a head rescales the
            others too.
        semantics: What masking takes away; differs only where a slot holds more than its head attended to.
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
        """Channels of one head at the point."""
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
        """Whether masking a head's slot and masking what the head attended to are two different things."""
        return bool(self.site.also) or self.site.cascades

    @property
    def masked_at_operator(self) -> bool:
        """Whether heads are masked in the attention operator's output, not at the point."""
        return self.semantics == "attention" and self.ambiguous


@dataclass(frozen=True)
class HeadLayout:
    """The attention layers of one model in execution order.

    Attributes:
        model: The model's name, for messages.
        layers: The layers; a layer's number is its place here.
        prefix_tokens: Number of class, distillation and register tokens: they have no place on the patch grid.
        input_size: `(channels, height, width)` of an image.
        headless: Modules that compute attention without heads, which no mask reaches.
        gradients: The model's forward pass needs gradients: it fails where they are off.
    """

    model: str
    layers: tuple[AttentionLayer, ...]
    prefix_tokens: int
    input_size: tuple[int, int, int]
    headless: tuple[str, ...] = ()
    gradients: bool = False

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(layer.heads for layer in self.layers)

    def decisions(self) -> list[Decision]:
        """Return what masking a head means in this model, where it could mean something else."""
        found = []
        ambiguous = [layer for layer in self.layers if layer.ambiguous]
        if ambiguous:
            what = "the whole slot of a head" if ambiguous[0].semantics == "slot" else "what a head attends to, alone"
            both = f"two things in {counted(len(ambiguous), 'layer')} (--model.semantics, docs/heads.md)"
            found.append(Decision("masks take away", f"{what}, which are {both}"))
        if normed := sum(layer.inner_norm for layer in self.layers):
            text = f"a norm over all heads in {counted(normed, 'layer')}: masking a head rescales the others too"
            found.append(Decision("norm behind the heads", text, shown=True))
        if self.headless:
            text = f"{counted(len(self.headless), 'module')} without heads, which no mask reaches: {self.headless[0]}"
            others = " and others" * (len(self.headless) > 1)
            found.append(Decision("further attention", f"{text}{others}", shown=True))
        return found


def parent_of(name: str) -> str:
    """Return the qualified name of the module around another."""
    return name.rpartition(".")[0]


def by_row(values: Tensor, rows: int) -> Tensor:
    """Give each of `rows` rows of a layer the values of its group, `[groups, ...]` to `[rows, ...]`.

    Rows are sample-major: each group owns one of equally long runs.

    Raises:
        RunError: The rows do not divide into the groups.
    """
    if rows % len(values):
        raise RunError(f"{rows} rows of a layer do not divide into {len(values)} groups: the model mixes images")
    return values.repeat_interleave(rows // len(values), dim=0)


def filled(tensor: Tensor, masked: Tensor) -> Tensor:
    """Return a copy with zeros where `masked`.

    A fill and not a product: 0 * inf would be NaN. The copy has the strides of the original: a matrix product may round
    differently for another layout, and no bit of a kept head may change.
    """
    return tensor.clone().masked_fill_(masked, 0)
