"""What the statistics must be: a plain float64 forward pass with timm's unfused attention, then numpy by the papers.

Nothing of the package is used but the backbone itself. Windows are laid out by sending patch numbers through timm's own
block, so that shifts, padding and masks are timm's too.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Layer:
    """One attention layer of one forward pass; a dense image, whatever windows it was cut into.

    Attributes:
        z: Head outputs `[images, tokens, heads, dim]`, prefix tokens first, then patches in the order of the image.
        attention: `[images, heads, tokens, tokens]`; padding comes last, as further tokens.
        values: `[images, heads, tokens, dim]`, alike.
        stream: Residual stream before the layer's block `[images, tokens, channels]`, without padding.
        weight: W_O with LayerScale `[channels, heads, dim]`.
        prefix: Tokens without a place, which come first.
        grid: Patch rows and columns.
        sets: Tokens that see each other (numbers as in `attention`), one entry per set.
    """

    z: Array
    attention: Array
    values: Array
    stream: Array
    weight: Array
    prefix: int
    grid: tuple[int, int]
    sets: list[Ints]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def contribution(self) -> Array:
        """What each head adds to the stream `[images, tokens, heads, channels]`."""
        return np.asarray(np.einsum("bthd,chd->bthc", self.z, self.weight))


@dataclass
class _Raw:
    weights: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)


def forward(
    backbone: nn.Module, images: Array, masked: Sequence[tuple[int, int]] = (), stored: bool = False
) -> list[Layer]:
    """Run the model in float64, unfused, heads `masked` (layer, head) being zeroed; return its attention layers.

    `stored` runs it as it is, in float32 and fused: what a hook would store, without attention weights. Logarithms of
    amplitudes near 0 depend on the forward pass's own rounding, so spectra are compared on stored activations.
    """
    model = deepcopy(backbone).eval()
    model = model if stored else model.double()
    blocks = [module for module in model.modules() if hasattr(getattr(module, "attn", None), "attn_drop")]
    raw = _Raw()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for number, block in enumerate(blocks):
            attn: Any = block.attn
            attn.fused_attn = stored and getattr(attn, "fused_attn", False)
            mask = _zeroing(attn, [head for layer, head in masked if layer == number])
            for hooked in (
                block.register_forward_pre_hook(lambda _, args: raw.streams.append(args[0])),
                attn.register_forward_pre_hook(lambda _, args: raw.inputs.append(args[0])),
                attn.attn_drop.register_forward_hook(lambda *call: raw.weights.append(call[2])),
                attn.proj.register_forward_pre_hook(mask),
                attn.proj.register_forward_pre_hook(lambda _, args: raw.heads.append(args[0])),
            ):
                stack.callback(hooked.remove)
        model(torch.from_numpy(images).to(next(model.parameters()).dtype))
        return [_layer(model, block, raw, number, len(images)) for number, block in enumerate(blocks)]


def streams_after(backbone: nn.Module, images: Array) -> list[Array]:
    """Return for each layer the stream between attention and mlp `[images, tokens, channels]`.

    What a block returns is that stream plus what its mlp branch adds: the block is run once more with all that follows
    the attention set to zero.
    """
    model = deepcopy(backbone).double().eval()
    blocks: list[Any] = [module for module in model.modules() if hasattr(getattr(module, "attn", None), "attn_drop")]
    inputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    found = []
    with torch.no_grad():
        model(torch.from_numpy(images))
        for block, before in zip(blocks, list(inputs), strict=True):
            last = block.norm2 if hasattr(block, "_attn") and "v2" in type(block).__module__ else block.mlp
            handle = last.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
            found.append(np.asarray(block(before).flatten(1, -2)))
            handle.remove()
    return found


def _zeroing(attn: Any, heads: Sequence[int]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        split = args[0].unflatten(-1, (attn.num_heads, -1)).clone()
        split[..., list(heads), :] = 0
        return (split.flatten(-2),)

    return hook


def _layer(model: Any, block: Any, raw: _Raw, number: int, images: int) -> Layer:
    attn, stream = block.attn, raw.streams[number]
    rows, tokens = raw.heads[number].shape[:2]
    weights = raw.weights[number] if raw.weights else stream.new_zeros(rows, attn.num_heads, tokens, tokens)
    z = raw.heads[number].unflatten(-1, (attn.num_heads, -1))
    values = _values(attn, raw.inputs[number])
    scales = (getattr(getattr(block, "ls1", None), "gamma", None), getattr(block, "gamma_1", None))
    scale = next((scale for scale in scales if scale is not None), torch.ones(1))
    weight = (attn.proj.weight * scale.reshape(-1, 1)).unflatten(1, (attn.num_heads, -1))
    z, weights, values = (tensor.double() for tensor in (z, weights, values))
    prefix, sets = 0, [np.arange(weights.shape[-1])]
    if stream.dim() == 4:
        grid = (stream.shape[1], stream.shape[2])
        z, weights, values, sets = _assembled(block, z, weights, values, grid, images)
    else:
        prefix = int(model.num_prefix_tokens)
        known = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        side = round((weights.shape[-1] - prefix) ** 0.5)
        grid = (side, side) if known is None else (int(known[0]), int(known[1]))
    arrays = [t.detach().double().numpy() for t in (z, weights, values, stream.flatten(1, -2), weight)]
    return Layer(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], prefix, grid, sets)


def _values(attn: Any, x: Tensor) -> Tensor:
    """The value projection `[rows, heads, tokens, dim]`, by its weights."""
    if getattr(attn, "v_proj", None) is not None:
        flat = attn.v_proj(x)
    else:
        size = attn.qkv.weight.shape[0] // 3
        bias = attn.qkv.bias[2 * size :] if attn.qkv.bias is not None else getattr(attn, "v_bias", None)
        flat = F.linear(x, attn.qkv.weight[2 * size :], bias)
    return flat.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2).detach()


class _Recorder(nn.Module):
    """Stands for window attention: keeps its arguments."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.x, self.mask = x, mask
        return x


