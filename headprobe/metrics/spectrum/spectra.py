"""Which image frequencies every head carries: delta log amplitudes on the token grid, as sums over images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.spectrum.profiles import AMPLITUDE_FLOOR, log_amplitudes, profiles_of
from headprobe.metrics.sums import SumMetric, mean_and_error
from headprobe.metrics.token_grid import TokenGrid

SERIES = ("head", "contribution", "stream_before", "stream_after")
"""A head's output; what it adds to the stream, after its slice of W_O; the residual stream around a layer's attention.

Park & Kim's own curves are of the stream; curves of single heads are ours."""

WITHOUT_SPECTRUM = "the layer has no patches as queries, or their places on the image are unknown"


class SpectrumTable(NamedTuple):
    """One entry per layer, series, head, profile and bin; NaN where a series was all zero or never came."""

    layer: IntArray
    series: NDArray[np.str_]  #: of `SERIES`
    head: IntArray  #: -1 for the stream, which belongs to no head
    profile: NDArray[np.str_]  #: `diagonal` or `radial`
    frequency: FloatArray  #: pi rad/sample
    images: IntArray
    log_amplitude: FloatArray  #: natural logarithm, mean over images and channels
    delta_log_amplitude: FloatArray  #: the same minus its value at frequency 0
    error: FloatArray  #: standard error of the delta over images


@dataclass(frozen=True)
class _Block:
    """Where one series of a layer lies in the states: `rows` heads (or 1) times `bins`, flattened."""

    start: int
    rows: int
    bins: int

    @property
    def place(self) -> slice:
        """Its entries in the states."""
        return slice(self.start, self.start + self.rows * self.bins)


