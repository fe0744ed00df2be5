"""How similar heads are, from their moments alone: SVCCA, CCA, PWCCA, CKA and Procrustes, and the noise floor of each.

Every measure is a matrix `[heads, heads]` in the order of the block's heads. A head without variance (or with a NaN)
has no similarity, not even with itself: its row and column are NaN, and its rank is 0.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.similarity.head_moments import CrossMoments, HeadMoments
from headprobe.metrics.similarity.subspaces import Subspace, singular_values, subspaces, svd, whitened
from headprobe.text import counted

Measure = Literal["svcca", "cca", "pwcca", "cka", "cka_unbiased", "procrustes"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
VARIANCE = 0.99  # fraction of the sum of squares that SVCCA keeps: the paper's
WHOLLY = 1 - 1e-9  # from here on a canonical correlation counts as 1
NEARLY = 1 - 1e-4  # where all correlations are above it, so is PWCCA, whatever the weights


class Similarities(NamedTuple):
    """Similarities of the heads of a block."""

    values: dict[Measure, FloatArray]  #: by measure, `[heads, heads]`
    rank: IntArray  #: dims of each head that vary, `[heads]`; 0 marks a head without similarity
    kept: IntArray  #: dims of each head that SVCCA keeps, `[heads]`


def similarities(
    moments: HeadMoments, variance: float = VARIANCE, measures: Sequence[Measure] = MEASURES, noise_floor: bool = False
) -> Similarities:
    """Compare every head of a block with every other and with itself.

    The measures:

    - `svcca`: mean canonical correlation between the leading principal axes of both heads that hold `variance` of
      their sum of squares (Raghu et al., 2017, arXiv 1706.05806). 1 where one head's kept dims are a linear map of
      the other's. Unchanged by rotation, scale and mean, and with `variance=1` by any invertible linear map.
    - `cca`: the same with all dims that vary.
    - `pwcca`: canonical correlations of all dims, weighted by how much of the ROW's head each variate carries:
      `sum_j |<h_i, x_j>|` over its channels (Morcos, Raghu & Bengio, 2018, arXiv 1806.05759). Not symmetric, and
      changed by a rotation of the row's head; where several variates are wholly unrelated their weights, and so the
      value, depend on the sample however large it is. NaN where it is not unique (see `not_unique`): with fewer
      samples than the two heads have dims together.
    - `cka`: linear centred kernel alignment (Kornblith et al., 2019, arXiv 1905.00414). Unchanged by rotation,
      scale and mean. It tends to 1 as dims per sample grow (Murphy et al., 2024, arXiv 2405.01012).
    - `cka_unbiased`: CKA of the unbiased HSIC (Song et al., 2012, JMLR 13, 1393-1434), exact over all samples, -1
      to 1, near 0 for independent heads; NaN below 4 samples. See `title` for its name.
    - `procrustes`: nuclear norm of the cross moment of both heads scaled to unit size, the cosine of the angular
      Procrustes distance (Williams et al., 2021, arXiv 2110.14739). 1 where one head is a rotated or mirrored,
      scaled and moved copy of the other.

    Args:
        moments: Centred moments of the block.
        variance: Fraction of the sum of squares that SVCCA keeps, above 0 and up to 1.
        measures: Which to compute.
        noise_floor: Compare each head with the others' outputs on the NEXT image instead: what unrelated images
            score. An entry below its floor shows no similarity; an unrelated pair of heads exceeds its floor half of
            the time. The floor is computed for row <= column, the row's head taking the image and the column's head
            the next one, and mirrored.

    Raises:
        UsageError: `variance` outside its range, an unknown measure, or no moments for the noise floor.
    """
    _check(variance, measures)
    cross = moments.shifted if noise_floor else moments.own
    if cross is None:
        raise UsageError("these moments hold no noise floor: sum them with noise_floor=True, got None")
    spaces = subspaces(moments, variance)
    rank = np.array([space.rank for space in spaces], dtype=np.int64)
    kept = np.array([space.kept for space in spaces], dtype=np.int64)

    values = {}
    for measure in measures:
        matrix = _MATRICES[measure](moments, _per_sample(cross, moments.own.samples), spaces)
        matrix[rank == 0] = matrix[:, rank == 0] = np.nan
        values[measure] = matrix
    return Similarities(values, rank, kept)


def title(measure: Measure, sampling: str) -> str:
    """Return the name of a measure for people: unbiased only for independent samples, one per image."""
    if measure == "cka_unbiased":
        return "unbiased CKA" if sampling in ("class", "mean") else "CKA debiased over tokens"
    names = {"svcca": "SVCCA", "cca": "mean CCA", "pwcca": "PWCCA", "cka": "linear CKA"}
    return names.get(measure, "Procrustes similarity")


def not_unique(correlations: FloatArray, ranks: tuple[int, int], samples: float) -> bool:
    """Return whether PWCCA depends on an arbitrary choice: several correlations are 1, and others are not.

    Variates of equal correlation may be turned among themselves. Their weights are sums of absolute values, which
    change then, and so does the weighted mean, unless all correlations are equal. Among n centred samples two heads of
    rank p and q have p + q - (n - 1) directions in common, whatever they compute.

    Args:
        correlations: Canonical correlations of both heads.
        ranks: Their ranks.
        samples: Samples behind them.
    """
    equal = max(sum(ranks) - (samples - 1), int((correlations > WHOLLY).sum()))
    return equal >= 2 and float(correlations.min()) < NEARLY


def samples_in_words(samples: IntArray, images: int, sampling: str) -> str:
    """Return what similarities were taken over, such as `2,600 samples (all tokens of 40 images)`.

    Args:
        samples: Samples behind each head's numbers `[heads]`, -1 for a head that was not compared.
        images: Images behind all of them.
        sampling: What a sample is.
    """
    what = {"tokens": "all tokens", "patches": "patch tokens", "class": "class tokens", "mean": "token means"}
    most = int(samples.max())
    least = int(samples[samples > 0].min(initial=most))
    number = counted(most, "sample") if least == most else f"{least:,} to {counted(most, 'sample')}"
    return f"{number} ({what[sampling]} of {counted(images, 'image')})"


def _svcca(moments: HeadMoments, cross: CrossMoments, spaces: Sequence[Subspace]) -> FloatArray:
    """Compute SVCCA: mean canonical correlation of the axes that are kept."""
    leading = [Subspace(space.axes[:, : space.kept], space.squares[: space.kept], space.kept) for space in spaces]
    return _cca(moments, cross, leading)


def _cca(moments: HeadMoments, cross: CrossMoments, spaces: Sequence[Subspace]) -> FloatArray:
    """Compute the mean canonical correlation of all axes."""

    def mean_correlation(row: int, column: int, block: FloatArray) -> tuple[float, float]:
        # singular values of the whitened cross moment are the canonical correlations
        found = _correlations(singular_values(whitened(spaces[row], spaces[column], block)))
        return float(found.mean()), float(found.mean())

    return _by_pairs(moments, cross, spaces, mean_correlation)


def _pwcca(moments: HeadMoments, cross: CrossMoments, spaces: Sequence[Subspace]) -> FloatArray:
    """Compute PWCCA: canonical correlations weighted by the row's channels."""

    def weighted(row: int, column: int, block: FloatArray) -> tuple[float, float]:
        # columns of `left` and of `right.T` are the variates of both heads, in terms of their axes
        left, found, right = svd(whitened(spaces[row], spaces[column], block))
        found = _correlations(found)
        if not_unique(found, (spaces[row].rank, spaces[column].rank), moments.own.samples):
            return np.nan, np.nan
        return _projected(spaces[row], left, found), _projected(spaces[column], right.T, found)

    return _by_pairs(moments, cross, spaces, weighted)


