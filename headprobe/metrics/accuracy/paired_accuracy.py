"""Paired accuracy: what each mask does to the very images that the baseline is scored on, as sums over images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores

__all__ = ["PairedAccuracy", "PairedScores", "paired_scores", "paired_sums"]


class PairedAccuracy(Metric):
    """Paired counts and sums of a baseline and its masks, streamed over batches.

    Every state is a sum over images, so any split over batches, workers and processes gives the same integers, and
    the same order of additions the same floats to the last bit. The states keep int64 and float64 whatever precision
    the module around them is cast to.

    Args:
        masks: masks beside the baseline.
        classes: classes of the model's logits.
        per_class: also count images and top-1 per label.

    Raises:
        UsageError: ``masks`` below 0 or ``classes`` below 1.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    images: Tensor  #: int64 ``[]``
    top1: Tensor  #: int64 ``[1 + masks]``, as all below
    top5: Tensor
    right_to_wrong: Tensor
    wrong_to_right: Tensor
    agreement: Tensor
    nonfinite: Tensor
    nll: Tensor  #: float64, nats
    nll_difference_square: Tensor  #: float64, squares of masked minus baseline NLL, nats^2
    kl: Tensor  #: float64, KL(baseline || masked), nats
    class_images: Tensor  #: int64 ``[classes]``, only if ``per_class``
    class_top1: Tensor  #: int64 ``[1 + masks, classes]``, only if ``per_class``

    def __init__(self, masks: int, classes: int, per_class: bool = False) -> None:
        super().__init__(compute_with_cache=False)  # `merge` changes states behind the cache's back
        if masks < 0:
            raise UsageError(f"masks must be 0 or more, got {masks}")
        if classes < 1:
            raise UsageError(f"classes must be 1 or more, got {classes}")
        self.masks, self.classes, self.per_class = masks, classes, per_class
        for name, (shape, dtype) in state_layout(masks, classes, per_class).items():
            self.add_state(name, default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Always true: sums over no image are right as they are, so torchmetrics need not warn of them."""
        return True

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits ``[1 + masks, images, classes]``, the baseline first, and labels ``[images]``.

        Raises:
            UsageError: wrong shapes or dtypes, or a label outside the classes; nothing has been added then.
        """
        _check_batch(logits, labels, 1 + self.masks, self.classes)
        self._add(paired_sums(logits, labels.long(), self.per_class))

    def compute(self) -> PairedScores:
        """Scores of all images so far, the states of all processes added.

        Sums that are already those of all processes would be added again: score them by
        ``paired_scores(metric.to_arrays())``, which adds nothing.
        """
        return paired_scores(self.to_arrays())

    def merge(self, other: "PairedAccuracy") -> None:
        """Add the sums of other images.

        Raises:
            ValueError: the other metric has other masks, classes or per-class counts.
        """
        mine, theirs = ((m.masks, m.classes, m.per_class) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"only equal (masks, classes, per_class) can be merged: {mine} here, got {theirs}")
        self._add({name: getattr(other, name).to(self.images.device) for name in self._layout()})

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Copies of all states by name, and ``classes`` (int64 ``[]``): all that `from_arrays` needs."""
        arrays = {name: getattr(self, name).cpu().numpy().copy() for name in self._layout()}
        return {"classes": np.asarray(self.classes, dtype=np.int64), **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The metric, on the CPU, that `to_arrays` was called on.

        Raises:
            ValueError: an array is missing or unknown, or has another dtype or shape than its state.
        """
        per_class = "class_images" in arrays
        names = {"classes", *state_layout(0, 1, per_class)}
        if arrays.keys() != names:
            raise ValueError(f"the arrays must be {', '.join(sorted(names))}, got {', '.join(sorted(arrays))}")
        metric = cls(arrays["top1"].size - 1, int(arrays["classes"].flat[0]), per_class)
        for name, empty in metric.to_arrays().items():
            array = arrays[name]
            if (array.shape, array.dtype) != (empty.shape, empty.dtype):
                wanted, found = (f"{a.dtype} {list(a.shape)}" for a in (empty, array))
                raise ValueError(f"array {name!r} must be {wanted}, got {found}")
        metric._add({name: torch.from_numpy(arrays[name].copy()) for name in metric._layout()})
        return metric

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return state_layout(self.masks, self.classes, self.per_class)

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():  # out of place: a state made in inference mode cannot be changed outside it
            setattr(self, name, getattr(self, name) + value)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Follow the module to its device but not to its dtype.

        torchmetrics guards `half` and the like, yet ``module.to(torch.bfloat16)``, as Lightning's bf16-true calls it,
        would round the sums.
        """
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
        return self


def state_layout(masks: int, classes: int, per_class: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each state."""
    row_counts = ("top1", "top5", "right_to_wrong", "wrong_to_right", "agreement", "nonfinite")
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"images": ((), torch.int64)}
    layout |= dict.fromkeys(row_counts, ((1 + masks,), torch.int64))
    layout |= dict.fromkeys(("nll", "nll_difference_square", "kl"), ((1 + masks,), torch.float64))
    if per_class:
        layout |= {"class_images": ((classes,), torch.int64), "class_top1": ((1 + masks, classes), torch.int64)}
    return layout


def paired_sums(logits: Tensor, labels: Tensor, per_class: bool = False) -> dict[str, Tensor]:
    """Sums over the images of a batch: logits ``[1 + masks, images, classes]``, labels int64 ``[images]``.

    Predictions are `torch.topk` of the logits as they come, as in timm's ``accuracy`` (top-5 of fewer than five classes
    is all of them). An image with a NaN or infinite logit has no prediction: it is wrong and agrees with nothing.
    """
    finite = logits.isfinite().all(dim=-1)
    predictions = top_five(logits)
    hits = (predictions == labels[:, None]) & finite[..., None]
    right = hits[..., 0]
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
    return sums | _likelihood_sums(logits, labels)


def top_five(logits: Tensor) -> Tensor:
    """Classes of the five largest logits (of all, if they are fewer), the largest first; one order for all ties."""
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def _likelihood_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Float64 sums of the labels' NLL, its squared differences from the baseline, and KL(baseline || masked)."""
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float64)
    nll = -log_probabilities.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
    baseline = log_probabilities[0]
    kl = (baseline.exp() * (baseline - log_probabilities)).sum(dim=-1)
    return {
        "nll": nll.sum(dim=1),
        "nll_difference_square": (nll - nll[0]).square().sum(dim=1),
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
    if outside.any():  # the only time the host waits for the device
        rule = f"labels must lie in 0 to {classes - 1}, the model's classes: translate them to its numbering first"
        raise UsageError(f"{rule}, got {labels[outside][0].item()}")
