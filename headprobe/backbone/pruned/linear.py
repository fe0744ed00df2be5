"""Takes outputs or inputs of linear layers and vectors away, in place; the rest keeps its numbers to the last bit."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def head_channels(heads: Sequence[int], head_dim: int, parts: int = 1, of: int = 0) -> Tensor:
    """Return the channels of some heads, `[parts * heads * head_dim]`.

    Args:
        heads: Numbers of heads.
        head_dim: Channels of one head.
        parts: Projections that lie one after the other, 3 for queries, keys and values.
        of: Heads that each of these has.
    """
    start = torch.arange(parts)[:, None, None] * of * head_dim
    own = torch.tensor(heads, dtype=torch.int64)[None, :, None] * head_dim
    return (start + own + torch.arange(head_dim)).flatten()


def keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    """Keep some outputs of a linear layer."""
    linear.weight = taken(linear.weight, rows)
    if linear.bias is not None:
        linear.bias = taken(linear.bias, rows)
    linear.out_features = len(rows)


def keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    """Keep some inputs of a linear layer."""
    linear.weight = taken(linear.weight, columns, axis=1)
    linear.in_features = len(columns)


def taken(parameter: Tensor, chosen: Tensor, axis: int = 0) -> nn.Parameter:
    """Return a part of a parameter as a parameter of its own, that is trained if the whole one was."""
    part = parameter.detach().index_select(axis, chosen.to(parameter.device)).clone()
    return nn.Parameter(part, requires_grad=parameter.requires_grad)
