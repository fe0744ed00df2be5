"""How heads lie in tensors: among the channels where they are concatenated, and in the attention operator's output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.backbone.heads.sites import Form
from headprobe.backbone.operator_calls import CallKind
from headprobe.errors import RunError


@dataclass(frozen=True)
class HeadChannels:
    """Which channels belong to which head where a layer's heads are concatenated.

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
        """Channels of all heads; those after them belong to none."""
        return self.heads * self.head_dim

    def of_heads(self, chosen: Tensor) -> Tensor:
        """Spread `[..., heads]` over the heads' channels, `[..., channels]`."""
        if self.interleaved:
            return chosen.repeat(*[1] * (chosen.dim() - 1), self.head_dim)
        return chosen.repeat_interleave(self.head_dim, dim=-1)

    def split(self, tensor: Tensor) -> Tensor:
        """Return a tensor at the head-concat point as `[rows, tokens, heads, head_dim]`, whatever its own shape."""
        last = tensor.movedim(1, -1) if self.axis == 1 else tensor
        tokens = last.flatten(1, -2) if last.dim() > 2 else last[:, None]
        own = tokens[..., : self.channels]
        if self.interleaved:
            return torch.unflatten(own, -1, (self.head_dim, self.heads)).transpose(-1, -2)
        return torch.unflatten(own, -1, (self.heads, self.head_dim))


def by_row(values: Tensor, rows: int) -> Tensor:
    """Give each of `rows` rows of a layer its group's values, `[groups, ...]` to `[rows, ...]`.

    Rows are sample-major: each group owns one of equally long runs.

    Raises:
        RunError: The rows do not divide into the groups.
    """
    if rows % len(values):
        raise RunError(f"{rows} rows of a layer do not divide into {len(values)} groups: the model mixes images")
    return values.repeat_interleave(rows // len(values), dim=0)


def filled(tensor: Tensor, masked: Tensor) -> Tensor:
    """Return a copy with zeros where `masked`.

    A fill and not a product: 0 * inf would be NaN. The copy lies in memory as the original does, for a matrix product
    may round otherwise for another layout, and a kept head must not change by one bit.
    """
    return tensor.clone().masked_fill_(masked, 0)


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
        """Return the result of one of its calls with the heads that are not kept set to zero.

        Args:
            call: Which call it is, counted as in `calls`.
            result: What the call gave.
            keep: `[groups, heads]` bool; group g owns the g-th equal share of the rows.
        """
        if self.form == "by call":
            kept = by_row(keep[:, self.calls.index(call)], len(result))
            return filled(result, ~kept.view(-1, *[1] * (result.dim() - 1)))
        if self.form == "merged":
            kept = by_row(keep, len(result) // self.heads).flatten()
            return filled(result, ~kept.view(-1, *[1] * (result.dim() - 1)))
        axis = 2 if self.form == "inner" else 1
        kept = by_row(keep, len(result))
        shape = [len(result), *[1] * (result.dim() - 1)]
        shape[axis] = self.heads
        return filled(result, ~kept.view(shape))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return an operand or result of the operator as `[rows, heads, ..., ...]`, windows moved into the rows.

        With one call per head it is one head's, `[rows, 1, ..., ...]`.
        """
        if self.form == "by call":
            return tensor[:, None]
        if self.form == "merged":
            tensor = torch.unflatten(tensor, 0, (-1, self.heads))
        elif self.form == "inner":
            tensor = tensor.transpose(1, 2)
        if tensor.dim() == 5:
            return tensor.transpose(1, 2).flatten(0, 1)
        return tensor
