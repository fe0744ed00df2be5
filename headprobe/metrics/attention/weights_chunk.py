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
        """Return the chunk as it is reduced: in float32, attention between patches of a shape that can be seen."""
        return _lifted(_single(self), prefix)


def _single(chunk: WeightsChunk) -> WeightsChunk:
    """Return a chunk in float32, which all tables and sums are in; models in float64 recompute theirs in float64."""
    if chunk.weights.dtype == torch.float32:
        return chunk
    return chunk._replace(weights=chunk.weights.float(), logits=None if chunk.logits is None else chunk.logits.float())


def _lifted(chunk: WeightsChunk, prefix: int) -> WeightsChunk:
    """Make the shape of attention between patches known where prefix tokens leave it next to nothing.

    Weights below 1e-38 are 0 in float32, and their shape is lost; it is still in the logits. Where a query gives all
    patches less than `FAINT` together, they are given `FAINT`, in that shape: no sum can tell the difference.
    """
    if not prefix or chunk.logits is None:
        return chunk
    if not bool((chunk.weights[..., :prefix].sum(dim=-1) > NEARLY_ALL).any()):  # looks at a few keys instead of all
        return chunk
    faint = chunk.weights[..., prefix:].sum(dim=-1) < FAINT
    if not bool(faint.any()):
        return chunk
    shape = chunk.logits[..., prefix:][faint].log_softmax(dim=-1).add_(math.log(FAINT))
    chunk.weights[..., prefix:][faint] = shape.exp()
    chunk.logits[..., prefix:][faint] = shape - chunk.weights[faint].amax(dim=-1, keepdim=True).log()
    return chunk


def a_ln_a_of(logits: Tensor | None, weights: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Return terms of sum a ln a `[images, windows, heads, queries, keys]`, and what to add per weight summed over.

    With the logits l less their largest, ln a = l + ln(largest a): sum a ln a = sum a l + ln(largest a) sum a. Both
    are negative, so nothing cancels, and it takes a logarithm per query instead of one per weight.

    Args:
        logits: `[rows, heads, queries, keys]`, overwritten; None where they are not known.
        weights: Their softmax, with windows apart.
        top: Largest weight of each query.
    """
    if logits is None:
        return a_ln_a(weights), torch.zeros_like(top)
    return torch.unflatten(logits, 0, weights.shape[:2]).mul_(weights), top.log()


def a_ln_a(weights: Tensor) -> Tensor:
    """Return a ln a, 0 where a is 0."""
    return weights.clamp_min(TINY).log_().mul_(weights)
