"""Paired accuracy: what each mask does to the very images that the baseline is scored on, as sums over images."""

import hashlib
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import RunError, UsageError
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores
from headprobe.metrics.sums import Layout, SumMetric

__all__ = ["PairedAccuracy", "PairedScores", "paired_scores", "paired_sums"]


GROUPS = 64
"""Random parts of the images: sums by group give an interval to any function of several masks (`jackknife`)."""


class PairedAccuracy(SumMetric):
    """Paired counts and sums of a baseline and its masks, streamed over batches.

    Args:
        masks: Masks beside the baseline.
        classes: Classes of the model's logits.
        per_class: Also count images and top-1 per label.

    Raises:
        UsageError: `masks` is below 0 or `classes` below 1.
    """

    MERGEABLE = "equal (masks, classes, per_class)"

    images: Tensor  #: int64 `[]`
    top1: Tensor  #: int64 `[1 + masks]`, images with a right first prediction
    top5: Tensor  #: int64 `[1 + masks]`, images with the label among the first five predictions
    right_to_wrong: Tensor  #: int64 `[1 + masks]`, images that only the baseline has right
    wrong_to_right: Tensor  #: int64 `[1 + masks]`, images that only this row has right
    agreement: Tensor  #: int64 `[1 + masks]`, images with the baseline's first prediction
    nonfinite: Tensor  #: int64 `[1 + masks]`, images with a NaN or infinite logit
    nll: Tensor  #: float64 `[1 + masks]`, nats
    nll_difference_square: Tensor  #: float64 `[1 + masks]`, squares of masked minus baseline NLL, nats^2
    nll_difference_cube: Tensor  #: float64 `[1 + masks]`, third powers, nats^3
    nll_difference_fourth: Tensor  #: float64 `[1 + masks]`, fourth powers, nats^4
    kl: Tensor  #: float64 `[1 + masks]`, KL(baseline || masked), nats
    group_images: Tensor  #: int64 `[64]`, images of each group (`image_groups`)
    group_top1: Tensor  #: int64 `[1 + masks, 64]`, of them those with a right first prediction
    group_nll: Tensor  #: float64 `[1 + masks, 64]`, nats
    class_images: Tensor  #: int64 `[classes]`, only if `per_class`
    class_top1: Tensor  #: int64 `[1 + masks, classes]`, only if `per_class`

    def __init__(self, masks: int, classes: int, per_class: bool = False) -> None:
        if masks < 0:
            raise UsageError(f"masks must be 0 or more, got {masks}")
        if classes < 1:
            raise UsageError(f"classes must be 1 or more, got {classes}")
        self.masks, self.classes, self.per_class = masks, classes, per_class
        super().__init__(state_layout(masks, classes, per_class))

    @property
    def signature(self) -> tuple[Any, ...]:
        """Numbers of masks and classes, and whether classes are counted."""
        return (self.masks, self.classes, self.per_class)

    @property
    def option_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The number of classes, int64 `[]`; all other options show in the states."""
        return {"classes": np.asarray(self.classes, dtype=np.int64)}

    def empty(self) -> Self:
        """Return the metric of the same masks and classes without images."""
        return type(self)(self.masks, self.classes, self.per_class)

    def update(self, logits: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Add a batch.

        Args:
            logits: `[1 + masks, images, classes]`, the baseline first.
            labels: `[images]`, integers of any kind.
            groups: `[images]`, the group of each image, an int64 that `image_groups` gave.

        Raises:
            UsageError: A shape or dtype is wrong, or a label lies outside the classes; nothing is added then.
        """
        _check_batch(logits, labels, 1 + self.masks, self.classes)
        if groups.shape != labels.shape:
            raise UsageError(f"groups must be [{len(labels)}], one per image, got {list(groups.shape)}")
        self.add(paired_sums(logits, labels.long(), groups, self.per_class))

    def compute(self) -> PairedScores:
        """Return scores of all images so far, the states of all processes added.

        Use `paired_scores(metric.to_arrays())` for sums that already hold all processes: this would add them again.
        """
        return paired_scores(self.to_arrays())


def image_groups(unit: int, rows: Iterable[int]) -> list[int]:
    """Return the group of each of a unit's rows, 0 to 63: by a hash that no other choice of rows is made with.

    It follows from the unit and the row alone, not from the plan of passes, batches, processes or the order in which
    units are merged: the same image is in the same group in every run on the same data.
    """
    return [hashlib.sha256(f"group:{unit}:{row}".encode()).digest()[0] % GROUPS for row in rows]


