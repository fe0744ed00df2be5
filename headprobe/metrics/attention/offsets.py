"""Offset maps: where a head looks relative to the query, averaged over queries and images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.sums import SumMetric
from headprobe.metrics.token_grid import TokenGrid, tables_of

WITHOUT_MAP = "the layer has no patches as queries, or their places on the image are unknown"


class OffsetMaps(SumMetric):
    """Query-aligned mean attention between patches of every head, streamed over batches and layers.

    The map of a layer is `[2 h - 1, 2 w - 1]`, the query in its middle, h and w being the window's (or image's) rows
    and columns of patches. Each cell is the weight (renormalised over patches) that a query gives to the patch at that
    offset, 0 where the offset leads outside, so a map sums to 1. A peak in the middle is a local head, a peak beside it
    a head of fixed offset, a broad hump a global head.

    Args:
        grids: Where the tokens of each layer lie.
        heads_per_layer: Heads of each layer.
    """

    images: Tensor  #: int64 `[layers]`; each layer with a map has a state `layer_NNN` of its own beside it, its sums

    def __init__(self, grids: Sequence[TokenGrid], heads_per_layer: Sequence[int]) -> None:
        self.grids, self.heads_per_layer = tuple(grids), tuple(heads_per_layer)
        states: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"images": ((len(self.grids),), torch.int64)}
        for layer, heads in enumerate(self.heads_per_layer):
            shape = self.shape(layer)
            if shape is not None:
                states[_state(layer)] = ((heads, *shape), torch.float64)
        super().__init__(states)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The layers' grids and heads."""
        return (self.grids, self.heads_per_layer)

    def empty(self) -> Self:
        """Return the metric of the same model without images."""
        return type(self)(self.grids, self.heads_per_layer)

    def shape(self, layer: int) -> tuple[int, int] | None:
        """Return rows and columns of a layer's map, None for a layer without one (`WITHOUT_MAP`)."""
        grid = self.grids[layer]
        reach = None if grid.anonymous else tables_of(grid, torch.device("cpu")).reach
        return None if reach is None else (2 * reach[0] - 1, 2 * reach[1] - 1)

    def update(self, layer: int, images: int, aligned: Tensor | None) -> None:
        """Add a batch of one layer.

        Args:
            layer: The layer's number.
            images: Images of the batch.
            aligned: `Reduction.aligned`, None for a layer without a map.

        Raises:
            UsageError: The weights are missing.
        """
        self.add({"images": torch.tensor(images)}, layer)
        shape = self.shape(layer)
        if shape is None:
            return
        if aligned is None:
            raise UsageError(f"the offset map of layer {layer} needs weights summed over images, got {aligned}")
        bins = tables_of(self.grids[layer], aligned.device).offset
        folded = fold_offsets(aligned, bins, math.prod(shape))  # type: ignore[arg-type]  # there are bins where there is a shape
        self.add({_state(layer): torch.unflatten(folded, 1, shape)})

    def compute(self) -> list[FloatArray | None]:
        """Return for each layer its maps `[heads, 2 h - 1, 2 w - 1]`, None for a layer without one."""
        return self.maps(self.to_arrays())

    def maps(self, arrays: Mapping[str, NDArray[np.generic]]) -> list[FloatArray | None]:
        """Return each layer's maps from the sums of `to_arrays`; NaN without images."""
        maps: list[FloatArray | None] = []
        for layer, grid in enumerate(self.grids):
            queries = float(arrays["images"][layer]) * grid.patches
            total = arrays.get(_state(layer))
            maps.append(None if total is None else np.asarray(total, dtype=np.float64) / (queries or math.nan))
        return maps


def fold_offsets(aligned: Tensor, bins: Tensor, size: int) -> Tensor:
    """Add weights up by the offset of key from query, `[heads, size]`.

    Args:
        aligned: `[windows, heads, queries, keys]`.
        bins: int64 `[windows or 1, queries, keys]`, number of each pair's offset; `size` itself is thrown away.
        size: Number of offsets.
    """
    by_head = aligned.transpose(0, 1).flatten(1)  # [heads, windows * queries * keys]
    total = by_head.new_zeros(len(by_head), size + 1)
    # heads and offsets on one axis: along one of several axes torch adds a number at a time, which is slow
    first = (size + 1) * torch.arange(len(by_head), device=bins.device)[:, None]  # of each head, [heads, 1]
    places = first + bins.expand(len(aligned), -1, -1).flatten()
    total.view(-1).index_add_(0, places.flatten(), by_head.flatten())
    return total[:, :size]


def _state(layer: int) -> str:
    return f"layer_{layer:03d}"
