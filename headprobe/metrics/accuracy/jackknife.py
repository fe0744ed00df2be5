"""The delete-a-group jackknife: intervals over images of any function of several masks' scores, from sums by group."""

import numpy as np
from scipy import stats

from headprobe.metrics.arrays import FloatArray, IntArray


def leave_one_out(sums: FloatArray, images: IntArray) -> FloatArray:
    """Return means over all images but those of one group, for each group that has any.

    Args:
        sums: Sums over the images of each group, `[..., groups]`.
        images: Images of each group, `[groups]`.

    Returns:
        `[groups with images, ...]`, NaN where no image is left.
    """
    full = images > 0
    left = images.sum() - images[full]
    rest = sums.sum(axis=-1, keepdims=True) - sums[..., full]  # [..., groups with images]
    return np.asarray(np.moveaxis(rest / np.where(left > 0, left, np.nan), -1, 0))


def jackknife_interval(estimate: float, replicates: FloatArray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the delete-a-group jackknife's interval: Student's, with one degree of freedom less than groups.

    Args:
        estimate: From all images.
        replicates: The same without each group, `[groups]`.
        confidence: Share of samples of images whose interval should cover the value on all images.

    Returns:
        The lower and the upper limit; NaN with fewer than two groups, or where one of them has no value.

    Source: Kott, 2001, Journal of Official Statistics 17, 521-526.
    """
    groups = len(replicates)
    if not np.isfinite(estimate):
        return float("nan"), float("nan")
    reach = float(stats.t.isf((1 - confidence) / 2, max(groups - 1, 1)) * jackknife_error(replicates))
    return estimate - reach, estimate + reach


def images_and_draws_interval(
    estimate: float, replicates: FloatArray, draws: FloatArray, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the interval of a mean over random draws that was measured on a sample of images.

    The variances over images and over draws add up; Student's degrees of freedom are Welch and Satterthwaite's. Each
    draw was measured on these images, so a part of their noise is in both variances: the interval is a little wide.

    Args:
        estimate: From all images and draws, with the mean of the draws in it.
        replicates: The same without each group of images, `[groups]`.
        draws: The value of each draw on all images, `[draws]`.
        confidence: Share of samples of images and draws whose interval should cover the value of all.

    Returns:
        The lower and the upper limit; NaN with fewer than two groups or draws, or where one has no value.

    Source: Satterthwaite, 1946, Biometrics Bulletin 2, 110-114.
    """
    if len(draws) < 2 or not np.isfinite([estimate, *draws]).all():
        return float("nan"), float("nan")
    images = float(jackknife_error(replicates) ** 2)
    drawn = float(np.var(draws, ddof=1) / len(draws))
    total = images + drawn
    if not total > 0:
        return (estimate, estimate) if total == 0 else (float("nan"), float("nan"))
    degrees = total**2 / (images**2 / (len(replicates) - 1) + drawn**2 / (len(draws) - 1))
    reach = float(stats.t.isf((1 - confidence) / 2, degrees) * np.sqrt(total))
    return estimate - reach, estimate + reach


def jackknife_error(replicates: FloatArray) -> FloatArray:
    """Return the standard error of what was computed without each group, `[groups, ...]`; NaN with fewer than two."""
    groups = len(replicates)
    if groups < 2:
        return np.full(replicates.shape[1:], np.nan)
    squares = np.square(replicates - replicates.mean(axis=0)).sum(axis=0)
    return np.asarray(np.sqrt((groups - 1) / groups * squares))


def mean_with_error(sums: FloatArray, images: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return means over images and their standard errors, from sums over the images of each group.

    Args:
        sums: `[..., groups]`.
        images: Images of each group, `[groups]`.

    Returns:
        Both `[...]`; NaN without images, errors also with a single group.
    """
    total = images.sum()
    mean = sums.sum(axis=-1) / (total if total else np.nan)
    return np.asarray(mean, dtype=np.float64), jackknife_error(leave_one_out(sums, images))


def welch_degrees(variances: FloatArray, groups: list[int]) -> FloatArray:
    """Return the degrees of freedom of a sum of two independent variances `[2, ...]`, each over so many groups.

    Source: Satterthwaite, 1946, Biometrics Bulletin 2, 110-114.
    """
    total = variances.sum(axis=0)
    parts = sum(np.square(own) / (count - 1) for own, count in zip(variances, groups, strict=True))
    return np.asarray(np.square(total) / np.where(parts > 0, parts, np.nan), dtype=np.float64)
