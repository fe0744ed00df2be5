"""Random heads that never change: the order is that of a hash, not of any library's random numbers.

The hash of a head is the sha256 of the ASCII text `WORD:SEED:LAYER.HEAD`, for example `random:7:3.1`; heads are taken
in ascending order of it. So a draw of k heads holds the draw of k - 1, and a head's place among the others is the same
in every model that has them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

Head = tuple[int, int]


def draw_hash(word: str, seed: int, head: Head) -> bytes:
    """The rank of a head in a draw: smaller comes first."""
    layer, index = head
    return hashlib.sha256(f"{word}:{seed}:{layer}.{index}".encode("ascii")).digest()


@lru_cache(maxsize=128)  # a grid asks for the same seed at every count
def random_order(heads_per_layer: tuple[int, ...], seed: int) -> tuple[Head, ...]:
    """Every head once, in the order in which `random:` and `grow:random:` take them."""
    heads = [(layer, head) for layer, count in enumerate(heads_per_layer) for head in range(count)]
    return tuple(sorted(heads, key=lambda head: draw_hash("random", seed, head)))


def one_per_layer(heads_per_layer: tuple[int, ...], seed: int) -> tuple[Head, ...]:
    """One head of each layer, drawn for each layer by itself."""
    return tuple(
        min(((layer, head) for head in range(count)), key=lambda head: draw_hash("one-per-layer", seed, head))
        for layer, count in enumerate(heads_per_layer)
    )
