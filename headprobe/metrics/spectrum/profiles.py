"""Frequency profiles of maps on a token grid: log amplitudes of the Fourier transform, along frequencies.

Frequencies are in pi rad/sample: 1 is the highest that a grid can carry along one axis, one period in two tokens. At
an even number of tokens the half diagonal stops short of it: 0.857 at 14 tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.token_grid import Size

AMPLITUDE_FLOOR = 1e-6  # added to amplitudes before the logarithm, by Park & Kim

NUMBERS_AT_ONCE = 1 << 21  # transformed in one piece: larger ones fall out of a CPU's cache


@dataclass(frozen=True)
class Profile:
    """The bins that the frequencies of a grid are averaged in.

    Attributes:
        name: `diagonal` or `radial`.
        frequency: `[bins]`, the bins' mean frequencies in pi rad/sample; the first is 0.
        share: `[bins, (rows // 2 + 1) * columns]`, each bin's shares of half a plane. A real map has equal amplitudes
            at f and -f, so one of them is enough.
    """

    name: str
    frequency: FloatArray
    share: FloatArray


@lru_cache(maxsize=64)
def profiles_of(grid: Size) -> tuple[Profile, Profile]:
    """Return the two profiles of a grid.

    `diagonal` (Park & Kim 2022, https://arxiv.org/abs/2202.06709): the half diagonal of the shifted transform from the
    middle to its corner, labelled by the root mean square of the two axes' frequencies, on a square grid their common
    value. `radial`: all frequencies up to 1, in rings as wide as the coarser axis' step, frequency 0 alone in one; the
    corners of the transform, beyond radius 1, are in no ring.
    """
    rows, columns = grid
    along = [np.fft.fftfreq(length) * 2 for length in grid]
    down, across = np.meshgrid(*along, indexing="ij")  # [rows, columns] each, frequency 0 first

    # number of each frequency's bin, -1 for none
    steps = min(rows - rows // 2, columns - columns // 2)
    diagonal = np.full(grid, -1)
    diagonal[np.arange(steps), np.arange(steps)] = np.arange(steps)

    radius = np.hypot(down, across)
    width = 2 / min(grid)
    ring = np.maximum(np.floor(radius / width + 0.5).astype(int), radius > 0)  # frequency 0 has a ring of its own
    ring[radius > 1 + 1e-9] = -1
    return _profile("diagonal", diagonal, radius / np.sqrt(2)), _profile("radial", ring, radius)


def _profile(name: str, bins: NDArray[np.int_], frequency: FloatArray) -> Profile:
    """Return the profile that averages frequencies by bin.

    Args:
        name: The profile's name.
        bins: Bin of each frequency, `[rows, columns]`; -1 is no bin.
        frequency: What the frequencies are labelled by, `[rows, columns]`.
    """
    rows, columns = bins.shape
    members = (bins == np.arange(bins.max() + 1)[:, None, None]).astype(float)  # [bins, rows, columns]
    members /= members.sum(axis=(1, 2), keepdims=True)

    # real maps have equal amplitudes at f and -f: the share of both goes to the first of them
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
    projection needs them. A library's transform needs them outermost, and copying took longer than transforming.

    A complex number is two real ones, its parts, the real part first.

    Attributes:
        down_rows: float32 `[2 (rows // 2 + 1), rows]`, from row to (frequency, part).
        along_columns: float32 `[2 columns, 2 columns]`, from (part, column) to (part, frequency).
        kept: int64 `[2 frequencies]`, places of the frequencies that some profile needs in (frequency down the rows,
            part, frequency along the columns): first of their real, then of their imaginary parts.
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

    # exp(-i angle) of each frequency and place
    down = 2 * np.pi * np.outer(np.arange(rows // 2 + 1), np.arange(rows)) / rows
    across = 2 * np.pi * np.outer(np.arange(columns), np.arange(columns)) / columns
    first = np.stack([np.cos(down), -np.sin(down)], axis=1).reshape(-1, rows)
    cosine, sine = np.cos(across), np.sin(across)
    second = np.block([[cosine, sine], [-sine, cosine]])  # (cos - i sin)(re + i im)

    share = np.concatenate([profile.share for profile in profiles_of(grid)])  # [bins, half a plane]
    kept = np.flatnonzero(share.any(axis=0))
    down_rows, along_columns, kept_share = (
        torch.from_numpy(matrix).float().to(device) for matrix in (first, second, share[:, kept].T)
    )

    # where the kept frequencies lie in what the second product gives: [frequency, part, along]
    frequency, along = np.divmod(kept, columns)
    places = np.stack([(2 * frequency + part) * columns + along for part in range(2)])
    return Transform(down_rows, along_columns, torch.from_numpy(places.ravel()).to(device), kept_share)


@torch.no_grad()
def log_amplitudes(maps: Sequence[Tensor], grid: Size, mixing: Tensor | None = None) -> list[Tensor]:
    """Return profiles of log amplitudes of each of the maps, means over the channels of a group.

    fft2, natural logarithm of amplitude + 1e-6, mean over channels (Park & Kim 2022); the bins of the `diagonal`, then
    of the `radial` profile.

    Args:
        maps: Transformed together, each `[images, tokens, groups, channels]`, tokens being the grid row by row; groups
            are heads, say.
        grid: Its rows and columns.
        mixing: `[groups, dim, channels]`: also return, last, the profile of the first of the maps with the channels of
            each group mixed by it. The transform is linear, so its result can be mixed instead of the maps: one
            transform per channel of a head instead of one per channel of the stream, and only at the frequencies that
            are needed.

    Returns:
        Each `[images, groups, bins]`.
    """
    transform = transform_of(grid, maps[0].device)
    channels = sum(math.prod(one.shape[2:]) for one in maps)
    mixed = 0 if mixing is None else math.prod(mixing.shape[:2])
    images_at_once = max(1, NUMBERS_AT_ONCE // (2 * maps[0].shape[1] * max(channels, mixed)))

    pieces: list[list[Tensor]] = []
    for piece in zip(*(torch.split(one, images_at_once) for one in maps), strict=True):
        means = _mean_logs(piece, _waves(piece, grid, transform), mixing)
        # [images, frequencies, groups] to [images, groups, frequencies], then @ [frequencies, bins]
        pieces.append([mean.transpose(1, 2) @ transform.share for mean in means])
    return [torch.cat(profiles) for profiles in zip(*pieces, strict=True)]


def _waves(maps: Sequence[Tensor], grid: Size, transform: Transform) -> Tensor:
    """Return the kept frequencies' real and imaginary parts `[images, 2, frequencies, channels of all maps]`.

    The first token is taken from all tokens before the transform and put back at frequency 0, the first: otherwise the
    rounding of a large mean would hide small variations.
    """
    images, (rows, columns) = len(maps[0]), grid
    flat = [one.float().flatten(2) for one in maps]  # [images, tokens, channels] each
    first = torch.cat([one[:, 0] for one in flat], dim=-1)  # [images, channels of all]
    inside = first.new_empty(images, rows * columns, first.shape[-1])
    for one, part in zip(flat, torch.split(inside, [one.shape[-1] for one in flat], dim=-1), strict=True):
        torch.sub(one, one[:, :1], out=part)

    # [frequencies * parts, rows] @ [images, rows, columns * channels]
    down = transform.down_rows @ inside.view(images, rows, -1)
    # [parts * frequencies, parts * columns] @ [images * frequencies, parts * columns, channels]
    waves = transform.along_columns @ down.view(-1, 2 * columns, inside.shape[-1])

    kept = waves.view(images, -1, inside.shape[-1]).index_select(1, transform.kept)
    kept = kept.view(images, 2, -1, inside.shape[-1])
    kept[:, 0, 0] += rows * columns * first  # real part of frequency 0
    return kept


def _mean_logs(maps: Sequence[Tensor], waves: Tensor, mixing: Tensor | None) -> list[Tensor]:
    """Return log amplitudes of each of the maps, and of the first mixed, `[images, frequencies, groups]`.

    Args:
        maps: `[images, tokens, groups, channels]` each.
        waves: `[images, 2, frequencies, channels of all maps]`.
        mixing: `[groups, dim, channels]`, if wanted.
    """
    amplitudes = _amplitudes(waves[:, 0], waves[:, 1])  # [images, frequencies, channels of all maps]
    found, start = [], 0
    for one in maps:
        stop = start + math.prod(one.shape[2:])
        found.append(_mean_log(torch.unflatten(amplitudes[..., start:stop], -1, one.shape[2:])))
        start = stop
    if mixing is not None:
        groups, channels = maps[0].shape[2:]
        # [groups, images * 2 * frequencies, channels] @ [groups, channels, dim]
        by_group = torch.unflatten(waves[..., : groups * channels].flatten(0, 2), -1, (groups, channels)).transpose(
            0, 1
        )
        mixed = torch.unflatten(torch.bmm(by_group, mixing.mT), 1, waves.shape[:3])
        found.append(_mean_log(_amplitudes(mixed[:, :, 0], mixed[:, :, 1])).movedim(0, -1))
    return found


def _amplitudes(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return what logarithms are taken of."""
    return real.square().addcmul_(imaginary, imaginary).sqrt_().add_(AMPLITUDE_FLOOR)


def _mean_log(amplitudes: Tensor) -> Tensor:
    """Return the means of logarithms over the last axis."""
    channels = amplitudes.shape[-1]
    # a product of 4 amplitudes fits float32 (1e-6 to 4e9 each) and costs 1 logarithm instead of 4
    for _ in range(2):
        if amplitudes.shape[-1] % 2 == 0:
            half = amplitudes.shape[-1] // 2
            amplitudes = amplitudes[..., :half] * amplitudes[..., half:]
    means: Tensor = amplitudes.log().sum(dim=-1).div_(channels)
    return means
