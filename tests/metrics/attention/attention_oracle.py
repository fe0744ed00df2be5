"""Attention statistics by the papers, in float64 numpy, on the dense matrix of a whole image: no windows, no chunks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def places(grid: tuple[int, int]) -> Array:
    """Row and column of every patch, `[patches, 2]`."""
    return np.array([(row, column) for row in range(grid[0]) for column in range(grid[1])], dtype=np.float64)


def distances(grid: tuple[int, int], patch: tuple[float, float]) -> Array:
    step = (places(grid)[:, None] - places(grid)[None]) * np.array(patch)
    return np.asarray(np.sqrt((step**2).sum(-1)))


def entropy(shares: Array) -> Array:
    return np.asarray(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))


def statistics(
    weights: Array,
    prefix: int,
    class_token: bool,
    grid: tuple[int, int],
    patch: tuple[float, float],
    components: Sequence[Any] | None = None,
    norms: Array | None = None,
) -> dict[str, float]:
    """All statistics of one head on one image.

    Args:
        weights: `[tokens, tokens]`, prefix tokens first; rows sum to 1.
        components: Sets of patches that see each other only; one set of all by default.
        norms: Norms of the values `[tokens]`.
    """
    patches = len(weights) - prefix
    sets = components or [np.arange(patches)]
    raw = weights[prefix:, prefix:]
    a = raw / raw.sum(-1, keepdims=True)
    found = {
        "attention_distance_px": (a * distances(grid, patch)).sum(-1).mean(),
        "attention_distance_raw_px": (raw * distances(grid, patch)).sum(-1).mean(),
        "entropy_nats": entropy(a).mean(),
        "entropy_all_keys_nats": entropy(weights[prefix:]).mean(),
        "confidence": a.max(-1).mean(),
        "self_mass": np.diag(raw).mean(),
        "class_mass": weights[prefix:, 0].mean() if class_token else np.nan,
        "register_mass": weights[prefix:, int(class_token) : prefix].sum(-1).mean(),
    }
    sinks, informations, sizes = [], [], []
    for members in sets:
        tokens = np.concatenate([np.arange(prefix), prefix + np.asarray(members)])
        sinks.append(weights[np.ix_(tokens, tokens)].mean(0).max() * len(tokens))
        inside = a[np.ix_(members, members)]
        if len(members) > 1:
            of_key = entropy(inside.mean(0))
            information = max(of_key - entropy(inside).mean(), 0)
            norm = np.sqrt(np.log(len(members)) * of_key)
            informations.append(len(members) * (information / norm if norm > 1e-6 else 0))
            sizes.append(len(members))
    found["sink_mass"] = sum(sinks) / (patches + prefix)
    found["mutual_information"] = sum(informations) / sum(sizes) if sizes else np.nan
    if norms is not None:
        reached = weights[prefix:] @ norms
        plain = np.empty(patches)
        for members in sets:
            tokens = np.concatenate([np.arange(prefix), prefix + np.asarray(members)])
            plain[members] = norms[tokens].mean()
        found["value_weighted_attention"] = reached.sum() / plain.sum()
    return {name: float(value) for name, value in found.items()}


def offset_map(weights: Array, prefix: int, grid: tuple[int, int], reach: tuple[int, int]) -> Array:
    """Renormalised attention summed by offset of key from query, `[2 h - 1, 2 w - 1]`, mean over queries."""
    raw = weights[prefix:, prefix:]
    a = raw / raw.sum(-1, keepdims=True)
    out = np.zeros((2 * grid[0] - 1, 2 * grid[1] - 1))
    where = places(grid).astype(int)
    for query, (row, column) in enumerate(where):
        for key, (to_row, to_column) in enumerate(where):
            out[to_row - row + grid[0] - 1, to_column - column + grid[1] - 1] += a[query, key]
    (top, left), (height, width) = (grid[0] - reach[0], grid[1] - reach[1]), reach
    return out[top : top + 2 * height - 1, left : left + 2 * width - 1] / len(where)