def _assembled(
    block: Any, z: Tensor, weights: Tensor, values: Tensor, grid: tuple[int, int], images: int
) -> tuple[Tensor, Tensor, Tensor, list[Ints]]:
    """Put windows back on the image; the numbers of patches run through the block's own partition."""
    attn, block.attn = block.attn, _Recorder()
    patches = grid[0] * grid[1]
    block._attn(torch.arange(1, patches + 1, dtype=torch.float64).view(1, *grid, 1))
    seen, block.attn = block.attn, attn
    numbers = seen.x.long().squeeze(-1).numpy() - 1
    windows, tokens = numbers.shape
    padding = numbers < 0
    numbers[padding] = patches + np.arange(padding.sum())
    total, heads = patches + int(padding.sum()), weights.shape[1]
    dense = torch.zeros(images, heads, total, total, dtype=torch.float64)
    by_token = [torch.zeros(images, total, heads, z.shape[-1], dtype=torch.float64) for _ in range(2)]
    by_image = [t.unflatten(0, (images, windows)) for t in (weights, z, values.transpose(1, 2))]
    sets: set[tuple[int, ...]] = set()
    for window, own in enumerate(numbers):
        dense[:, :, own[:, None], own[None]] = by_image[0][:, window]
        for target, source in zip(by_token, by_image[1:], strict=True):
            target[:, own] = source[:, window]
        sees = np.ones((tokens, tokens), dtype=bool) if seen.mask is None else seen.mask[window].numpy() == 0
        sets |= {tuple(own[row].tolist()) for row in sees}
    return by_token[0][:, :patches], dense, by_token[1].transpose(1, 2), [np.array(one) for one in sorted(sets)]


# -- attention ---------------------------------------------------------------------------------------------------------


def entropy(shares: Array) -> Array:
    return np.asarray(-np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(-1))


def steps(grid: tuple[int, int]) -> Ints:
    """Rows and columns from patch to patch `[patches, patches, 2]`."""
    where = np.argwhere(np.ones(grid))
    return np.asarray(where[None] - where[:, None])


