"""What one attention layer did to some rows of one forward pass: handed to observers, then forgotten."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.errors import RunError
from headprobe.metrics.attention.weights_chunk import WeightsChunk

CHUNK = 1 << 20
"""Weights at a time: larger chunks fall out of a CPU's cache, smaller ones keep its threads waiting."""


@dataclass(frozen=True)
class FusedAttention:
    """The arguments of a fused attention call, as the operator used them: after norms, rotary embeddings and biases.

    Attributes:
        query: `[rows, heads, queries, head_dim]`.
        key: `[rows, heads, keys, head_dim]`.
        scale: Factor of query times key.
        mask: Added to the logits, or bool (True = may attend); broadcasts against `[rows, heads, queries, keys]`.
        causal: A query attends to no later keys.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(rows, heads, queries, keys)`."""
        rows, heads, queries, _ = self.query.shape
        return rows, heads, queries, self.key.shape[2]

    def rows(self, rows: slice) -> "FusedAttention":
        """Return some of the rows."""
        mask = self.mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:  # else one mask serves all rows
            mask = mask[rows]
        return FusedAttention(self.query[rows], self.key[rows], self.scale, mask, self.causal)

    def weights(self, rows: slice, queries: slice) -> Tensor:
        """Recompute weights in float32 (float64 where the model is)."""
        return self._logits(rows, queries).softmax(dim=-1)

    def exponentials(
        self, rows: slice, queries: slice, prefix: int, memory: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights up to a factor of each query, their logarithms, and each query's largest beyond the prefix.

        The largest of all is 1. What is summed over keys can be divided by the sum of the weights afterwards, which is
        a pass over all of them less. The logarithm of a key that a query cannot attend to is the lowest finite number:
        times its weight, 0, it gives 0.

        Args:
            rows: Which rows.
            queries: Which queries.
            prefix: Leading keys that are prefix tokens.
            memory: Where both lie, made by the first call and used again by others, of no more weights: fresh memory
                costs a page fault every few KiB.
        """
        shape = (rows.stop - rows.start, self.shape[1], queries.stop - queries.start, self.shape[3])
        if not memory:
            dtype = torch.promote_types(self.query.dtype, torch.float32)
            memory += [self.query.new_empty(math.prod(shape), dtype=dtype) for _ in range(2)]
        logs, weights = (one[: math.prod(shape)].view(shape) for one in memory)
        self._logits(rows, queries, logs)
        largest = top = logs[..., prefix:].amax(dim=-1, keepdim=True)
        if prefix:
            top = torch.maximum(largest, logs[..., :prefix].amax(dim=-1, keepdim=True))
        torch.exp(logs.sub_(top), out=weights)
        if self.mask is not None or self.causal:
            logs.clamp_min_(torch.finfo(logs.dtype).min)
        return weights, logs, (largest - top).exp_().squeeze(-1)

    def _logits(self, rows: slice, queries: slice, out: Tensor | None = None) -> Tensor:
        """Recompute the softmax's input `[rows, heads, queries, keys]`, in float32 or finer, in `out` if given."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[rows, :, queries].to(dtype), self.key[rows].to(dtype)

        # [rows, heads, queries, keys]; contiguous operands, scaled in the copy: strided ones make a slow product
        scaled = torch.mul(query, self.scale, out=query.new_empty(query.shape))
        logits = torch.matmul(scaled, key.contiguous().mT, out=out)

        if self.mask is not None:
            # [heads, queries, keys] for all rows, or [rows or 1, heads or 1, queries or 1, keys]
            mask = self.mask[None] if self.mask.dim() == 3 else self.mask
            if mask.dim() == 4 and mask.shape[0] > 1:
                mask = mask[rows]
            if mask.shape[-2] > 1:
                mask = mask[..., queries, :]
            logits = logits.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else logits.add_(mask)
        if self.causal:
            reachable = torch.ones(self.shape[2:], dtype=torch.bool, device=logits.device).tril()  # [queries, keys]
            logits.masked_fill_(~reachable[queries], float("-inf"))
        return logits


@dataclass(frozen=True)
class PlainAttention:
    """The weights of a layer without fused attention (Swin), as the layer applied them.

    Attributes:
        logits: The softmax's input, biases, scales and masks included; None where its result is not the weights.
        result: The weights `[rows, heads, queries, keys]`.
    """

    logits: Tensor | None
    result: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(rows, heads, queries, keys)`."""
        rows, heads, queries, keys = self.result.shape
        return rows, heads, queries, keys

    def rows(self, rows: slice) -> "PlainAttention":
        """Return some of the rows."""
        return PlainAttention(None if self.logits is None else self.logits[rows], self.result[rows])

    def weights(self, rows: slice, queries: slice) -> Tensor:
        """Return weights in float32: the model's own, or a softmax in float32 where the model's is coarser."""
        if self.logits is None or self.result.dtype in (torch.float32, torch.float64):
            return self.result[rows, :, queries].to(torch.promote_types(self.result.dtype, torch.float32))
        return self.logits[rows, :, queries].float().softmax(dim=-1)

    def exponentials(self, rows: slice, queries: slice, prefix: int, memory: list[Tensor]) -> tuple[Tensor, None, None]:
        """Return the weights; their logarithms are not known."""
        return self.weights(rows, queries), None, None


@dataclass(frozen=True)
class LayerRecord:
    """One attention layer in one forward pass, for the rows that a tap hands over.

    Rows are images or, where the layer has windows, the windows of images, one image after the other.

    Attributes:
        layer: The layer's number.
        images: Number of images.
        windows: Rows per image in `heads_out` and `projected`.
        heads_out: Head outputs at the point, after ablation `[rows, tokens, heads, head_dim]`.
        projected: The output projection's input, of the same shape: the very tensor `heads_out`, except behind an inner
            norm or gate. Head h adds W_O[:, h] @ projected[..., h, :] to the layer's output.
        values: `[rows, heads, keys, head_dim]`, with the rows of `attention`; None where they were not captured.
        attention: What the weights follow from; None where the layer has none between tokens.
        stream_before: Residual stream that enters the layer's block `[images, tokens, dim]`, in the order of the image;
            None where it is not known.
        stream_after: The stream once attention is added, after LayerScale and, in models that have it, post-norm: the
            input of the block's second half. None where it is not known.
        norm_follows: A norm stands between the output projection and the stream, so W_O does not give the heads' shares
            of the stream (Swin v2).
    """

    layer: int
    images: int
    windows: int
    heads_out: Tensor
    projected: Tensor
    values: Tensor | None
    attention: FusedAttention | PlainAttention | None
    stream_before: Tensor | None
    stream_after: Tensor | None
    norm_follows: bool

    def weights(self, chunk: int = CHUNK) -> Iterator[WeightsChunk]:
        """Recompute the attention weights, about `chunk` numbers at a time; reduce each chunk before taking the next.

        A chunk holds whole images, or some queries of one image where an image is too much.

        Raises:
            RunError: The layer has no weights, or its rows do not divide into the images.
        """
        for attention, rows, queries in self._pieces(chunk):
            yield WeightsChunk(rows, queries, attention.weights(rows, queries))

    def exponentials(self, prefix: int, chunk: int = CHUNK) -> Iterator[WeightsChunk]:
        """Do as `weights` does, up to a factor of each query, and with logarithms, where a layer lets them be known.

        The next chunk lies where this one does.

        Args:
            prefix: Leading keys that are prefix tokens.
            chunk: As `weights` takes it.

        Raises:
            RunError: As `weights` does.
        """
        memory: list[Tensor] = []
        for attention, rows, queries in self._pieces(chunk):
            yield WeightsChunk(rows, queries, *attention.exponentials(rows, queries, prefix, memory))

    def _pieces(self, chunk: int) -> Iterator[tuple[FusedAttention | PlainAttention, slice, slice]]:
        """Yield what the weights follow from, with the rows and the queries of one chunk after the other."""
        if self.attention is None:
            raise RunError(f"layer {self.layer} has no attention weights between tokens")
        rows, heads, queries, keys = self.attention.shape
        if rows % self.images:
            raise RunError(f"layer {self.layer} attends in {rows} rows, which are no parts of {self.images} images")

        # as many images as fit, at least one; of a single image that does not fit, as many queries as fit
        windows = rows // self.images
        per_query = windows * heads * keys  # weights of one query in all windows of an image
        images = max(1, chunk // (per_query * queries))
        step = queries if per_query * queries <= chunk or images > 1 else max(1, chunk // per_query)

        for image in range(0, self.images, images):
            part = slice(image * windows, min(image + images, self.images) * windows)  # rows of these images
            for query in range(0, queries, step):
                yield self.attention, part, slice(query, min(query + step, queries))