class Spectra(SumMetric):
    """Log amplitudes of every layer's heads and residual stream, streamed over batches and layers.

    Args:
        grids: Where the tokens of each layer lie; layers without a grid or with learned queries have no spectrum.
        heads_per_layer: Heads of each layer.
    """

    images: Tensor  #: int64 `[layers, series]`
    total: Tensor  #: float64 `[entries]`, log amplitudes summed over images
    square: Tensor  #: float64 `[entries]`, squares of the delta log amplitudes

    def __init__(self, grids: Sequence[TokenGrid], heads_per_layer: Sequence[int]) -> None:
        self.grids, self.heads_per_layer = tuple(grids), tuple(heads_per_layer)
        self.blocks: dict[tuple[int, str], _Block] = {}
        end = 0
        for layer, (grid, heads) in enumerate(zip(self.grids, self.heads_per_layer, strict=True)):
            if grid.grid is None or not grid.on_map:
                continue
            bins = sum(len(profile.frequency) for profile in profiles_of(grid.grid))
            for name in SERIES:
                block = _Block(end, 1 if name.startswith("stream") else heads, bins)
                self.blocks[layer, name] = block
                end = block.place.stop

        entries = ((end,), torch.float64)
        super().__init__(
            {
                "images": ((len(self.grids), len(SERIES)), torch.int64),
                "total": entries,
                "square": entries,
            }
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """The layers' grids and heads."""
        return (self.grids, self.heads_per_layer)

    def empty(self) -> Self:
        """Return the metric of the same model without images."""
        return type(self)(self.grids, self.heads_per_layer)

    def update(self, layer: int, profiles: Mapping[str, Tensor]) -> None:
        """Add a batch of one layer.

        Args:
            layer: The layer's number.
            profiles: By series `[images, heads or 1, bins]`, from `head_profiles`; a series that the layer does not
                have is left out.

        Raises:
            UsageError: The layer has no spectrum, or a series is unknown or of another shape; nothing is added then.
        """
        for name, values in profiles.items():
            block = self.blocks.get((layer, name))
            if block is None:
                raise UsageError(f"layer {layer} must have a spectrum of {', '.join(SERIES)}, got {name!r}")
            if values.shape[1:] != (block.rows, block.bins):
                wanted = f"[images, {block.rows}, {block.bins}]"
                raise UsageError(f"the {name} spectrum of layer {layer} must be {wanted}, got {list(values.shape)}")

        for name, values in profiles.items():
            exact = values.to(self.total.device, torch.float64)  # [images, heads or 1, bins]
            delta = exact - self._at_zero(layer, exact)
            sums = {"total": exact.sum(dim=0).flatten(), "square": delta.square().sum(dim=0).flatten()}
            self.add(sums, self.blocks[layer, name].place)
            self.add({"images": torch.tensor(len(values))}, (layer, SERIES.index(name)))

    def _at_zero(self, layer: int, values: Tensor) -> Tensor:
        """Return for each bin the value at frequency 0, the first bin of its profile."""
        grid = self.grids[layer].grid or (0, 0)
        lengths = [len(profile.frequency) for profile in profiles_of(grid)]
        by_profile = torch.split(values, lengths, dim=-1)
        return torch.cat([part[..., :1].expand_as(part) for part in by_profile], dim=-1)

    def compute(self) -> SpectrumTable:
        """Return all profiles over all images so far, the states of all processes added."""
        return self.table(self.to_arrays())

    def table(self, arrays: Mapping[str, NDArray[np.generic]]) -> SpectrumTable:
        """Return the profiles from the sums of `to_arrays`, of this model.

        A series with no amplitude above 0, as of a masked head, has no spectrum: NaN.
        """
        parts = [self._part(layer, name, arrays) for layer, name in self.blocks]
        if not parts:
            kinds = (int, str, int, str, float, int, float, float, float)
            return SpectrumTable(*(np.empty(0, dtype=kind) for kind in kinds))
        return SpectrumTable(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _part(self, layer: int, name: str, arrays: Mapping[str, NDArray[np.generic]]) -> SpectrumTable:
        """Return the table of one series of one layer."""
        block, grid = self.blocks[layer, name], self.grids[layer].grid or (0, 0)
        images = np.asarray(arrays["images"][layer, SERIES.index(name)])
        total, square = (
            torch.from_numpy(np.asarray(arrays[key][block.place], dtype=np.float64)).view(block.rows, block.bins)
            for key in ("total", "square")
        )
        delta, error = mean_and_error((total - self._at_zero(layer, total)).numpy(), square.numpy(), images)
        level, _ = mean_and_error(total.numpy(), square.numpy(), images)
        silent = np.abs(level - math.log(AMPLITUDE_FLOOR)).max(axis=1, keepdims=True) < 1e-4  # [heads, 1]

        profiles = profiles_of(grid)
        names = np.concatenate([np.full(len(profile.frequency), profile.name) for profile in profiles])
        frequency = np.concatenate([profile.frequency for profile in profiles])
        entries = block.rows * block.bins
        heads = np.full(block.rows, -1) if name.startswith("stream") else np.arange(block.rows)
        # head by head, bin by bin
        return SpectrumTable(
            layer=np.full(entries, layer),
            series=np.full(entries, name),
            head=heads.repeat(block.bins),
            profile=np.tile(names, block.rows),
            frequency=np.tile(frequency, block.rows),
            images=np.full(entries, images),
            log_amplitude=np.where(silent, np.nan, level).ravel(),
            delta_log_amplitude=np.where(silent, np.nan, delta).ravel(),
            error=np.where(silent, np.nan, error).ravel(),
        )


def head_profiles(
    heads_out: Tensor, grid: TokenGrid, weight: Tensor | None = None, streams: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Return log amplitudes of heads `[images, heads, bins]`, of streams, and last of what heads contribute.

    Windows are put back on the image first, their cyclic shift undone. Residual streams are transformed with the heads,
    which is faster than alone; each gives `[images, 1, bins]`.

    Args:
        heads_out: `[rows, tokens, heads, head_dim]`, rows being windows where there are any.
        grid: Where the tokens lie.
        weight: `[heads, dim, head_dim]`, the output projection, if what heads contribute is wanted.
        streams: `[images, tokens, dim]` each, prefix tokens first, then patches in the order of the image.
    """
    patches = [stream[:, grid.prefix :, None] for stream in streams]
    return log_amplitudes([on_image(heads_out, grid), *patches], grid.grid or (0, 0), weight)


def on_image(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """Return patch tokens in the order of the image `[images, patches, ...]`, without prefix tokens and padding.

    Args:
        tokens: `[rows, tokens, ...]`, rows being windows where there are any.
        grid: Where they lie.
    """
    if grid.window is None:
        return tokens[:, grid.prefix :]
    by_image = torch.unflatten(tokens, 0, (-1, grid.windows)).flatten(1, 2)  # [images, windows * tokens, ...]
    return by_image[:, _image_order(grid, tokens.device)]


@lru_cache(maxsize=256)
def _image_order(grid: TokenGrid, device: torch.device) -> Tensor:
    """Return where the patches of the image are among the tokens of its windows, int64 `[patches]`."""
    places = grid.places.ravel()
    order = np.flatnonzero(places >= 0)  # without padding
    return torch.from_numpy(order[np.argsort(places[order])]).to(device)