def attention_statistics(layer: Layer, patch: tuple[float, float], class_token: bool) -> dict[str, Array]:
    """Every statistic of FIELD, section 5, `[images, heads]`."""
    prefix, patches = layer.prefix, layer.patches
    w = layer.attention[:, :, prefix : prefix + patches]  # queries are patches
    raw = w[..., prefix : prefix + patches]
    a = raw / raw.sum(-1, keepdims=True)
    distance = np.sqrt(((steps(layer.grid) * np.array(patch)) ** 2).sum(-1))
    norms = np.linalg.norm(np.einsum("bhtd,chd->bhtc", layer.values, layer.weight), axis=-1)
    added = np.linalg.norm(layer.contribution[:, prefix:], axis=-1)
    found = {
        "attention_distance_px": (a * distance).sum(-1).mean(-1),
        "attention_distance_raw_px": (raw * distance).sum(-1).mean(-1),
        "entropy_nats": entropy(a).mean(-1),
        "entropy_all_keys_nats": entropy(w).mean(-1),
        "confidence": a.max(-1).mean(-1),
        "self_mass": np.diagonal(raw, axis1=-2, axis2=-1).mean(-1),
        "output_norm_ratio": (added / np.linalg.norm(layer.stream[:, prefix:], axis=-1)[..., None]).mean(1),
    }
    if class_token:
        found["class_mass"] = w[..., 0].mean(-1)
    if prefix > class_token:
        found["register_mass"] = w[..., int(class_token) : prefix].sum(-1).mean(-1)
    return found | _by_set(layer, a, norms)


def _by_set(layer: Layer, a: Array, norms: Array) -> dict[str, Array]:
    """What is defined over a set of queries and keys: per set of patches that see each other, averaged over queries."""
    prefix, images, heads = layer.prefix, *a.shape[:2]
    last = prefix + layer.patches
    sink, shared, reached, plain = (np.zeros((images, heads)) for _ in range(4))
    queries = pairs = 0
    for tokens in layer.sets:
        real = tokens[tokens < last]
        own = real[real >= prefix]
        if not len(own):
            continue
        rows = layer.attention[:, :, real]
        sink += rows.mean(2).max(-1) * len(real)
        queries += len(real)
        reached += (layer.attention[:, :, own] @ norms[..., None])[..., 0].sum(-1)
        plain += norms[:, :, tokens].mean(-1) * len(own)
        if len(own) > 1:
            inside = a[:, :, (own - prefix)[:, None], (own - prefix)[None]]
            of_key = entropy(inside.mean(2))
            shared += len(own) * (of_key - entropy(inside).mean(-1)) / np.sqrt(np.log(len(own)) * of_key)
            pairs += len(own)
    return {
        "sink_mass": sink / queries,
        "mutual_information": shared / pairs,
        "value_weighted_attention": reached / plain,
    }


def uniform(layer: Layer, patch: tuple[float, float]) -> tuple[float, float]:
    """Distance and entropy of uniform attention to reachable patches."""
    distance = np.sqrt(((steps(layer.grid) * np.array(patch)) ** 2).sum(-1))
    pixels, logs = [], []
    for tokens in layer.sets:
        own = tokens[(tokens >= layer.prefix) & (tokens < layer.prefix + layer.patches)] - layer.prefix
        if not len(own):
            continue
        pixels += distance[own[:, None], own[None]].mean(-1).tolist()
        logs += [np.log(len(own))] * len(own)
    return float(np.mean(pixels)), float(np.mean(logs))


def offset_map(layer: Layer) -> Array:
    """Renormalised attention by offset of key from query, in a plain loop; `[heads, 2 rows - 1, 2 columns - 1]`."""
    (rows, columns), prefix = layer.grid, layer.prefix
    raw = layer.attention[:, :, prefix : prefix + layer.patches, prefix : prefix + layer.patches]
    a = (raw / raw.sum(-1, keepdims=True)).mean(0)
    found = np.zeros((len(a), 2 * rows - 1, 2 * columns - 1))
    for query in range(layer.patches):
        for key in range(layer.patches):
            (r, c), (to_r, to_c) = divmod(query, columns), divmod(key, columns)
            found[:, to_r - r + rows - 1, to_c - c + columns - 1] += a[:, query, key]
    return found / layer.patches


