"""The attention map of every head of a layer on one image: whose attention it shows, and how weights become it.

These are the weights of one layer, raw. They say where a head looks, not what reaches the output: later layers mix the
patches further (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
import torch
from torch import Tensor

from headprobe.metrics.arrays import IntArray
from headprobe.metrics.attention.weights_chunk import WeightsChunk
from headprobe.metrics.token_grid import Size, TokenGrid

WITHOUT_MAP = "which patches its queries and keys are is unknown"


class MapKind(StrEnum):
    """Whose attention a map shows."""

    CLASS = "class"  #: the class token's, to every patch
    POOLING = "pooling"  #: the mean over the learned queries of a pooling layer, to every patch
    RECEIVED = "received"  #: the mean over all patches, to every patch


@dataclass(frozen=True)
class ImageMap:
    """How one layer's weights become a map of the image.

    Attributes:
        kind: Whose attention it shows.
        size: Patch rows and columns.
        places: Number of each key's patch, row by row over the image, `[windows, keys]`; -1 without a place.
    """

    kind: MapKind
    size: Size
    places: IntArray

    @classmethod
    def of(cls, grid: TokenGrid) -> Self | None:
        """Return the map of a layer whose queries are tokens of the image; None where their places are unknown."""
        if not grid.on_map or grid.grid is None:
            return None
        return cls(MapKind.CLASS if grid.class_token else MapKind.RECEIVED, grid.grid, grid.places)

    @classmethod
    def of_pooling(cls, keys: TokenGrid, before: Sequence[TokenGrid], class_query: bool) -> Self | None:
        """Return the map of a layer with a query of its own, which attends to the patches of a layer before it.

        Args:
            keys: Its keys, which have no places of their own.
            before: Tokens that leave the layers before it.
            class_query: Its query is a class token; else it is learned.
        """
        grid = next((grid for grid in reversed(before) if grid.on_map and grid.patches == keys.patches), None)
        if grid is None or grid.grid is None or keys.rows > 1:
            return None
        places = np.concatenate([np.full(keys.prefix, -1), np.arange(keys.patches)])[None]
        return cls(MapKind.CLASS if class_query else MapKind.POOLING, grid.grid, places)

    def reduce(self, chunks: Iterable[WeightsChunk]) -> Tensor:
        """Return one image's map `[heads, rows, columns]`, float32, from its weights in all windows.

        A query of another window, or of another piece of a shifted one, gives nothing. So a map of received attention
        sums to 1, less what goes to tokens without a place.
        """
        found: Tensor | None = None  # [windows, heads, keys], summed over queries
        queries = 0
        for chunk in chunks:
            part = torch.einsum("whqk,wq->whk", chunk.weights.float(), self._counted(chunk))
            found = part if found is None else found + part
            queries = max(queries, chunk.queries.stop)
        if found is None:
            raise ValueError("a map needs the weights of its layer, got none")

        places = self.places.ravel()
        placed = torch.from_numpy(np.argsort(places)[(places < 0).sum() :])  # keys in the order of their patches
        flat = found.transpose(0, 1).flatten(1)[:, placed.to(found.device)]  # [heads, patches]
        mean = flat / (flat.shape[1] if self.kind == MapKind.RECEIVED else queries)
        return torch.unflatten(mean, 1, self.size)

    def _counted(self, chunk: WeightsChunk) -> Tensor:
        """Return 1 for each query of a chunk that the map is a mean over, `[windows, queries]`; else 0."""
        own = self.places[:, chunk.queries] >= 0  # patches, no padding
        if self.kind != MapKind.RECEIVED:
            own = np.ones((len(self.places), chunk.weights.shape[2]), dtype=np.bool_)
        return torch.from_numpy(own).to(chunk.weights.device, torch.float32)


def as_bytes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps `[heads, rows, columns]` as uint8, 255 being each one's largest, and that largest, `[heads]`.

    A map with NaN is 0 everywhere, its largest is NaN.
    """
    largest = maps.flatten(1).amax(dim=1)  # NaN where there is one
    scaled = 255 * (maps / largest[:, None, None])
    # 0 / 0 where a head gives patches nothing at all
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0).round().to(torch.uint8), largest
