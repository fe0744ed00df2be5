"""Attention weights as they are recomputed, a piece at a time, and made ready to be reduced."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
FAINT = 1e-20  # of what a query gives to all keys together


class WeightsChunk(NamedTuple):
    """Attention weights of some rows and queries of a layer; a row is an image, or one window of one."""

    rows: slice  #: whole images
    queries: slice
    weights: Tensor  #: float32 `[rows, heads, queries, keys]`, over all keys; with `logs` up to a factor of each query
    logs: Tensor | None = None  #: their logarithms, finite; overwritten. Without them each query's weights sum to 1
    largest: Tensor | None = None  #: of each query but for prefix tokens, `[rows, heads, queries]`; found where missing

    def single(self) -> "WeightsChunk":
        """Return the chunk in float32, the format of all tables and sums; models in float64 recompute in float64."""
        if self.weights.dtype == torch.float32:
            return self
        found = ((name, getattr(self, name)) for name in ("weights", "logs", "largest"))
        return self._replace(**{name: tensor.float() for name, tensor in found if tensor is not None})


def lift(weights: Tensor, logs: Tensor, faint: Tensor, total: Tensor) -> None:
    """Restore the shape of attention between patches where prefix tokens leave it next to nothing, in place.

    Weights below 1e-38 are 0 in float32, and their shape is lost; the logarithms still have it. A query that gives all
    patches less than `FAINT` together is made to give them `FAINT`, in that shape: no sum over its keys changes by more
    than rounding.

    Args:
        weights: Between patches, `[..., queries, keys]`.
        logs: Their logarithms, alike.
        faint: Which queries, bool `[..., queries]`.
        total: What a query gives to all keys together, `[..., queries]`.
    """
    # [faint queries, keys]: logarithms of weights that sum to FAINT of the total
    shape = logs[faint].log_softmax(dim=-1).add_((math.log(FAINT) + total[faint].log())[:, None])
    weights[faint] = shape.exp()
    logs[faint] = shape


def a_ln_a_of(weights: Tensor, logs: Tensor | None) -> Tensor:
    """Return a ln a, 0 where a is 0, in the memory of the logarithms where they are known."""
    return a_ln_a(weights) if logs is None else logs.mul_(weights)


def a_ln_a(weights: Tensor) -> Tensor:
    """Return a ln a, 0 where a is 0."""
    return weights.clamp_min(TINY).log_().mul_(weights)