def restrict_classes(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels in the numbering of the valid classes only.

    Args:
        logits: `[..., classes]`.
        labels: `[images]`.
        valid: Sorted classes `[valid classes]`.

    Raises:
        RunError: A label is none of the valid classes.
    """
    places = torch.searchsorted(valid, labels).clamp(max=len(valid) - 1)  # [images]
    if not torch.equal(valid[places], labels):
        stranger = int(labels[valid[places] != labels][0])
        raise RunError(f"label {stranger} is none of the {len(valid)} classes that the data set should have")
    return logits[..., valid], places


def state_layout(masks: int, classes: int, per_class: bool) -> Layout:
    """Return shape and dtype of each state of `PairedAccuracy`."""
    row_counts = ("top1", "top5", "right_to_wrong", "wrong_to_right", "agreement", "nonfinite")
    row_sums = ("nll", "nll_difference_square", "nll_difference_cube", "nll_difference_fourth", "kl")
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"images": ((), torch.int64)}
    layout |= dict.fromkeys(row_counts, ((1 + masks,), torch.int64))
    layout |= dict.fromkeys(row_sums, ((1 + masks,), torch.float64))
    layout["group_images"] = ((GROUPS,), torch.int64)
    layout["group_top1"] = ((1 + masks, GROUPS), torch.int64)
    layout["group_nll"] = ((1 + masks, GROUPS), torch.float64)
    if per_class:
        layout["class_images"] = ((classes,), torch.int64)
        layout["class_top1"] = ((1 + masks, classes), torch.int64)
    return layout


def paired_sums(logits: Tensor, labels: Tensor, groups: Tensor, per_class: bool = False) -> dict[str, Tensor]:
    """Return the sums over the images of a batch, by state.

    Predictions are `torch.topk` of the logits as they are, as in timm's `accuracy`; the top five of fewer than five
    classes are all of them. An image with a NaN or infinite logit has no prediction: it is wrong and agrees with
    nothing.

    Args:
        logits: `[1 + masks, images, classes]`, the baseline first.
        labels: int64 `[images]`.
        groups: int64 `[images]`, the group of each image.
        per_class: Also count images and top-1 per label.
    """
    finite = logits.isfinite().all(dim=-1)  # [rows, images]
    predictions = top_five(logits)  # [rows, images, 5]
    hits = (predictions == labels[:, None]) & finite[..., None]
    right = hits[..., 0]  # [rows, images]
    agree = (predictions[..., 0] == predictions[0, :, 0]) & finite & finite[0]
    sums = {
        "images": labels.new_full((), len(labels)),
        "top1": right.sum(dim=1),
        "top5": hits.sum(dim=(1, 2)),
        "right_to_wrong": (right[0] & ~right).sum(dim=1),
        "wrong_to_right": (~right[0] & right).sum(dim=1),
        "agreement": agree.sum(dim=1),
        "nonfinite": (~finite).sum(dim=1),
    }
    if per_class:
        sums["class_images"] = labels.new_zeros(logits.shape[-1]).index_add(0, labels, torch.ones_like(labels))
        sums["class_top1"] = labels.new_zeros(len(logits), logits.shape[-1]).index_add(1, labels, right.long())
    members = F.one_hot(groups, GROUPS).double()  # [images, groups]
    sums["group_images"] = members.sum(dim=0).long()
    sums["group_top1"] = (right.double() @ members).long()
    return sums | _likelihood_sums(logits, labels, members)


def top_five(logits: Tensor) -> Tensor:
    """Return the classes of the five largest logits (or of all, if there are fewer) `[..., 5]`, the largest first.

    Ties have one order, which everything that is counted shares.
    """
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def _likelihood_sums(logits: Tensor, labels: Tensor, members: Tensor) -> dict[str, Tensor]:
    """Return float64 sums of the labels' NLL, of powers of its differences from the baseline, and of their KL.

    Args:
        logits: `[1 + masks, images, classes]`, the baseline first.
        labels: int64 `[images]`.
        members: float64 `[images, groups]`, 1 where an image belongs to a group, else 0.
    """
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float64)  # [rows, images, classes]
    nll = -log_probabilities.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]  # [rows, images]

    baseline = log_probabilities[0]
    kl = (baseline.exp() * (baseline - log_probabilities)).sum(dim=-1)  # [rows, images]
    difference = nll - nll[0]  # [rows, images]
    square = difference.square()
    return {
        "nll": nll.sum(dim=1),
        # A product: index_add would add up in any order on a GPU. It brings one image's NaN into all groups of its row.
        "group_nll": nll @ members,
        "nll_difference_square": square.sum(dim=1),
        "nll_difference_cube": (square * difference).sum(dim=1),
        "nll_difference_fourth": square.square().sum(dim=1),
        "kl": kl.sum(dim=1),
    }


def _check_batch(logits: Tensor, labels: Tensor, rows: int, classes: int) -> None:
    if logits.ndim != 3 or logits.shape[0] != rows or logits.shape[2] != classes:
        raise UsageError(f"logits must be [{rows}, images, {classes}], got {list(logits.shape)}")
    if labels.shape != logits.shape[1:2]:
        raise UsageError(f"labels must be [{logits.shape[1]}], one per image, got {list(labels.shape)}")
    if not logits.is_floating_point():
        raise UsageError(f"logits must be floating point, got {logits.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UsageError(f"labels must be integers, got {labels.dtype}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():  # the only point where the host waits for the device
        rule = f"labels must lie in 0 to {classes - 1}, the model's classes: translate them to its numbering first"
        raise UsageError(f"{rule}, got {labels[outside][0].item()}")