# -- similarity --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Samples:
    """Samples of one head `[samples, dim]`; what several measures need of them is worked out once."""

    given: Array

    @cached_property
    def centred(self) -> Array:
        return np.asarray(self.given - self.given.mean(0))

    @cached_property
    def basis(self) -> Array:
        """Q of their QR decomposition."""
        return np.linalg.qr(self.centred).Q

    @cached_property
    def kept(self) -> "Samples":
        """google/svcca's truncation, with 99% taken of squared singular values: the smallest k that reaches it."""
        u, s, _ = np.linalg.svd(self.centred, full_matrices=False)
        k = int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= 0.99)) + 1
        return Samples(np.asarray(u[:, :k] * s[:k]))

    @cached_property
    def gram(self) -> Array:
        return np.asarray(self.centred @ self.centred.T)

    @cached_property
    def own(self) -> float:
        """The debiased HSIC with themselves."""
        return _hsic(self.gram, self.gram)


def correlations(x: Samples, y: Samples) -> tuple[Array, Array]:
    """Canonical correlations, and the variates of x, by QR (Bjorck & Golub, 1973)."""
    u, s, _ = np.linalg.svd(x.basis.T @ y.basis, full_matrices=False)
    return np.minimum(s, 1), x.basis @ u


def svcca(x: Samples, y: Samples) -> float:
    return float(correlations(x.kept, y.kept)[0].mean())


def cca(x: Samples, y: Samples) -> float:
    return float(correlations(x, y)[0].mean())


def pwcca(x: Samples, y: Samples) -> float:
    found, variates = correlations(x, y)
    weights = np.abs(variates.T @ x.centred).sum(1)
    return float(weights @ found / weights.sum())


def cka(x: Samples, y: Samples) -> float:
    own = np.linalg.norm(x.centred.T @ x.centred) * np.linalg.norm(y.centred.T @ y.centred)
    return float(np.linalg.norm(x.centred.T @ y.centred) ** 2 / own)


def _hsic(k: Array, m: Array) -> float:
    """Song et al., 2012, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    first, second = (k * m).sum(), (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float((first + second - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3)))


def cka_unbiased(x: Samples, y: Samples) -> float:
    return _hsic(x.gram, y.gram) / float(np.sqrt(x.own * y.own))


def procrustes(x: Samples, y: Samples) -> float:
    size = np.linalg.norm(x.centred) * np.linalg.norm(y.centred)
    return float(np.linalg.svd(x.centred.T @ y.centred)[1].sum() / size)


MEASURES = {
    "svcca": svcca,
    "cca": cca,
    "pwcca": pwcca,
    "cka": cka,
    "cka_unbiased": cka_unbiased,
    "procrustes": procrustes,
}


def samples(layer: Layer, sampling: str) -> list[Samples]:
    """Samples of each head."""
    z = {
        "tokens": layer.z,
        "patches": layer.z[:, layer.prefix :],
        "class": layer.z[:, :1],
        "mean": layer.z.mean(1, keepdims=True),
    }[sampling]
    return [Samples(head) for head in z.transpose(2, 0, 1, 3).reshape(z.shape[2], -1, z.shape[3])]


# -- frequencies -------------------------------------------------------------------------------------------------------


def spectrum(maps: Array, grid: tuple[int, int]) -> Array:
    """Park & Kim's procedure on tokens `[images, patches, channels]` of a square grid: delta log amplitudes by bin."""
    images = maps.transpose(0, 2, 1).reshape(len(maps), -1, *grid)
    logs = np.log(np.abs(np.fft.fft2(images)) + 1e-6)
    half = np.diagonal(np.fft.fftshift(logs, axes=(-2, -1)).mean((0, 1)))[grid[0] // 2 :]
    return np.asarray(half - half[0])
