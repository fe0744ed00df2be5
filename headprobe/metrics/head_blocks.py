"""Which heads are compared with which: a block is a set of layers whose heads share one moment matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headprobe.errors import UsageError

Scope = Literal["within", "all", "pairs"]


class LayerHeads(NamedTuple):
    """What one attention layer hands over."""

    heads: int
    head_dim: int
    prefix_tokens: int = (
        0  #: class token, distillation token and registers: its first tokens, without a place in the image
    )


@dataclass(frozen=True)
class Block:
    """Layers whose heads share one moment matrix; its columns are ordered by layer, head and channel."""

    layers: tuple[int, ...]  #: numbers of the layers, ascending
    shapes: tuple[LayerHeads, ...]  #: one per layer

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Channels of each head, ``[heads]``."""
        return tuple(shape.head_dim for shape in self.shapes for _ in range(shape.heads))

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.dims)

    @property
    def width(self) -> int:
        """Columns: channels of all heads."""
        return sum(self.dims)

    @property
    def extended(self) -> int:
        """Columns with each head's squared norm and the constant 1 (see `extended_moments`)."""
        return self.width + self.heads + 1

    @property
    def axes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Layer and head number of each head, ``[heads]``."""
        heads = [shape.heads for shape in self.shapes]
        return np.repeat(np.asarray(self.layers), heads), np.concatenate([np.arange(count) for count in heads])


def make_blocks(layers: Sequence[LayerHeads], scope: Scope, pairs: Sequence[tuple[int, int]] = ()) -> tuple[Block, ...]:
    """Return the blocks of a model: one per layer (``within``), one for ``all``, or one per pair of layers (``pairs``).

    Raises:
        UsageError: Pairs without the scope ``pairs`` or the scope without pairs, or a pair that is
            not two layers of the model.
    """
    if bool(pairs) != (scope == "pairs"):
        raise UsageError(
            f"pairs of layers go with the scope 'pairs', and only with it: scope {scope!r}, got {list(pairs)}"
        )
    for pair in pairs:
        if len(set(pair)) != 2 or not all(0 <= layer < len(layers) for layer in pair):
            raise UsageError(f"a pair must be two different layers in 0 to {len(layers) - 1}, got {tuple(pair)}")
    sets: dict[Scope, list[tuple[int, ...]]] = {
        "within": [(layer,) for layer in range(len(layers))],
        "all": [tuple(range(len(layers)))],
        "pairs": sorted({(min(pair), max(pair)) for pair in pairs}),
    }
    return tuple(Block(chosen, tuple(layers[layer] for layer in chosen)) for chosen in sets[scope])
