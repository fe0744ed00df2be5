"""Frequency profiles of maps on a token grid: log amplitudes of the Fourier transform, along frequencies.

Frequencies are in pi rad/sample: 1 is the highest that a grid can carry along one axis, one period in two tokens. At
an even number of tokens the half diagonal stops short of it: 0.857 at 14 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOOR = 1e-6  # added to amplitudes before the logarithm, by Park & Kim


CHUNK = 1 << 21  # numbers at a time: larger pieces fall out of a CPU's cache


FloatArray = NDArray[np.float64]


Size = tuple[int, int]


@dataclass(frozen=True)
class Profile:
    """The bins that the frequencies of a grid are averaged in.

    Attributes:
        name: `diagonal` or `radial`.
        frequency: `[bins]`, the bins' mean frequencies in pi rad/sample; the first is 0.
        share: `[bins, (rows // 2 + 1) * columns]`, each bin's shares of half a plane: of f and -f, where a real map has
            equal amplitudes, one is enough.
    """

    name: str
    frequency: FloatArray
    share: FloatArray


@lru_cache(maxsize=64)
def profiles_of(grid: Size) -> tuple[Profile, Profile]:
    """Return the two profiles of a grid.

    `diagonal` (Park & Kim 2022, https://arxiv.org/abs/2202.06709): the half diagonal of the shifted transform from the
    middle to its corner, labelled by the root mean square of the two axes' frequencies, on a square grid their common
    value. `radial`: all frequencies up to 1, in rings as wide as the coarser axis' step, frequency 0 alone in one.
    """
    rows, columns = grid
    along = [np.fft.fftfreq(length) * 2 for length in grid]
    down, across = np.meshgrid(*along, indexing="ij")
    steps = min(rows - rows // 2, columns - columns // 2)
    diagonal = np.full(grid, -1)
    diagonal[np.arange(steps), np.arange(steps)] = np.arange(steps)
    radius = np.hypot(down, across)
    width = 2 / min(grid)
    ring = np.maximum(np.floor(radius / width + 0.5).astype(int), radius > 0)  # frequency 0 has a ring of its own
    ring[radius > 1 + 1e-9] = -1
    return _profile("diagonal", diagonal, radius / np.sqrt(2)), _profile("radial", ring, radius)


def _profile(name: str, bins: NDArray[np.int_], frequency: FloatArray) -> Profile:
    """Average frequencies by bin; -1 is no bin. Real maps have equal amplitudes at f and -f."""
    rows, columns = bins.shape
    members = (bins == np.arange(bins.max() + 1)[:, None, None]).astype(float)
    members /= members.sum(axis=(1, 2), keepdims=True)
    share = np.zeros_like(members)
    for row, column in np.ndindex(rows, columns):
        opposite = (-row % rows, -column % columns)
        kept = min((row, column), opposite)
        share[:, kept[0], kept[1]] += members[:, row, column]
    half = share[:, : rows // 2 + 1]
    return Profile(name, (members * frequency).sum(axis=(1, 2)), half.reshape(len(half), -1))


@dataclass(frozen=True)
class Transform:
    """The Fourier transform of a grid as matrix products, and what is kept of it.

    Two small products, first down the rows, then along the columns, leave channels innermost, where the output
    projection needs them; a library's transform wants them outermost, and copying took longer than transforming.

    Attributes:
        down_rows: `[2 (rows // 2 + 1), rows]`, to (frequency, part): real parts before imaginary ones.
        along_columns: `[2 columns, 2 columns]`, from (part, column) to (part, frequency).
        kept: int64 `[2 frequencies]`, places of real, then of imaginary parts that some profile needs, in
            (frequency down the rows, part, frequency along the columns).
        share: float32 `[frequencies, bins]`, their shares in the profiles' bins, one profile after the other.
    """

    down_rows: Tensor
    along_columns: Tensor
    kept: Tensor
    share: Tensor


@lru_cache(maxsize=64)
def transform_of(grid: Size, device: torch.device) -> Transform:
    """Return a grid's transform on a device."""
    rows, columns = grid
    down = 2 * np.pi * np.outer(np.arange(rows // 2 + 1), np.arange(rows)) / rows
    across = 2 * np.pi * np.outer(np.arange(columns), np.arange(columns)) / columns
    first = np.stack([np.cos(down), -np.sin(down)], axis=1).reshape(-1, rows)
    cosine, sine = np.cos(across), np.sin(across)
    second = np.block([[cosine, sine], [-sine, cosine]])  # (cos - i sin)(re + i im)
    share = np.concatenate([profile.share for profile in profiles_of(grid)])
    kept = np.flatnonzero(share.any(axis=0))
    tensors = [torch.from_numpy(a).float().to(device) for a in (first, second, share[:, kept].T)]
    frequency, along = np.divmod(kept, columns)  # in what the second product gives: [frequency, part, along]
    places = np.stack([(2 * frequency + part) * columns + along for part in range(2)])
    return Transform(tensors[0], tensors[1], torch.from_numpy(places.ravel()).to(device), tensors[2])


@torch.no_grad()
def log_amplitudes(maps: Tensor, grid: Size, weights: Sequence[Tensor | None] = (None,)) -> list[Tensor]:
    """Return profiles of log amplitudes `[images, groups, bins]`, means over the channels of a group.

    fft2, natural logarithm of amplitude + 1e-6, mean over channels (Park & Kim 2022); the bins of the `diagonal`, then
    of the `radial` profile.

    Args:
        maps: `[images, tokens, groups, channels]`, tokens being the grid row by row; groups are heads, say.
        grid: Its rows and columns.
        weights: One profile is returned for each: None for the channels as they are, `[groups, dim, channels]` for
            channels mixed by it. The transform is linear, so it is the transform that is mixed: one transform per
            channel of a head instead of one per channel of the stream, and only at the frequencies that are needed.
    """
    transform = transform_of(grid, maps.device)
    channels = max(maps.shape[3] if weight is None else weight.shape[1] for weight in weights)
    images = max(1, CHUNK // (2 * maps.shape[1] * maps.shape[2] * channels))
    parts: list[list[Tensor]] = []
    for part in torch.split(maps, images):
        waves = _waves(part, grid, transform)
        parts.append([_profiled(waves, weight) @ transform.share for weight in weights])
    return [torch.cat(of_weight) for of_weight in zip(*parts, strict=True)]


def _waves(maps: Tensor, grid: Size, transform: Transform) -> Tensor:
    """Return the kept frequencies' real and imaginary parts `[images, 2, frequencies, groups, channels]`.

    The mean is taken out before and put back at frequency 0, the first: rounding would else hide what varies little.
    """
    images, (rows, columns) = len(maps), grid
    maps = maps.float()
    mean = maps.mean(dim=1)
    down = transform.down_rows @ (maps - mean[:, None]).reshape(images, rows, -1)
    waves = transform.along_columns @ down.view(-1, 2 * columns, maps.shape[2] * maps.shape[3])
    kept = waves.view(images, -1, waves.shape[-1]).index_select(1, transform.kept)
    kept = kept.view(images, 2, -1, *maps.shape[2:])
    kept[:, 0, 0] += rows * columns * mean
    return kept


def _profiled(waves: Tensor, weight: Tensor | None) -> Tensor:
    """Return log amplitudes of a few images `[images, groups, frequencies]`, means over channels."""
    if weight is None:
        return _mean_logs(waves).transpose(1, 2)
    by_head = []
    for head, mixing in enumerate(weight):  # one large product per head, none of a copy
        mixed = waves[:, :, :, head].flatten(0, 2) @ mixing.mT
        by_head.append(_mean_logs(mixed.view(*waves.shape[:3], -1)))
    return torch.stack(by_head, dim=1)


def _mean_logs(waves: Tensor) -> Tensor:
    """Return log amplitudes `[images, ...]` of `[images, 2, ..., channels]`, means over channels."""
    real, imaginary = waves.unbind(dim=1)
    amplitudes = real.square().addcmul_(imaginary, imaginary).sqrt_().add_(FLOOR)
    channels = amplitudes.shape[-1]
    for _ in range(2):  # a product of 4 amplitudes fits float32 (1e-6 to 4e9 each) and costs 1 logarithm instead of 4
        if amplitudes.shape[-1] % 2 == 0:
            half = amplitudes.shape[-1] // 2
            amplitudes = amplitudes[..., :half] * amplitudes[..., half:]
    means: Tensor = amplitudes.log_().sum(dim=-1).div_(channels)
    return means
