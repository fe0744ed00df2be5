"""A statistic of heads as somebody else would add it: a metric, a description and a callback."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from headprobe.callbacks.describing import HeadCallback
from headprobe.describe.base import HeadStatistic, Observation, Role
from headprobe.metrics.sums import SumMetric
from headprobe.units.tree import Arrays, NamedSums


class MeanPerHead(SumMetric):
    """The mean over images of one number per head."""

    images: Tensor  #: int64 `[layers]`
    total: Tensor  #: float64 `[layers, most heads]`

    def __init__(self, heads_per_layer: Sequence[int]) -> None:
        self.heads_per_layer = tuple(heads_per_layer)
        layers = len(self.heads_per_layer)
        super().__init__(
            {"images": ((layers,), torch.int64), "total": ((layers, max(self.heads_per_layer)), torch.float64)}
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        return (type(self), self.heads_per_layer)

    def empty(self) -> Self:
        return type(self)(self.heads_per_layer)

    def update(self, layer: int, values: Tensor) -> None:
        """Add `[images, heads]` of a layer."""
        self.add({"images": torch.tensor(len(values))}, layer)
        self.add({"total": values.double().sum(dim=0)}, (layer, slice(values.shape[1])))

    def compute(self) -> Any:
        """Return `[heads of the model]`."""
        arrays = self.to_arrays()
        means = arrays["total"].astype(float) / arrays["images"].astype(float)[:, None]
        return np.concatenate([means[layer, :heads] for layer, heads in enumerate(self.heads_per_layer)])


class OutputSizeSums(HeadStatistic):
    """Mean absolute output of every head."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def options(self) -> dict[str, Any]:
        return {"name": "output_size", "power": self.power}

    def empty_sums(self) -> NamedSums:
        return {model: MeanPerHead(self.subject.layout.heads_per_layer) for model in self.subject.models}

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        # Each `[rows, heads]`.
        sizes = observation.each(lambda record: record.heads_out.abs().pow(self.power).mean(dim=(1, 3)))
        for model, of_model in zip(self.subject.models, sizes, strict=True):
            sums[model].update(observation.layer, of_model)

    def columns(self) -> dict[str, Arrays]:
        means = {model: self.whole[model].compute() for model in self.subject.models}
        if Role.MASKED in means:
            means[Role.CHANGE] = means[Role.MASKED] - means[Role.BASELINE]
        return {role: {"output_size": of_role} for role, of_role in means.items()}

    def csv_files(self) -> dict[str, Arrays]:
        return {"output_size.csv": {"layer": np.arange(2), "largest": np.array([0.5, np.nan])}}

    def summary(self) -> dict[str, ArrayLike]:
        return {"size": np.arange(len(self.subject.layout.layers)) + 0.25}

    def note(self) -> str:
        return "Output size: over all tokens"


class HeadOutputSize(HeadCallback):
    """How large every head's output is.

    Args:
        power: Of the absolute values.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__(OutputSizeSums(power))
