"""The directions in which a head's output varies: principal axes, with the rank and the dims that a variance keeps."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import linalg

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.head_moments import HeadMoments

RANK_FACTOR = 4.0  #: c of the rank cut; ranks 1 to 63 of 64, means up to 1e4 deviations and n of 20 to 1e5 are tested


class Subspace(NamedTuple):
    """Principal axes of one head, largest variance first; none of a constant head or one with NaN."""

    axes: FloatArray  #: orthonormal columns, `[dim, rank]`
    squares: FloatArray  #: sums of squares along them (s^2 of the centred samples), `[rank]`
    kept: int  #: how many of the first axes hold the variance to keep

    @property
    def rank(self) -> int:
        """Dims that vary by more than rounding."""
        return len(self.squares)


def subspaces(moments: HeadMoments, variance: float) -> list[Subspace]:
    """Return the principal axes of every head, keeping `variance` (a fraction) of its sum of squares."""
    columns = [slice(int(first), int(end)) for first, end in itertools.pairwise(moments.offsets)]
    return [_subspace(moments, of_head, variance) for of_head in columns]


def _subspace(moments: HeadMoments, columns: slice, variance: float) -> Subspace:
    """Return the principal axes of the head with these columns."""
    products = moments.own.products[columns, columns]  # [dim, dim]
    nothing = Subspace(np.zeros((len(products), 0)), np.zeros(0), 0)
    if not np.isfinite(products).all() or moments.own.samples < 2:
        return nothing

    squares, axes = np.linalg.eigh(products)
    squares, axes = squares[::-1], axes[:, ::-1]  # largest first
    if squares[0] <= constant_cut(moments, columns):
        return nothing
    varies = squares > rank_cut(moments, columns, squares, axes)
    rank = int(np.logical_and.accumulate(varies).sum())  # up to the first axis that may be rounding alone
    return Subspace(axes[:, :rank], squares[:rank], kept_dims(squares[:rank], variance))


def rank_cut(moments: HeadMoments, columns: slice, squares: FloatArray, axes: FloatArray) -> FloatArray:
    """Return up to which size each eigenvalue of a head's centred moment matrix may be rounding alone, `[dim]`.

    The largest of three bounds, c being `RANK_FACTOR`:

    - `c * max(dims, samples) * eps * largest` bounds the rounding of float64 sums over that many samples, `largest`
      being the largest eigenvalue as it was summed, about the shift.
    - `c * eps32 * samples * offset^2`, the mean's offset from the shift along the eigenvector, bounds the rounding of
      float32 products. They are of white samples, so they round each direction in proportion to its own size about the
      shift (see `whitened_products`).
    - `c * samples * (eps of the outputs)^2 * mean square` bounds the rounding of the outputs themselves: their last
      digit (up to about two of them) is noise. It decides for a head with a mean far above its deviation.
    """
    samples, variances = moments.own.samples, moments.own.products.diagonal()[columns] / moments.own.samples
    largest = float(squares.max() + samples * np.square(moments.offset[columns]).sum())
    mean_square = float(np.max(np.square(moments.mean[columns]) + variances))
    of_sums = max(len(squares), samples) * float(np.finfo(np.float64).eps) * largest
    of_products = moments.rounding * samples * np.square(moments.offset[columns] @ axes)
    of_outputs = samples * moments.resolution**2 * mean_square
    return np.asarray(RANK_FACTOR * np.maximum(of_products, max(of_sums, of_outputs)), dtype=np.float64)


def constant_cut(moments: HeadMoments, columns: slice) -> float:
    """Return the largest eigenvalue up to which a head counts as constant.

    A query's attention weights sum to 1 but for about an eps of the outputs, and what is missing scales all channels of
    constant values alike: `c * samples * eps^2 * mean square length` in one direction, larger than a channel's own
    rounding.
    """
    samples = moments.own.samples
    variances = moments.own.products.diagonal()[columns] / samples
    length = float(np.sum(np.square(moments.mean[columns]) + variances))
    return RANK_FACTOR * samples * moments.resolution**2 * length


def kept_dims(squares: FloatArray, variance: float) -> int:
    """Return the smallest number of leading dims that hold the fraction `variance` of the sum of squares; all for 1."""
    if variance >= 1 or not len(squares):
        return len(squares)
    share = np.cumsum(squares) / squares.sum()
    return int((share < variance).sum()) + 1


def whitened(one: Subspace, other: Subspace, cross: FloatArray) -> FloatArray:
    """Return the cross moment between the axes of two heads, each axis scaled to unit length, `[rank, other rank]`.

    Args:
        one: Axes of the row's head.
        other: Axes of the column's head.
        cross: Cross moment of their channels, `[dim, other dim]`.
    """
    scale = np.sqrt(np.outer(one.squares, other.squares))
    return np.asarray(one.axes.T @ cross @ other.axes / scale, dtype=np.float64)


def singular_values(matrix: FloatArray) -> FloatArray:
    """Return the singular values, largest first; without vectors it is a third of the work of `svd`."""
    try:
        return np.asarray(np.linalg.svd(matrix, compute_uv=False), dtype=np.float64)
    except np.linalg.LinAlgError:
        return svd(matrix)[1]


def svd(matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return left vectors (columns), singular values and right vectors (rows), the values largest first.

    LAPACK's fast routine fails to converge on rare matrices; its slow one takes over then.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        left, values, right = linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    return left, values, right
