"""Where the tokens of an attention layer lie on the image, and which of them can attend to which."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.arrays import IntArray

Size = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one row of an attention layer: prefix tokens first, then patches, or one window of patches.

    Attributes:
        tokens: Tokens that a query can attend to (of one window, where there are windows).
        prefix: Leading tokens without a place: class token, distillation token, registers.
        class_token: Whether the first of them is the class token.
        grid: Patch rows and columns of the whole image, None where they are unknown.
        patch: Height and width of a patch in input pixels, from one patch to the next.
        window: Rows and columns of a window, None for global attention.
        shift: Rows and columns that the image is rolled by, up and to the left, before it is cut into windows.
        pooled: The queries are learned, or a class token: no patches of the image.
        rows: Rows of the layer's batch per image, where there are several of unknown place.
        unplaced: Which patches the queries and keys are is unknown, so there are no statistics of single patches.

    Raises:
        UsageError: The grid does not have as many places as there are tokens.
    """

    tokens: int
    prefix: int = 0
    class_token: bool = False
    grid: Size | None = None
    patch: tuple[float, float] = (16.0, 16.0)
    window: Size | None = None
    shift: Size = (0, 0)
    pooled: bool = False
    rows: int = 1
    unplaced: bool = False

    def __post_init__(self) -> None:
        places = self.window or self.grid
        if self.window is not None and self.grid is None:
            raise UsageError(f"a windowed layer needs its grid, got window {self.window} without one")
        if places is not None and self.prefix + math.prod(places) != self.tokens:
            raise UsageError(
                f"{self.tokens} tokens must be {self.prefix} prefix tokens and a grid of patches, got {places}"
            )

    @property
    def on_map(self) -> bool:
        """Whether the queries are patches with known places, so that numbers by query form a map of the image."""
        return self.grid is not None and not self.anonymous

    @property
    def anonymous(self) -> bool:
        """Whether queries and keys are no patches with known attention to each other."""
        return self.pooled or self.unplaced

    @property
    def window_grid(self) -> Size:
        """Rows and columns of windows in an image; windows at its lower and right edge may be padded."""
        if self.window is None or self.grid is None:
            return (1, 1)
        return (math.ceil(self.grid[0] / self.window[0]), math.ceil(self.grid[1] / self.window[1]))

    @property
    def windows(self) -> int:
        """Rows of the layer's batch per image."""
        return self.rows if self.window is None else math.prod(self.window_grid)

    @property
    def patches(self) -> int:
        """Patches of the whole image."""
        return self.tokens - self.prefix if self.grid is None else math.prod(self.grid)

    @property
    def registers(self) -> int:
        """Prefix tokens beside the class token: registers, the distillation token."""
        return self.prefix - self.class_token

    @cached_property
    def padded(self) -> bool:
        """Whether some windows hold padding, which is no part of the image."""
        return self.window is not None and bool((self.places < 0).any())

    @cached_property
    def places(self) -> IntArray:
        """Number of each token's patch, row by row over the image, `[windows, tokens]`; -1 without a place.

        Windows are cut from the image after it was rolled and then padded, as in timm's Swin.
        """
        patches = np.arange(self.patches)
        if self.window is None or self.grid is None:
            return np.concatenate([np.full(self.prefix, -1), patches])[None]
        rolled = np.roll(patches.reshape(self.grid), (-self.shift[0], -self.shift[1]), (0, 1))

        # pad below and to the right, up to whole windows
        rows, columns = (n * w for n, w in zip(self.window_grid, self.window, strict=True))
        edges = ((0, rows - self.grid[0]), (0, columns - self.grid[1]))
        return self._cut(np.pad(rolled, edges, constant_values=-1))

    @cached_property
    def groups(self) -> IntArray:
        """Number of each token's group, `[windows, tokens]`: tokens attend inside their group only.

        A shifted window at the image's edge holds up to four pieces that are no neighbours; timm's attention mask keeps
        them apart (Liu 2021, figure 4, https://arxiv.org/abs/2103.14030).
        """
        if self.window is None or not any(self.shift):
            return np.zeros((self.windows, self.tokens), dtype=np.int64)
        rows, columns = (
            _regions(windows * size, size, shift)
            for windows, size, shift in zip(self.window_grid, self.window, self.shift, strict=True)
        )
        # one number for each of the 3 x 3 regions of the image, then numbered from 0 in each window
        regions = self._cut(3 * rows[:, None] + columns[None])
        return np.stack([np.unique(window, return_inverse=True)[1].ravel() for window in regions])

    def _cut(self, image: IntArray) -> IntArray:
        """Cut `[rows, columns]` into windows `[windows, tokens]`."""
        (down, across), (height, width) = self.window_grid, self.window or image.shape
        by_window = image.reshape(down, height, across, width).swapaxes(1, 2)  # [down, across, height, width]
        return by_window.reshape(-1, height * width)


