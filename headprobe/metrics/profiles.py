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
        share: `[bins, rows * (columns // 2 + 1)]`, each bin's shares of the half plane that a real transform gives.
    """

    name: str
    frequency: FloatArray
    share: FloatArray


@lru_cache(maxsize=64)
def profiles_of(grid: Size) -> tuple[Profile, Profile]:
    """Return the two profiles of a grid.

    `diagonal` (Park & Kim 2022, https://arxiv.org/abs/2202.06709): the half diagonal of the shifted transform from the
    middle to its corner, labelled by the root mean square of the two axes' frequencies, on a square grid their common
    value. `radial`: all frequencies up to 1, in rings as wide as the coarser axis' step.
    """
    rows, columns = grid
    along = [np.fft.fftfreq(length) * 2 for length in grid]
    down, across = np.meshgrid(*along, indexing="ij")
    steps = min(rows - rows // 2, columns - columns // 2)
    diagonal = np.full(grid, -1)
    diagonal[np.arange(steps), np.arange(steps)] = np.arange(steps)
    radius = np.hypot(down, across)
    width = 2 / min(grid)
    ring = np.floor(radius / width + 0.5).astype(int)
    ring[radius > 1 + 1e-9] = -1
    return _profile("diagonal", diagonal, radius / np.sqrt(2)), _profile("radial", ring, radius)


def _profile(name: str, bins: NDArray[np.int_], frequency: FloatArray) -> Profile:
    """Average frequencies by bin; -1 is no bin. Real maps have equal amplitudes at f and -f."""
    rows, columns = bins.shape
    members = (bins == np.arange(bins.max() + 1)[:, None, None]).astype(float)
    members /= members.sum(axis=(1, 2), keepdims=True)
    half = members[..., : columns // 2 + 1].copy()
    for column in range(columns // 2 + 1, columns):  # the half that a real transform leaves out
        half[:, -np.arange(rows) % rows, columns - column] += members[:, :, column]
    return Profile(name, (members * frequency).sum(axis=(1, 2)), half.reshape(len(half), -1))


@dataclass(frozen=True)
class Transform:
    """The Fourier transform of a grid as matrix products, and what is kept of it.

    Two small products, first along columns, then along rows, leave channels innermost, where the output projection
    needs them; a library's transform wants them outermost, and copying took longer than transforming.

    Attributes:
        along_columns: `[2 (columns // 2 + 1), columns]`, real parts before imaginary ones.
        along_rows: `[2 rows, 2 rows]`, from (row, part) to (part, row).
        kept: int64 `[frequencies]`, places in the flattened half plane that some profile needs.
        share: float32 `[frequencies, bins]`, their shares in the profiles' bins, one profile after the other.
    """

    along_columns: Tensor
    along_rows: Tensor
    kept: Tensor
    share: Tensor


@lru_cache(maxsize=64)
def transform_of(grid: Size, device: torch.device) -> Transform:
    """Return a grid's transform on a device."""
    rows, columns = grid
    across = 2 * np.pi * np.outer(np.arange(columns // 2 + 1), np.arange(columns)) / columns
    down = 2 * np.pi * np.outer(np.arange(rows), np.arange(rows)) / rows
    cosine, sine = np.cos(down), np.sin(down)
    # (cos - i sin)(re + i im), for each row the real and the imaginary part side by side
    real, imaginary = np.stack([cosine, sine], axis=-1), np.stack([-sine, cosine], axis=-1)
    share = np.concatenate([profile.share for profile in profiles_of(grid)])
    kept = np.flatnonzero(share.any(axis=0))
    first, second = np.concatenate([np.cos(across), -np.sin(across)]), np.concatenate([real, imaginary])
    tensors = [torch.from_numpy(a).float().to(device) for a in (first, second.reshape(2 * rows, -1), share[:, kept].T)]
    return Transform(tensors[0], tensors[1], torch.from_numpy(kept).to(device), tensors[2])


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
    """Return the kept frequencies' real and imaginary parts `[2, images, frequencies, groups, channels]`."""
    images, (rows, columns) = len(maps), grid
    across = transform.along_columns @ maps.float().reshape(images, rows, columns, -1)
    waves = transform.along_rows @ across.view(images, 2 * rows, -1)
    kept = waves.view(images, 2, -1, across.shape[-1]).index_select(2, transform.kept)
    return torch.unflatten(kept, -1, tuple(maps.shape[2:])).transpose(0, 1)


def _profiled(waves: Tensor, weight: Tensor | None) -> Tensor:
    """Return log amplitudes of a few images `[images, groups, frequencies]`, means over channels."""
    if weight is not None:  # one large product per group
        _, images, frequencies, groups, channels = waves.shape
        mixed = waves.permute(3, 0, 1, 2, 4).reshape(groups, -1, channels) @ weight.mT
        waves = mixed.view(groups, 2, images, frequencies, -1).permute(1, 2, 3, 0, 4)
    real, imaginary = waves
    amplitudes = real.square().addcmul_(imaginary, imaginary).sqrt_().add_(FLOOR)
    channels = amplitudes.shape[-1]
    for _ in range(2):  # a product of 4 amplitudes fits float32 (1e-6 to 4e9 each) and costs 1 logarithm instead of 4
        if amplitudes.shape[-1] % 2 == 0:
            half = amplitudes.shape[-1] // 2
            amplitudes = amplitudes[..., :half] * amplitudes[..., half:]
    means: Tensor = amplitudes.log_().sum(dim=-1).div_(channels)
    return means.transpose(1, 2)
