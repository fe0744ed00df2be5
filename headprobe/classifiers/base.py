"""What every classifier of features gives: logits that gradients pass through, and what a run says of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.text import Decision

Arrays = Mapping[str, NDArray[np.generic]]


class FeatureClassifier(ABC):
    """Classifies images by the model's pooled feature.

    Attributes:
        classes: How many classes it chooses among.
        features: Width of the features that it takes.
        class_names: Names of its classes, "" for one without; None where it names none.
    """

    classes: int
    features: int
    class_names: list[str] | None = None

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Return logits `[..., classes]` of features `[..., features]`, float64, on a device that has it.

        They are differentiable. A feature that is NaN, infinite or zero has NaN among its logits.
        """

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return what it is as JSON values, for `run.json`; its digest is one of them."""

    @abstractmethod
    def decisions(self) -> list[Decision]:
        """Return what a run says of it."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of all that its logits follow from."""


def wide(features: Tensor) -> Tensor:
    """Return features in float64; on the CPU beside Apple's GPUs, which have none."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def unit_rows(features: Tensor) -> Tensor:
    """Return features `[..., features]` at unit length; NaN where one has no direction."""
    lengths: Tensor = features.norm(dim=-1, keepdim=True)
    return features / lengths


class OnDevices:
    """Keeps constants where they are used, a copy for each device; gradients pass through them.

    Args:
        constants: Of any shape.
    """

    def __init__(self, constants: Tensor | NDArray[Any]) -> None:
        with torch.inference_mode(False):  # one may be open, whose tensors no gradient can pass
            self._constants = torch.as_tensor(constants)
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the constants on a device."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self._constants.to(device)
        return self._copies[device]


NEAR = 1e-12
"""Vectors of unit length whose distance is below this are equal but for the rounding of their sums."""

CHUNK, STEPS = 2**16, 3
"""Rows that are taken to float64 at a time, and how many of the next ones on a line each row is compared with."""


def equal_rows(vectors: NDArray[np.floating[Any]], near: float = NEAR) -> list[tuple[int, int]]:
    """Return pairs of rows that are equal but for rounding; of many equal ones some pairs.

    Args:
        vectors: `[rows, features]`, of unit length.
        near: Largest distance of equal rows.
    """
    direction = np.random.default_rng(0).standard_normal(vectors.shape[1])
    direction /= np.sqrt(np.square(direction).sum())
    chunks = [vectors[first : first + CHUNK] @ direction for first in range(0, len(vectors), CHUNK)]
    places = np.concatenate([np.empty(0), *chunks])  # [rows]: equal rows lie together on this line
    order = np.argsort(places, kind="stable")
    found = set()
    for step in range(1, 1 + STEPS):
        ones, others = order[:-step], order[step:]
        for number in np.flatnonzero(places[others] - places[ones] <= near):
            one, other = sorted((int(ones[number]), int(others[number])))
            if np.square(vectors[one].astype(np.float64) - vectors[other]).sum() <= near**2:
                found.add((one, other))
    return sorted(found)


def named(classes: Sequence[int], names: Sequence[str] | None, most: int = 5) -> str:
    """Return the names of some classes, their numbers where they have none: `cat, dog and 3 others`."""
    texts = [names[number] if names and names[number] else f"class {number}" for number in classes[:most]]
    left = len(classes) - len(texts)
    return ", ".join(texts) + (f" and {left:,} other{'s' * (left > 1)}" if left else "")
