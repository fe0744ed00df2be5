"""Attention statistics of every head, as sums over images: how far it looks, how sharply, and at what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.metrics.sums import SumMetric, mean_and_error
from headprobe.metrics.token_grid import TokenGrid, tables_of

STATISTICS = (
    "attention_distance_px",
    "attention_distance_raw_px",
    "entropy_nats",
    "entropy_all_keys_nats",
    "mutual_information",
    "confidence",
    "class_mass",
    "register_mass",
    "self_mass",
    "sink_mass",
    "value_weighted_attention",
    "output_norm_ratio",
)
"""What is summed over images; defined in `reduce_attention` and `output_norm_ratio`."""

RATIOS = {"attention_distance_ratio": "attention_distance_px", "entropy_ratio": "entropy_nats"}
"""What follows by dividing by the value that uniform attention to all reachable patches would have."""

NOT_PATCHES = "its queries are learned, or a class token, and no patches of the image"
NOT_PLACED = "which patches its queries and keys are is unknown"


class HeadTable(NamedTuple):
    """One entry per head of the model, layer by layer; NaN where a statistic is not defined.

    (A named tuple because torchmetrics refuses frozen dataclasses from `compute`.)
    """

    layer: IntArray  #: number of the head's layer, `[heads of the model]`
    head: IntArray  #: number of the head in its layer
    images: IntArray  #: images of the layer
    mean: dict[str, FloatArray]  #: over images, by statistic: `STATISTICS`, then `RATIOS`
    error: dict[str, FloatArray]  #: standard error of the mean over images


class AttentionStatistics(SumMetric):
    """Per-head statistics of the attention weights, streamed over batches and layers.

    Args:
        grids: Where the tokens of each layer lie.
        heads_per_layer: Heads of each layer.
        undefined: For each layer, statistics that the model does not have there, with the reason. Reasons that follow
            from the grids are added.

    Raises:
        UsageError: There is not one grid per layer.
    """

    images: Tensor  #: int64 `[layers]`
    total: Tensor  #: float64 `[statistics, heads of the model]`, sums over images
    square: Tensor  #: float64 `[statistics, heads of the model]`, sums of squares

    def __init__(
        self,
        grids: Sequence[TokenGrid],
        heads_per_layer: Sequence[int],
        undefined: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self.grids, self.heads_per_layer = tuple(grids), tuple(heads_per_layer)
        if len(self.grids) != len(self.heads_per_layer):
            raise UsageError(f"each of {len(self.heads_per_layer)} layers needs a grid, got {len(self.grids)}")
        extra = undefined or [{}] * len(self.grids)
        self.reasons = tuple(_undefined(grid) | dict(more) for grid, more in zip(self.grids, extra, strict=True))

        shape = (len(STATISTICS), sum(self.heads_per_layer))
        super().__init__(
            {
                "images": ((len(self.grids),), torch.int64),
                "total": (shape, torch.float64),
                "square": (shape, torch.float64),
            }
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """The layers' grids and heads."""
        return (self.grids, self.heads_per_layer)

    def empty(self) -> Self:
        """Return the metric of the same model without images."""
        return type(self)(self.grids, self.heads_per_layer, self.reasons)

    def update(self, layer: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Add a batch of one layer.

        Args:
            layer: The layer's number.
            images: Images of the batch.
            values: By statistic `[images, heads]`; a statistic with a reason in `reasons` is left out.

        Raises:
            UsageError: A statistic is unknown, of another shape, or missing without a reason; nothing is added then.
        """
        self._check(layer, images, values)
        start = sum(self.heads_per_layer[:layer])
        heads = slice(start, start + self.heads_per_layer[layer])  # the layer's columns of the states

        # [statistics, images, heads], 0 where a statistic is not defined
        block = torch.zeros(len(STATISTICS), images, self.heads_per_layer[layer], dtype=torch.float64)
        block = block.to(self.total.device)
        for row, name in enumerate(STATISTICS):
            if name in values and name not in self.reasons[layer]:
                block[row] = values[name].to(block.device, torch.float64)
        self.add({"total": block.sum(dim=1), "square": block.square().sum(dim=1)}, (slice(None), heads))
        self.add({"images": torch.tensor(images)}, layer)

    def compute(self) -> HeadTable:
        """Return means and standard errors over all images so far, the states of all processes added."""
        return self.table(self.to_arrays())

    def table(self, arrays: Mapping[str, NDArray[np.generic]]) -> HeadTable:
        """Return means and standard errors from the sums of `to_arrays`, of this model."""
        layer = np.repeat(np.arange(len(self.grids)), self.heads_per_layer)  # of each head
        images = np.asarray(arrays["images"], dtype=np.int64)[layer]
        total, square = (np.asarray(arrays[name], dtype=np.float64) for name in ("total", "square"))
        means, errors = mean_and_error(total, square, images)  # [statistics, heads]
        mean, error = dict(zip(STATISTICS, means, strict=True)), dict(zip(STATISTICS, errors, strict=True))

        for name in (*STATISTICS, *RATIOS):
            unit = np.array([_uniform(grid, name) if name in RATIOS else 1.0 for grid in self.grids])[layer]
            defined = np.array([name not in reasons for reasons in self.reasons])[layer]
            for by_name in (mean, error):
                by_name[name] = np.where(defined, by_name[RATIOS.get(name, name)] / unit, np.nan)

        head = np.concatenate([np.arange(heads) for heads in self.heads_per_layer])
        return HeadTable(layer, head, images, mean, error)

    def _check(self, layer: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Refuse values that are not the statistics of this layer (see `update`)."""
        unknown = values.keys() - set(STATISTICS)
        if unknown:
            raise UsageError(f"statistics must be among {', '.join(STATISTICS)}, got {', '.join(sorted(unknown))}")
        shape = (images, self.heads_per_layer[layer])
        for name in STATISTICS:
            if name in self.reasons[layer]:
                continue
            if name not in values:
                raise UsageError(f"layer {layer} has no reason to be without {name!r}, got {', '.join(values)}")
            if values[name].shape != shape:
                raise UsageError(f"{name} of layer {layer} must be {list(shape)}, got {list(values[name].shape)}")


def _uniform(grid: TokenGrid, name: str) -> float:
    """Return what a ratio divides by: the value under uniform attention to all reachable patches; NaN for 0."""
    if grid.anonymous:
        return math.nan
    tables = tables_of(grid, torch.device("cpu"))
    value = tables.baseline_px if name == "attention_distance_ratio" else tables.log_keys
    return value or math.nan


def _undefined(grid: TokenGrid) -> dict[str, str]:
    """Return the statistics that a layer does not have by the kind of its tokens, with the reasons."""
    if grid.anonymous:
        defined = {"entropy_all_keys_nats", "sink_mass"} | ({"output_norm_ratio"} if grid.unplaced else set())
        named = [name for name in (*STATISTICS, *RATIOS) if name not in defined]
        return dict.fromkeys(named, NOT_PATCHES if grid.pooled else NOT_PLACED)

    reasons: dict[str, str] = {}
    distances = ("attention_distance_px", "attention_distance_raw_px", "attention_distance_ratio")
    if grid.grid is None:
        reasons |= dict.fromkeys(distances, "the patches' places on the image are unknown")
    if not grid.class_token:
        reasons["class_mass"] = "the layer has no class token"
    if not grid.registers:
        reasons["register_mass"] = "the layer has no registers or other prefix tokens beside a class token"
    if not tables_of(grid, torch.device("cpu")).log_keys:
        alone = ("mutual_information", "attention_distance_ratio", "entropy_ratio")
        reasons |= dict.fromkeys(alone, "every patch can attend to itself only")
    return reasons
