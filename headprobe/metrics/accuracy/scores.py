"""What follows from the paired counts and sums of a run: accuracies, drops, flips and their intervals.

Needs no torch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from headprobe.metrics.accuracy import paired_tests as paired
from headprobe.metrics.arrays import FloatArray, IntArray


class PairedScores(NamedTuple):
    """One entry per row, `[1 + masks]`, the baseline first; a fraction or mean over no image is NaN.

    The baseline's differences from itself are 0, and their intervals and p are NaN: there is nothing to test.
    (A named tuple because torchmetrics refuses frozen dataclasses from `compute`.)
    """

    images: IntArray  #: images that count, the same in every row
    top1_count: IntArray  #: images with their label as the first prediction
    top5_count: IntArray  #: images with their label among the first five
    top1: FloatArray  #: fraction
    top5: FloatArray  #: fraction
    nll: FloatArray  #: mean negative log-likelihood of the label, nats
    drop_pp: FloatArray  #: baseline top-1 minus this row's, percentage points
    drop_low_pp: FloatArray  #: lower limit of its paired 95% interval (Tango)
    drop_high_pp: FloatArray  #: upper limit
    right_to_wrong: IntArray  #: images that only the baseline has right
    wrong_to_right: IntArray  #: images that only this row has right
    mcnemar_p: FloatArray  #: two-sided p of the interval's own test; below 0.05 exactly where the interval leaves out 0
    log_e_value: FloatArray  #: natural logarithm of an e-value of the flips, where images come in random order
    agreement: FloatArray  #: fraction with the baseline's first prediction
    kl_nats: FloatArray  #: mean KL(baseline || this row) of the predicted distributions
    nll_rise: FloatArray  #: this row's mean NLL minus the baseline's, nats
    nll_rise_low: FloatArray  #: lower limit of its paired 95% interval (`mean_interval`)
    nll_rise_high: FloatArray  #: upper limit
    nonfinite: IntArray  #: images with a NaN or infinite logit: wrong, and they spoil nll or kl_nats
    group_images: IntArray  #: images that could be read of each group, `[64]` (`image_groups`)
    group_top1_count: IntArray  #: of them those with their label as the first prediction, `[1 + masks, 64]`
    group_nll: FloatArray  #: sums of the NLL over the images of each group, nats, `[1 + masks, 64]`
    class_images: IntArray | None = None  #: images per label, `[classes]`
    class_top1_count: IntArray | None = None  #: `[1 + masks, classes]`
    class_top1: FloatArray | None = None  #: fraction, `[1 + masks, classes]`; NaN for a class without images


def paired_scores(arrays: Mapping[str, NDArray[np.generic]], unread: int = 0) -> PairedScores:
    """Derive everything from the sums of `PairedAccuracy.to_arrays`.

    Args:
        arrays: The sums.
        unread: Images that could not be read and count as wrong in every row. They are in the denominators of
            accuracies and drops. They are not in the denominators of agreement, NLL and KL, for which there are no
            logits, nor of classes. They are in no image group: they change no difference between rows.

    Raises:
        ValueError: The flips contradict the number of images.
    """
    counts = {name: np.asarray(value, dtype=np.int64) for name, value in arrays.items() if value.dtype.kind in "iu"}
    sums = {name: np.asarray(value, dtype=np.float64) for name, value in arrays.items() if value.dtype.kind == "f"}
    read = np.broadcast_to(counts["images"], counts["top1"].shape).copy()
    images = read + unread

    flips = counts["right_to_wrong"], counts["wrong_to_right"]
    drop_low, drop_high = paired.drop_interval_pp(*flips, images)
    with np.errstate(invalid="ignore"):  # infinite minus infinite NLL: a rise that is not defined
        nll_total = sums["nll"] - sums["nll"][0]
    powers = [nll_total, *(sums[f"nll_difference_{power}"] for power in ("square", "cube", "fourth"))]
    rise_low, rise_high = paired.mean_interval(powers, read)
    return PairedScores(
        images=images,
        top1_count=counts["top1"],
        top5_count=counts["top5"],
        top1=_per(counts["top1"], images),
        top5=_per(counts["top5"], images),
        nll=_per(sums["nll"], read),
        drop_pp=paired.drop_pp(*flips, images),
        drop_low_pp=_untested_baseline(drop_low),
        drop_high_pp=_untested_baseline(drop_high),
        right_to_wrong=counts["right_to_wrong"],
        wrong_to_right=counts["wrong_to_right"],
        mcnemar_p=_untested_baseline(np.where(images > 0, paired.mcnemar_p(*flips), np.nan)),
        log_e_value=_untested_baseline(np.where(images > 0, paired.log_e_value(*flips), np.nan)),
        agreement=_per(counts["agreement"], read),
        kl_nats=_per(sums["kl"], read),
        nll_rise=_per(nll_total, read),
        nll_rise_low=_untested_baseline(rise_low),
        nll_rise_high=_untested_baseline(rise_high),
        nonfinite=counts["nonfinite"],
        group_images=counts["group_images"],
        group_top1_count=counts["group_top1"],
        group_nll=sums["group_nll"],
        class_images=counts.get("class_images"),
        class_top1_count=counts.get("class_top1"),
        class_top1=_per(counts["class_top1"], counts["class_images"]) if "class_images" in counts else None,
    )


FEWEST_IMAGES = 50
"""With fewer images not all sorted labels stand out as strictly as `SORTED_P` asks."""

SORTED_P = 1e-6
"""Labels count as sorted where a random order would give what is seen in fewer cases: strict, as each run is tested."""


def why_no_e_value(labels: ArrayLike, complete: bool) -> str:
    """Return why an e-value of these images may be wrong, by their labels; nothing where they come in random order.

    An e-value holds where each flip is a fair coin given those before it. Masks cost some classes more than others, so
    images in the order of their classes are no such flips. Two tests, with the classes' numbers as scores: whether
    neighbours in a unit are alike (Wald and Wolfowitz' serial correlation), which shows labels that come sorted or in
    blocks, whatever the blocks' order; and whether the means of units differ (Kruskal and Wallis' statistic).

    Args:
        labels: Of each unit images, sum of labels, sum of squares, first label plus last, and the sum of products of
            neighbours, `[units, 5]` (`headprobe.units.coverage.label_sums`).
        complete: Whether these are all units of the data: what is left could be of other classes.

    Source: Wald and Wolfowitz, 1943, Annals of Mathematical Statistics 14, 378-388; Kruskal and Wallis, 1952, Journal
    of the American Statistical Association 47, 583-621.
    """
    units = np.asarray(labels, dtype=np.float64).reshape(-1, 5)
    images, sums, squares, ends, products = units[units[:, 0] > 0].T
    total = images.sum()
    if total < FEWEST_IMAGES:
        return f"fewer than {FEWEST_IMAGES} images do not show whether labels come sorted"
    if not complete and len(images) < 2:
        return "a single unit does not show whether others are of other classes"
    mean = sums.sum() / total
    variance = max(squares.sum() / total - mean**2, 0.0)
    if variance <= 1e-12 * mean**2:  # rounding leaves so much of a constant
        return "" if complete else "all labels so far are of one class"
    pairs = total - len(images)
    alike = products.sum() - mean * (2 * sums - ends).sum() + pairs * mean**2
    if pairs and stats.norm.sf(alike / (variance * np.sqrt(pairs)) + np.sqrt(pairs) / (total - 1)) < SORTED_P:
        like = f"{alike / pairs / variance:.2f}"
        return f"labels come sorted by class or in blocks of classes: those of neighbours correlate by {like}"
    between = ((sums - images * mean) ** 2 / images).sum() / variance * (total - 1) / total
    if stats.chi2.sf(between, len(images) - 1) < SORTED_P:
        return f"units are of different classes: {between / (total - 1):.0%} of the labels' variance lies between them"
    return ""


def _per(total: IntArray | FloatArray, images: IntArray) -> FloatArray:
    """Return a total per image; NaN without images."""
    return np.asarray(total / np.where(images > 0, images, np.nan), dtype=np.float64)


def _untested_baseline(values: FloatArray) -> FloatArray:
    """Return the values with NaN in the baseline's place."""
    return np.concatenate([[np.nan], values[1:]])
