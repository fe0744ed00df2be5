"""Attention weights as they are recomputed, a piece at a time, and made ready to be reduced."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
FAINT = 1e-20  # of what a query gives to all patches together
NEARLY_ALL = 1 - 1e-5  # patches can be left with FAINT only where prefix tokens get more than this, rounding included


class WeightsChunk(NamedTuple):
    """Attention weights of some rows and queries of a layer; a row is an image, or one window of one."""

    rows: slice  #: whole images
    queries: slice
    weights: Tensor  #: float32 `[rows, heads, queries, keys]`, over all keys
    logits: Tensor | None = None  #: alike, less each query's largest, finite; overwritten. They spare the logarithms

    def prepared(self, prefix: int) -> "WeightsChunk":
        """Return the chunk as it is reduced: in float32, the shape of attention between patches not rounded away.

        Args:
            prefix: Prefix tokens of the layer.
        """
        return _lifted(_single(self), prefix)


def _single(chunk: WeightsChunk) -> WeightsChunk:
    """Return a chunk in float32, the format of all tables and sums; models in float64 recompute in float64."""
    if chunk.weights.dtype == torch.float32:
        return chunk
    logits = None if chunk.logits is None else chunk.logits.float()
    return chunk._replace(weights=chunk.weights.float(), logits=logits)


def _lifted(chunk: WeightsChunk, prefix: int) -> WeightsChunk:
    """Restore the shape of attention between patches where prefix tokens leave it next to nothing.

    Weights below 1e-38 are 0 in float32, and their shape is lost; the logits still have it. A query that gives all
    patches less than `FAINT` together is made to give them `FAINT`, in that shape: no sum over its keys changes by more
    than rounding.
    """
    if not prefix or chunk.logits is None:
        return chunk
    # a cheap test first: the few prefix keys instead of all
    if not bool((chunk.weights[..., :prefix].sum(dim=-1) > NEARLY_ALL).any()):
        return chunk
    faint = chunk.weights[..., prefix:].sum(dim=-1) < FAINT  # [rows, heads, queries]
    if not bool(faint.any()):
        return chunk

    # [faint queries, patches]: logarithms of weights that sum to FAINT
    shape = chunk.logits[..., prefix:][faint].log_softmax(dim=-1).add_(math.log(FAINT))
    chunk.weights[..., prefix:][faint] = shape.exp()
    # logits are less the query's largest: ln(weight) - ln(largest weight)
    chunk.logits[..., prefix:][faint] = shape - chunk.weights[faint].amax(dim=-1, keepdim=True).log()
    return chunk


def a_ln_a_of(logits: Tensor | None, weights: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Return terms of sum a ln a, and what to add for each unit of weight that is summed over.

    With the logits l less their largest, ln a = l + ln(largest a): sum a ln a = sum a l + ln(largest a) sum a. Both
    are negative, so nothing cancels, and it takes a logarithm per query instead of one per weight.

    Args:
        logits: `[rows, heads, queries, keys]`, overwritten; None where they are not known.
        weights: Their softmax, `[images, windows, heads, queries, keys]`.
        top: Largest weight of each query, `[images, windows, heads, queries]`.

    Returns:
        Terms in the shape of `weights`, and ln(largest a), or 0 without logits, in the shape of `top`.
    """
    if logits is None:
        return a_ln_a(weights), torch.zeros_like(top)
    return torch.unflatten(logits, 0, weights.shape[:2]).mul_(weights), top.log()


def a_ln_a(weights: Tensor) -> Tensor:
    """Return a ln a, 0 where a is 0."""
    return weights.clamp_min(TINY).log_().mul_(weights)
