"""Matrices over all heads of a model, put together from the blocks of heads that were compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headprobe.metrics.arrays import IntArray
from headprobe.metrics.similarity.comparison import Comparison, above_floor
from headprobe.units.tree import Arrays

SPREAD = {"error": "se", "low": "low", "high": "high"}
"""Fields of a `Spread`, and what the names of their arrays end in."""


@dataclass(frozen=True)
class HeadAxes:
    """The heads of the model in the order of (layer, head)."""

    heads_per_layer: tuple[int, ...]

    @cached_property
    def layer(self) -> IntArray:
        """Layer of each head."""
        return np.repeat(np.arange(len(self.heads_per_layer)), self.heads_per_layer)

    @cached_property
    def head(self) -> IntArray:
        """Number of each head in its layer."""
        return np.concatenate([np.arange(heads) for heads in self.heads_per_layer])

    def places(self, one: Comparison) -> IntArray:
        """Return the numbers of a block's heads in the model."""
        first = np.cumsum([0, *self.heads_per_layer])
        return first[one.moments.layer] + one.moments.head

    def spread_out(self, blocks: Sequence[Comparison], values: Sequence[ArrayLike]) -> NDArray[np.generic]:
        """Put blocks' matrices, or one entry per head, into those of the whole model; NaN, -1 or False elsewhere."""
        shape = (len(self.layer),) * np.ndim(values[0])
        dtype = np.result_type(values[0])
        nothing = {"f": np.nan, "b": False}.get(np.dtype(dtype).kind, -1)
        out = np.full(shape, nothing, dtype=dtype)
        for one, value in zip(blocks, values, strict=True):
            places = self.places(one)
            out[np.ix_(*[places] * np.ndim(value))] = value
        return out

    def matrices(self, blocks: Sequence[Comparison]) -> Arrays:
        """Return values, floors, errors and limits of every measure, and ranks and kept dims of every head."""
        arrays: Arrays = {
            "kept": self.spread_out(blocks, [one.found.kept for one in blocks]),
            "rank": self.spread_out(blocks, [one.found.rank for one in blocks]),
        }
        for measure in blocks[0].found.values:
            arrays[measure] = self.spread_out(blocks, [one.found.values[measure] for one in blocks])
            if all(one.floor for one in blocks):
                arrays[f"{measure}_floor"] = self.spread_out(blocks, [one.floor[measure] for one in blocks])
            if all(one.spread for one in blocks):
                for field, suffix in SPREAD.items():
                    spread = [getattr(one.spread[measure], field) for one in blocks]
                    arrays[f"{measure}_{suffix}"] = self.spread_out(blocks, spread)
            if all(one.floor and one.spread for one in blocks):
                above = [
                    above_floor(one.found.values[measure], one.floor[measure], one.spread[measure].error, one.groups)
                    for one in blocks
                ]
                arrays[f"{measure}_above_floor"] = self.spread_out(blocks, above)
        return arrays