def _projected(space: Subspace, variates: FloatArray, correlations: FloatArray) -> float:
    """Return the mean correlation, weighted by the inner products of each variate with the head's channels.

    Args:
        space: Axes of the head, `[dim, rank]`.
        variates: Of this head, in terms of its axes, `[rank, variates]`.
        correlations: Of the variates, `[variates]`.
    """
    # axes times singular values are the channels' inner products with unit axes: [dim, rank] @ [rank, variates]
    weights = np.abs(space.axes * np.sqrt(space.squares) @ variates).sum(axis=0)
    return float(weights @ correlations / weights.sum())


def _procrustes(moments: HeadMoments, cross: CrossMoments, spaces: Sequence[Subspace]) -> FloatArray:
    """Compute the nuclear norm of the cross moment of heads scaled to unit size."""
    size = np.sqrt(np.maximum(moments.norms, 0))  # rounding may leave a constant head below 0

    def nuclear(row: int, column: int, block: FloatArray) -> tuple[float, float]:
        value = float(singular_values(block).sum() / (size[row] * size[column]))
        return value, value

    return _by_pairs(moments, cross, spaces, nuclear)


def _cka(moments: HeadMoments, cross: CrossMoments, _: Sequence[Subspace]) -> FloatArray:
    """Compute linear CKA: squared size of the cross moment over the sizes of both heads' own moments."""
    size = np.sqrt(_block_squares(moments, moments.own).diagonal())
    return _mirrored(_ratio(_block_squares(moments, cross), np.outer(size, size)))


