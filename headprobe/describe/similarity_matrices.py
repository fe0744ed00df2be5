"""Matrices over all heads of a model, put together from the blocks of heads that were compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headprobe.describe.base import Role, prefixed
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.similarity.comparison import Comparison, above_floor, changes
from headprobe.units.tree import Arrays

SPREAD = {"error": "se", "low": "low", "high": "high"}
"""Fields of a `Spread`, and what the names of their arrays end in."""


@dataclass(frozen=True)
class HeadAxes:
    """The heads of the model in the order of (layer, head): the rows and columns of its matrices."""

    heads_per_layer: tuple[int, ...]

    @cached_property
    def layer(self) -> IntArray:
        """Layer of each head."""
        return np.repeat(np.arange(len(self.heads_per_layer)), self.heads_per_layer)

    @cached_property
    def head(self) -> IntArray:
        """Number of each head in its layer."""
        return np.concatenate([np.arange(heads) for heads in self.heads_per_layer])

    def rows_of(self, block: Comparison) -> IntArray:
        """Return the rows of a block's heads in the matrices of the model."""
        first = np.cumsum([0, *self.heads_per_layer])  # of each layer, its first head's row
        return first[block.moments.layer] + block.moments.head

    def spread_out(self, blocks: Sequence[Comparison], values: Sequence[ArrayLike]) -> NDArray[np.generic]:
        """Put blocks' values into an array of the whole model; NaN, -1 or False where there is no block.

        Args:
            blocks: The blocks.
            values: For each block `[heads]` or `[heads, heads]`.
        """
        dtype = np.result_type(values[0])
        # by the kind of number: floats, booleans, whole numbers
        nothing = {"f": np.nan, "b": False}.get(np.dtype(dtype).kind, -1)
        out = np.full((len(self.layer),) * np.ndim(values[0]), nothing, dtype=dtype)
        for block, value in zip(blocks, values, strict=True):
            rows = self.rows_of(block)
            # [heads of the block] or [heads, heads of the block] in their rows, and columns, of the model
            out[np.ix_(*[rows] * np.ndim(value))] = value
        return out

    def of_model(self, blocks: Sequence[Comparison]) -> Arrays:
        """Return a model's values, floors, errors and limits by measure, and ranks and kept dims of its heads."""
        arrays: Arrays = {
            "kept": self.spread_out(blocks, [block.found.kept for block in blocks]),
            "rank": self.spread_out(blocks, [block.found.rank for block in blocks]),
        }
        with_floor = all(block.floor for block in blocks)
        with_spread = all(block.spread for block in blocks)
        for measure in blocks[0].found.values:
            arrays[measure] = self.spread_out(blocks, [block.found.values[measure] for block in blocks])
            if with_floor:
                arrays[f"{measure}_floor"] = self.spread_out(blocks, [block.floor[measure] for block in blocks])
            if with_spread:
                for field, suffix in SPREAD.items():
                    spread = [getattr(block.spread[measure], field) for block in blocks]
                    arrays[f"{measure}_{suffix}"] = self.spread_out(blocks, spread)
            if with_floor and with_spread:
                above = []
                for block in blocks:
                    value, floor, error = block.found.values[measure], block.floor[measure], block.spread[measure].error
                    above.append(above_floor(value, floor, error, block.groups))
                arrays[f"{measure}_above_floor"] = self.spread_out(blocks, above)
        return arrays

    def of_change(self, baseline: Sequence[Comparison], masked: Sequence[Comparison]) -> Arrays:
        """Return masked minus baseline by measure, with errors and limits."""
        # for each block of heads its changes by measure
        blocks = [changes(*pair) for pair in zip(baseline, masked, strict=True)]
        arrays: Arrays = {}
        for measure in blocks[0]:
            entries = [block[measure] for block in blocks]
            arrays[measure] = self.spread_out(baseline, [entry.value for entry in entries])
            if all(entry.spread for entry in entries):
                for field, suffix in SPREAD.items():
                    spread = [getattr(entry.spread, field) for entry in entries]
                    arrays[f"{measure}_{suffix}"] = self.spread_out(baseline, spread)
        return arrays


def similarity_arrays(heads_per_layer: tuple[int, ...], found: Mapping[str, Sequence[Comparison]]) -> Arrays:
    """Return the arrays of `similarity.npz` that follow from the comparisons of each model's blocks of heads.

    Names of the masked model begin with `masked_`, of the change with `change_`.
    """
    axes, baseline = HeadAxes(heads_per_layer), found[Role.BASELINE]
    arrays: Arrays = {"layer": axes.layer, "head": axes.head}
    for model, blocks in found.items():
        arrays |= {prefixed(model, name): values for name, values in axes.of_model(blocks).items()}
    if Role.MASKED in found:
        change = axes.of_change(baseline, found[Role.MASKED])
        arrays |= {prefixed(Role.CHANGE, name): values for name, values in change.items()}

    # Later stages of a model may have fewer samples.
    samples = [np.full(len(block.moments.dims), int(block.moments.own.samples)) for block in baseline]
    arrays |= {
        "images": np.asarray(baseline[0].moments.images),
        "samples": axes.spread_out(baseline, samples),
        "groups": np.asarray(baseline[0].groups),
    }
    return arrays


def others_mean(matrix: NDArray[np.generic]) -> FloatArray:
    """Return each head's mean over all other heads that it was compared with, NaN where there is none.

    Args:
        matrix: `[heads, heads]`.
    """
    others = matrix.astype(np.float64)
    np.fill_diagonal(others, np.nan)
    finite = np.isfinite(others)
    total = np.where(finite, others, 0).sum(axis=1)
    count = finite.sum(axis=1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.asarray(mean, dtype=np.float64)


def nan_for_unknown(numbers: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return whole numbers as they are, or as floats with NaN where heads were not compared (-1)."""
    unknown = np.asarray(numbers, dtype=np.int64) < 0
    return np.where(unknown, np.nan, numbers) if unknown.any() else numbers
