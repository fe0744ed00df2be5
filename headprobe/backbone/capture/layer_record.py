"""What one attention layer did to some rows of one forward pass, handed to listeners and then forgotten."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.errors import RunError
from headprobe.metrics.attention.weights_chunk import WeightsChunk

CHUNK = 1 << 20  # weights at a time: larger chunks fall out of a CPU's cache, smaller ones keep its threads waiting


@dataclass(frozen=True)
class FusedAttention:
    """The arguments of a fused attention call, as the operator used them: after norms, rotary embeddings and biases.

    Attributes:
        query: `[rows, heads, queries, head_dim]`.
        key: `[rows, heads, keys, head_dim]`.
        scale: Factor of their products.
        mask: Added to the logits, or bool (True = may attend); broadcasts against `[rows, heads, queries, keys]`.
        causal: Queries see no later keys.
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
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[rows]
        return FusedAttention(self.query[rows], self.key[rows], self.scale, mask, self.causal)

    def weights(self, rows: slice, queries: slice) -> tuple[Tensor, Tensor]:
        """Recompute weights in float32 (float64 where the model is), and the logits less each query's largest.

        Logits of keys that a query does not see are the lowest number there is, so that they can be multiplied by 0.
        """
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[rows, :, queries].to(dtype), self.key[rows].to(dtype)
        logits = torch.mul(query, self.scale, out=query.new_empty(query.shape)) @ key.contiguous().mT
        if self.mask is not None:
            mask = self.mask[None] if self.mask.dim() == 3 else self.mask
            if mask.dim() == 4 and mask.shape[0] > 1:
                mask = mask[rows]
            if mask.shape[-2] > 1:
                mask = mask[..., queries, :]
            logits = logits.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else logits.add_(mask)
        if self.causal:
            seen = torch.ones(self.shape[2:], dtype=torch.bool, device=logits.device).tril()
            logits.masked_fill_(~seen[queries], float("-inf"))
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        weights = logits.softmax(dim=-1)
        if self.mask is not None or self.causal:
            logits.clamp_min_(torch.finfo(dtype).min)
        return weights, logits


@dataclass(frozen=True)
class PlainAttention:
    """The weights of a layer that does not use fused attention (Swin), as it applied them.

    Attributes:
        logits: What entered the softmax, biases, scales and masks included; None where its result is not the weights.
        result: The weights.
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

    def weights(self, rows: slice, queries: slice) -> tuple[Tensor, None]:
        """Return weights in float32: the model's own, or a softmax in float32 where the model's is coarser."""
        if self.logits is None or self.result.dtype in (torch.float32, torch.float64):
            return self.result[rows, :, queries].to(torch.promote_types(self.result.dtype, torch.float32)), None
        return self.logits[rows, :, queries].float().softmax(dim=-1), None


@dataclass(frozen=True)
class LayerRecord:
    """One attention layer in one forward pass, for the rows that a listener asked for.

    Rows are images or, where the layer has windows, the windows of images, one image after the other.

    Attributes:
        layer: The layer's number.
        images: Images.
        windows: Rows per image, of `heads_out` and `projected`.
        heads_out: Head outputs where they are concatenated, after ablation `[rows, tokens, heads, head_dim]`.
        projected: What enters the output projection, alike: the very same tensor, but after an inner norm or gate where
            there is one. Head h adds W_O[:, h] @ projected[..., h, :] to the layer's output.
        values: `[rows, heads, keys, head_dim]`, rows being those of the attention; None where the model hides them.
        attention: What the weights follow from; None where the layer has none between tokens.
        stream_before: Residual stream that enters the layer's block `[images, tokens, dim]`, in the order of the image;
            None where it is not known.
        stream_after: The stream once attention is added, after LayerScale and, in models that have it, post-norm: what
            enters the block's second half. None where it is not known.
        norm_follows: A norm stands between the output projection and the stream, so that the heads' shares of the
            stream are not W_O's (Swin v2).
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
        """Recompute the attention weights, about `chunk` numbers at a time; reduce each before asking for the next.

        Chunks hold whole images, or some queries of one image where that is too much.

        Raises:
            RunError: The layer has no weights, or its rows are no parts of the images.
        """
        if self.attention is None:
            raise RunError(f"layer {self.layer} has no attention weights between tokens")
        rows, heads, queries, keys = self.attention.shape
        if rows % self.images:
            raise RunError(f"layer {self.layer} attends in {rows} rows, which are no parts of {self.images} images")
        windows = rows // self.images
        per_query = windows * heads * keys
        images = max(1, chunk // (per_query * queries))
        step = queries if per_query * queries <= chunk or images > 1 else max(1, chunk // per_query)
        for image in range(0, self.images, images):
            part = slice(image * windows, min(image + images, self.images) * windows)
            for query in range(0, queries, step):
                wanted = slice(query, min(query + step, queries))
                yield WeightsChunk(part, wanted, *self.attention.weights(part, wanted))
