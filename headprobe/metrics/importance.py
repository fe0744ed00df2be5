"""Sums over images from which the gradient scores of heads follow, and direct logits."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.sums import SumMetric


class ScoreSums(SumMetric):
    """Sums over labelled images of what gradients say about every head.

    Args:
        layers: By layer `(heads, head_dim)`.
    """

    MERGEABLE = "scores of equal layers"

    images: Tensor  #: int64 `[]`, images with a label
    gradient: Tensor  #: float64 `[heads of the model]`, sums of dL/dxi
    gradient_abs: Tensor  #: float64 `[heads of the model]`, of its absolute value, image by image
    gradient_square: Tensor  #: float64 `[heads of the model]`, of its square, image by image
    slot_gradient: Tensor  #: float64 `[channels of the model]`, of dL/dz, over tokens too
    direct_logit: Tensor  #: float64 `[heads of the model]`

    def __init__(self, layers: Sequence[tuple[int, int]]) -> None:
        self.layers = tuple(layers)
        self._heads = np.cumsum([0, *(heads for heads, _ in self.layers)]).tolist()
        self._channels = np.cumsum([0, *(heads * dim for heads, dim in self.layers)]).tolist()
        of_heads = ((self._heads[-1],), torch.float64)
        super().__init__(
            {
                "images": ((), torch.int64),
                "gradient": of_heads,
                "gradient_abs": of_heads,
                "gradient_square": of_heads,
                "slot_gradient": ((self._channels[-1],), torch.float64),
                "direct_logit": of_heads,
            },
            synced=False,
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """Heads and channels of the layers."""
        return self.layers

    @property
    def option_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Heads and channels of the layers, int64 `[layers, 2]`."""
        return {"layers": np.asarray(self.layers, dtype=np.int64).reshape(-1, 2)}

    def empty(self) -> Self:
        """Return the metric of the same layers without images."""
        return type(self)(self.layers)

    def update(self, images: int) -> None:
        """Count labelled images, once for all layers."""
        self.add({"images": torch.tensor(images)})

    def add_gradients(self, layer: int, of_heads: Tensor, of_slots: Tensor) -> None:
        """Add one layer's gradients.

        Args:
            layer: Its number.
            of_heads: dL/dxi of each image `[images, heads]`.
            of_slots: dL/dz summed over images and tokens `[heads, head_dim]`.
        """
        of_heads = of_heads.double()
        found = {"gradient": of_heads, "gradient_abs": of_heads.abs(), "gradient_square": of_heads.square()}
        self.add({name: values.sum(dim=0) for name, values in found.items()}, self._place(layer))
        channels = slice(self._channels[layer], self._channels[layer + 1])
        self.add({"slot_gradient": of_slots.double().flatten()}, channels)

    def add_direct(self, layer: int, of_heads: Tensor) -> None:
        """Add one layer's direct logits `[images, heads]`."""
        self.add({"direct_logit": of_heads.double().sum(dim=0)}, self._place(layer))

    def _place(self, layer: int) -> slice:
        return slice(self._heads[layer], self._heads[layer + 1])

    def compute(self) -> dict[str, FloatArray]:
        """Return means over labelled images: states by name, `[heads of the model]`; NaN without images."""
        count = int(self.images) or np.nan
        names = [name for name in self.layout if name not in ("images", "slot_gradient")]
        return {name: np.asarray(getattr(self, name).cpu().numpy() / count) for name in names}

    def mean_slot_gradient(self, layer: int) -> FloatArray:
        """Return the mean over labelled images of dL/dz summed over tokens, `[heads, head_dim]`."""
        flat = self.slot_gradient[self._channels[layer] : self._channels[layer + 1]].cpu().numpy()
        return np.asarray(flat.reshape(self.layers[layer]) / (int(self.images) or np.nan))
