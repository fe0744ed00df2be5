"""Nearest neighbours: calibration images vote for their class, the more the nearer they are.

A class's votes are the sum of exp(cosine / temperature) over its images among the k nearest, and its logit is their
logarithm. So that a class without any has a finite logit, every class has exp(-1 / temperature) votes from the start:
as much as one neighbour in the opposite direction would give.

Source: Caron et al., 2021, appendix F.1 (20 neighbours, temperature 0.07), https://arxiv.org/abs/2104.14294, after
Wu et al., 2018, https://arxiv.org/abs/1805.01978.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.classifiers.base import OnDevices, equal_rows, unit_rows, wide
from headprobe.classifiers.choice import KNN
from headprobe.classifiers.fitted import Fitted, Images
from headprobe.metrics.arrays import IntArray
from headprobe.text import Decision, counted

CHUNK_BYTES = 2**26
"""Of the cosines of some features to the whole bank, and of their neighbours' features, that are there at a time."""

NEAR_IN_FLOAT32 = 1e-6


class NearestNeighbours(Fitted):
    """A bank of features that vote.

    Args:
        bank: Of unit length, `[images, features]`.
        labels: Class of each, `[images]`.
        images: What it was fitted on.
        k: How many vote, all where there are fewer.
        temperature: By which cosines are divided.
        class_names: Names of the classes.
    """

    kind: ClassVar[str] = KNN
    what_it_is_not: ClassVar[str] = "a vote of neighbours is not a trained classifier"

    def __init__(
        self,
        bank: NDArray[np.float32],
        labels: IntArray,
        images: Images,
        k: int,
        temperature: float,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__((len(images.per_class), bank.shape[1]), images, temperature, class_names)
        self.bank, self.labels, self.k = bank, labels, min(k, len(bank))
        self.asked_k = k
        self._bank, self._labels = OnDevices(bank), OnDevices(labels)

    @property
    def options(self) -> dict[str, Any]:
        """Neighbours and temperature."""
        return {"k": self.k, **super().options}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the bank and its classes."""
        return {"bank": self.bank, "labels": self.labels}

    def logits(self, features: Tensor) -> Tensor:
        """Return the logarithm of each class's votes, `[..., classes]`."""
        flat = unit_rows(wide(features)).flatten(end_dim=-2)  # [rows, features]
        rows = max(1, CHUNK_BYTES // max(4 * len(self.bank), 8 * self.k * self.features))
        found = [self._logits(some) for some in torch.split(flat, rows)] or [flat.new_empty(0, self.classes)]
        return torch.unflatten(torch.cat(found), 0, features.shape[:-1])

    def _logits(self, features: Tensor) -> Tensor:
        """Return the logits `[rows, classes]` of features of unit length `[rows, features]`."""
        bank, labels = self._bank.on(features.device), self._labels.on(features.device)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            # sorted, so that votes are added up in one order
            nearest = (features.float() @ bank.T).topk(self.k, dim=-1).indices  # [rows, k]
        cosines = torch.einsum("rf,rkf->rk", features, bank[nearest].double())
        classes = labels[nearest]  # [rows, k]
        # exp of at most 0; 1 / temperature comes back at the end
        votes = ((cosines - 1) / self.temperature).exp()
        same = classes[:, :, None] == classes[:, None, :]  # [rows, k, k]
        of_class = (same * votes[:, None, :]).sum(dim=-1)  # [rows, k], all votes for the neighbour's class
        first = ~(same & torch.ones_like(same).tril(-1)).any(dim=-1)  # [rows, k], of its class
        least = votes.new_full((len(features), self.classes), -2 / self.temperature).exp()
        # each class is added to once: on a GPU several additions to one place come in any order
        return least.scatter_add(-1, classes, of_class * first).log() + 1 / self.temperature

    def decisions(self) -> list[Decision]:
        """Return what it is, where fewer vote than were asked for, and images that stand under two classes."""
        found = super().decisions()
        if self.k < self.asked_k:
            text = f"{self.k:,} vote where {self.asked_k:,} were asked for: the bank has no more"
            found.append(Decision("neighbours", text, shown=True))
        if self._under_two_classes:
            images = counted(self._under_two_classes, "image")
            text = f"{images} of the bank equal one of another class, between which they vote"
            found.append(Decision("duplicate classes", text, shown=True))
        return found

    @cached_property  # seconds, for a large bank
    def _under_two_classes(self) -> int:
        """How many images of the bank equal one of another class."""
        pairs = equal_rows(self.bank, NEAR_IN_FLOAT32)
        return sum(int(self.labels[one] != self.labels[other]) for one, other in pairs)
