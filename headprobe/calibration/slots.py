"""The sums over the slots of every layer that a calibration keeps, and the constants that follow from them."""

from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.calibration.constants import LayerConstants
from headprobe.describe.base import HeadStatistic, Observation
from headprobe.describe.head_outputs import head_outputs
from headprobe.masks.ablations import LINEAR, POSITION
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments
from headprobe.metrics.sums import SumMetric
from headprobe.units.tree import NamedSums

MOMENTS, MEANS, POSITIONS = "moments", "means", "positions"

Shape = tuple[int, int, int]
"""`(positions, heads, head_dim)` of a layer; without positions the first is 1."""


class SlotSums(SumMetric):
    """Sums over images of each layer's slots, by token position or over all tokens.

    Args:
        shapes: By layer `(positions, heads, head_dim)`; one position sums over all tokens.
    """

    MERGEABLE = "sums of equal layers"

    counts: Tensor  #: int64 `[layers]`, images, or tokens of all images where there is one position
    sums: Tensor  #: float64 `[sum of positions * heads * head_dim]`, layer after layer
    resolution: Tensor  #: float64 `[]`, the coarsest eps among the slots' number formats

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = tuple(shapes)
        self._starts = np.cumsum([0, *(int(np.prod(shape)) for shape in self.shapes)]).tolist()
        super().__init__(
            {
                "counts": ((len(self.shapes),), torch.int64),
                "sums": ((self._starts[-1],), torch.float64),
                "resolution": ((), torch.float64),
            },
            synced=False,
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """The shapes."""
        return self.shapes

    @property
    def option_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The shapes, int64 `[layers, 3]`."""
        return {"shapes": np.asarray(self.shapes, dtype=np.int64).reshape(-1, 3)}

    def empty(self) -> Self:
        """Return the metric of the same layers without images."""
        return type(self)(self.shapes)

    def merge(self, other: Self) -> None:
        """Add the sums of other images; the resolution is the coarser one.

        Raises:
            ValueError: The other metric has other layers.
        """
        coarser = torch.maximum(self.resolution, other.resolution.to(self.resolution.device))
        super().merge(other)
        self.resolution = coarser

    def update(self, layer: int, slots: Tensor) -> None:
        """Add one layer of some images.

        Args:
            layer: Its number.
            slots: `[images, tokens, heads, head_dim]`, the tokens in the order of positions.
        """
        positions, *_ = self.shapes[layer]
        images, tokens = slots.shape[:2]
        # float64 from the first addition on: the sums must not depend on the batch
        summed = slots.sum(dim=0, dtype=torch.float64) if positions > 1 else slots.sum(dim=(0, 1), dtype=torch.float64)
        place = slice(self._starts[layer], self._starts[layer + 1])
        self.add({"sums": summed.flatten()}, place)
        self.add({"counts": torch.tensor(images if positions > 1 else images * tokens)}, layer)
        self.resolution = self.resolution.clamp(min=torch.finfo(slots.dtype).eps)

    def compute(self) -> list[NDArray[np.float64]]:
        """Return every layer's mean `[positions, heads, head_dim]`."""
        return [self.mean(layer) for layer in range(len(self.shapes))]

    def mean(self, layer: int) -> NDArray[np.float64]:
        """Return the mean `[positions, heads, head_dim]`; NaN without images."""
        flat = self.sums[self._starts[layer] : self._starts[layer + 1]].cpu().numpy().reshape(self.shapes[layer])
        count = int(self.counts[layer])
        return np.asarray(flat / (count or np.nan), dtype=np.float64)


class SlotStatistic(HeadStatistic):
    """What the ablations of a run need to know of every layer's slots in the unmasked model.

    Args:
        kinds: Kinds of ablation that are fitted.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.kinds = sorted(kinds)

    def options(self) -> dict[str, Any]:
        """Return the name, and which sums are kept: kinds that need the same sums share a calibration."""
        return {"name": "slots", "covariance": LINEAR in self.kinds, "positions": POSITION in self.kinds}

    def empty_sums(self) -> NamedSums:
        """Make empty sums: moments where something needs covariances, else means; and means by position."""
        layout = self.subject.layout
        layers = [LayerHeads(layer.heads, layer.head_dim) for layer in layout.layers]
        found: NamedSums = {}
        if LINEAR in self.kinds:
            found[MOMENTS] = Moments(layers, MomentOptions(noise_floor=False))
        else:
            found[MEANS] = SlotSums([(1, layer.heads, layer.head_dim) for layer in layout.layers])
        if POSITION in self.kinds:
            found[POSITIONS] = SlotSums(position_shapes(layout))
        return found

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Add the slots of one layer; padding of windows counts only among positions."""
        record, layer = observation.records[0], observation.layer
        outputs = head_outputs(record, self.subject.facts[layer])  # [images, tokens, heads, head_dim]
        if MOMENTS in sums:
            sums[MOMENTS].update(layer, outputs)
        else:
            sums[MEANS].update(layer, outputs)
        if POSITIONS in sums:
            sums[POSITIONS].update(layer, by_position(record))

    def close(self, unit: int, sums: NamedSums) -> NamedSums:
        """End a unit and return its sums on the CPU."""
        if MOMENTS in sums:
            sums[MOMENTS].close()
        return super().close(unit, sums)

    def constants(self) -> list[LayerConstants]:
        """Return every layer's constants, once the sums over all units are there."""
        whole, layout = self.whole, self.subject.layout
        found = []
        for number, layer in enumerate(layout.layers):
            position = whole[POSITIONS].mean(number) if POSITIONS in whole else None
            if MOMENTS not in whole:
                means: SlotSums = whole[MEANS]
                samples, mean = int(means.counts[number]), means.mean(number)[0]
                found.append(LayerConstants(samples, mean, None, float(means.resolution), position))
                continue
            own = whole[MOMENTS].of_block(number)  # one layer at a time: covariances of all are large
            samples = int(own.own.samples)
            mean = own.mean.reshape(layer.heads, layer.head_dim)
            covariance = own.own.products / max(samples, 1)
            found.append(LayerConstants(samples, mean, covariance, own.resolution, position))
        return found


def position_shapes(layout: HeadLayout) -> list[Shape]:
    """Return `(positions, heads, head_dim)` of every layer: rows of an image at the point times tokens of a row."""
    return [(layer.rows * layer.tokens, layer.heads, layer.head_dim) for layer in layout.layers]


def by_position(record: LayerRecord) -> Tensor:
    """Return the slots `[images, positions, heads, head_dim]`, windows one after the other, padding included."""
    # [images * windows, tokens, heads, head_dim]
    return torch.unflatten(record.heads_out, 0, (-1, record.windows)).flatten(1, 2)
