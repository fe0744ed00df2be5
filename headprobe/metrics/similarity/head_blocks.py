"""What the moments of head outputs are taken over: the options of a user, and the blocks of heads that follow.

A block is a set of layers that share one moment matrix, so that every head of it is compared with every other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from headprobe.errors import UsageError
from headprobe.metrics.arrays import IntArray

Scope = Literal["within", "all", "pairs"]
Sampling = Literal["tokens", "patches", "class", "mean"]
Precision = Literal["float64", "float32"]

MAX_GROUPS = 16  # of images, for the jackknife: each keeps moments of its own


class MomentOptions(NamedTuple):
    """What is summed. Only moments of equal options and layers can be merged."""

    scope: Scope = "within"  #: heads compared with each other: of a layer, of the model, or of chosen pairs of layers
    sampling: Sampling = "tokens"  #: a sample is any token, a patch token, the class token, or an image's mean token
    groups: int = 1  #: groups of images that a jackknife can leave out, at most 16; 1 for none
    noise_floor: bool = True  #: also pair each image with the next one of its unit
    precision: Precision = "float64"  #: of the products of tokens and patches; the sums are float64

    @property
    def one_per_image(self) -> bool:
        """Whether samples are independent: one per image."""
        return self.sampling in ("class", "mean")

    @property
    def products(self) -> torch.dtype:
        """Number format of the products, in blocks with heads enough for float32 to pay."""
        return torch.float64 if self.one_per_image or self.precision == "float64" else torch.float32

    def check(self) -> None:
        """Refuse an option that is none of its choices, or groups that do not suit the scope.

        Raises:
            UsageError: With the option and its choices.
        """
        choices = {"scope": Scope, "sampling": Sampling, "precision": Precision}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not 1 <= self.groups <= MAX_GROUPS:
            raise UsageError(f"the jackknife's groups of images must be 1 (no jackknife) to 16, got {self.groups}")
        if self.groups > 1 and self.scope != "within":
            rule = "a jackknife keeps the moments once per group: only for the scope 'within', use groups=1"
            raise UsageError(f"{rule}, got groups={self.groups} with scope {self.scope!r}")


class LayerHeads(NamedTuple):
    """What one attention layer hands over."""

    heads: int
    head_dim: int
    prefix_tokens: int = 0  #: first tokens without a place in the image: class and distillation token, registers


@dataclass(frozen=True)
class Block:
    """Layers with one moment matrix for all their heads; its columns are ordered by layer, head and channel."""

    layers: tuple[int, ...]  #: numbers of the layers, ascending
    shapes: tuple[LayerHeads, ...]  #: one per layer

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Channels of each head, `[heads]`."""
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
    def axes(self) -> tuple[IntArray, IntArray]:
        """Layer and head number of each head, `[heads]`."""
        heads = [shape.heads for shape in self.shapes]
        return np.repeat(np.asarray(self.layers), heads), np.concatenate([np.arange(count) for count in heads])


def make_blocks(layers: Sequence[LayerHeads], scope: Scope, pairs: Sequence[tuple[int, int]] = ()) -> tuple[Block, ...]:
    """Return the blocks of a model: one per layer (`within`), one for `all`, or one per pair of layers (`pairs`).

    Raises:
        UsageError: Pairs without the scope `pairs` or the scope without pairs, or a pair that is not two layers of the
            model.
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