def _cka_unbiased(moments: HeadMoments, cross: CrossMoments, _: Sequence[Subspace]) -> FloatArray:
    """Compute CKA of the unbiased HSIC."""
    size = np.sqrt(np.maximum(_unbiased_hsic(moments, moments.own).diagonal(), 0))
    return _mirrored(_ratio(_unbiased_hsic(moments, cross), np.outer(size, size)))


def _unbiased_hsic(moments: HeadMoments, cross: CrossMoments) -> FloatArray:
    """Return the unbiased HSIC of linear kernels, `[heads, heads]`.

    From sums about the mean, where sum x = 0 in Song's formula.
    """
    n = moments.own.samples
    if n < 4:
        return np.full_like(cross.norm_products, np.nan)
    # trace of the product of both kernels, their diagonals set to 0
    trace = _block_squares(moments, cross) - cross.norm_products
    # as sum x = 0, a kernel without its diagonal adds up to minus its trace, row by row to minus its diagonal
    totals = np.outer(moments.norms, moments.norms) / ((n - 1) * (n - 2))
    return np.asarray((trace + totals - 2 * cross.norm_products / (n - 2)) / (n * (n - 3)), dtype=np.float64)


def _block_squares(moments: HeadMoments, cross: CrossMoments) -> FloatArray:
    """Return the squared Frobenius norm of the cross moment of each pair of heads, `[heads, heads]`."""
    first = moments.offsets[:-1]  # each head's first channel
    of_rows = np.add.reduceat(cross.products**2, first, axis=0)  # [heads, width]
    return np.asarray(np.add.reduceat(of_rows, first, axis=1))


def _by_pairs(
    moments: HeadMoments,
    cross: CrossMoments,
    spaces: Sequence[Subspace],
    compare: Callable[[int, int, FloatArray], tuple[float, float]],
) -> FloatArray:
    """Fill a matrix from `compare`, which returns the entries (row, column) and (column, row).

    It is called with the numbers of both heads, row <= column, and the cross moment of their channels.
    """
    at, heads = moments.offsets, len(moments.dims)
    values = np.full((heads, heads), np.nan)
    for row in range(heads):
        for column in range(row, heads):
            if not (spaces[row].rank and spaces[column].rank):
                continue
            block = cross.products[at[row] : at[row + 1], at[column] : at[column + 1]]
            if np.isfinite(block).all():  # a noise floor of units with one image each has no pairs: NaN
                above, below = compare(row, column, block)
                values[column, row], values[row, column] = below, above  # on the diagonal, `above` stays
    return values


def _correlations(values: FloatArray) -> FloatArray:
    """Return canonical correlations without the rounding that lifts them above 1."""
    return np.minimum(values, 1.0)


def _mirrored(values: FloatArray) -> FloatArray:
    """Return the entries above the diagonal, on both sides of it."""
    return np.asarray(np.triu(values) + np.triu(values, 1).T, dtype=np.float64)


def _ratio(values: FloatArray, sizes: FloatArray) -> FloatArray:
    """Return the quotient; NaN where there is nothing to divide by."""
    return np.divide(values, sizes, out=np.full_like(values, np.nan), where=sizes > 0)


def _per_sample(cross: CrossMoments, samples: float) -> CrossMoments:
    """Return the cross moments as if over `samples` pairs: images alone in their unit have no next one."""
    if cross.samples == samples:
        return cross
    factor = samples / cross.samples if cross.samples else np.nan
    return CrossMoments(samples, cross.products * factor, cross.norm_products * factor)


def _check(variance: float, measures: Sequence[Measure]) -> None:
    if not 0 < variance <= 1:
        raise UsageError(f"variance must be above 0 and at most 1, got {variance}")
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown:
        raise UsageError(f"measures must be among {', '.join(MEASURES)}, got {unknown[0]!r}")


_MATRICES: dict[Measure, Callable[[HeadMoments, CrossMoments, Sequence[Subspace]], FloatArray]] = {
    "svcca": _svcca,
    "cca": _cca,
    "pwcca": _pwcca,
    "cka": _cka,
    "cka_unbiased": _cka_unbiased,
    "procrustes": _procrustes,
}