def _regions(length: int, window: int, shift: int) -> IntArray:
    """Return timm's three regions along one axis of the rolled image; an axis that is not shifted has one."""
    index = np.arange(length)
    if not shift:
        return np.zeros_like(index)
    # 0 up to the last window, 1 in it, 2 for what was rolled in from the other side
    return (index >= length - window).astype(np.int64) + (index >= length - shift)


@dataclass(frozen=True)
class GridTables:
    """What reducing attention needs of a `TokenGrid`, as tensors; patch tokens only, without prefix tokens.

    Windows that are all alike share one entry: `[1, ...]` instead of `[windows, ...]`.

    Attributes:
        real: float32 `[windows, tokens]`, 1 for tokens of the image (prefix tokens too), 0 for padding.
        distance: float32 `[windows, patches, patches]`, pixels; None without a grid.
        members: float32 `[windows, groups, tokens]`, 1 where a token is in the group.
        offset: int64 `[windows, patches, patches]`, bin of key minus query in the offset map. One additional bin, the
            last, takes what cannot be attended to. None without a grid.
        reach: Rows and columns of the offset map, `2 * reach - 1` each.
        baseline_px: Mean distance under uniform attention to reachable patches; NaN without a grid.
        log_keys: Mean over patches of the logarithm of the number of reachable patches.
    """

    real: Tensor
    distance: Tensor | None
    members: Tensor
    offset: Tensor | None
    reach: Size | None
    baseline_px: float
    log_keys: float


@lru_cache(maxsize=256)
def tables_of(grid: TokenGrid, device: torch.device) -> GridTables:
    """Return a grid's tables on a device; made once per kind of layer."""
    reachable = _reachable(grid)
    keys = reachable.sum(axis=-1)  # of each query, [windows, patches]; 0 for padding
    log_keys = float(np.log(keys[keys > 0]).mean())

    distance, offset, reach, baseline = None, None, None, math.nan
    if grid.grid is not None:
        steps = _steps(grid)
        pixels = np.hypot(steps[0] * grid.patch[0], steps[1] * grid.patch[1])  # [windows, patches, patches]
        mean = (pixels * reachable).sum(axis=-1)[keys > 0] / keys[keys > 0]
        distance, baseline = torch.from_numpy(_thrifty(pixels)).float().to(device), float(mean.mean())
        offset, reach = _offsets(steps, reachable)

    real = np.where(np.arange(grid.tokens) < grid.prefix, True, grid.places >= 0)
    members = grid.groups[:, None] == np.arange(grid.groups.max() + 1)[:, None]  # [windows, groups, tokens]
    return GridTables(
        real=torch.from_numpy(_thrifty(real)).float().to(device),
        distance=distance,
        members=torch.from_numpy(_thrifty(members)).float().to(device),
        offset=None if offset is None else torch.from_numpy(_thrifty(offset)).to(device),
        reach=reach,
        baseline_px=baseline,
        log_keys=log_keys,
    )


def _reachable(grid: TokenGrid) -> NDArray[np.bool_]:
    """Return which patches can attend to which, `[windows, patches, patches]`."""
    groups = np.where(grid.places < 0, -1, grid.groups)[:, grid.prefix :]  # -1 for padding
    same_group = groups[:, :, None] == groups[:, None, :]
    return np.asarray(same_group & (groups[:, :, None] >= 0), dtype=np.bool_)


def _steps(grid: TokenGrid) -> IntArray:
    """Return rows and columns from query to key on the image, `[2, windows, patches, patches]`; 0 for padding."""
    places = grid.places[:, grid.prefix :]
    where = np.stack(np.divmod(np.maximum(places, 0), grid.grid[1] if grid.grid else 1))  # [2, windows, patches]
    steps = where[:, :, None, :] - where[:, :, :, None]
    real = places >= 0
    return np.asarray(steps * (real[:, :, None] & real[:, None, :]), dtype=np.int64)


def _offsets(steps: IntArray, reachable: NDArray[np.bool_]) -> tuple[IntArray, Size]:
    """Return each pair's bin of the offset map, and the map's reach: 1 + the largest offset that can be attended to."""
    height, width = (1 + int(np.abs(axis * reachable).max()) for axis in steps)
    rows, columns = 2 * height - 1, 2 * width - 1
    bins = (steps[0] + height - 1) * columns + steps[1] + width - 1  # offsets from -reach + 1 on, row by row
    return np.where(reachable, bins, rows * columns), (height, width)


def _thrifty(by_window: NDArray[np.generic]) -> NDArray[np.generic]:
    """Keep one of `[windows, ...]` where all are equal."""
    return by_window[:1].copy() if bool((by_window == by_window[:1]).all()) else by_window
