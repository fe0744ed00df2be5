"""A mask that a model is trained under: its heads are zero in every forward pass, and silent in its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.pruned.shrink import refuse_unprunable
from headprobe.errors import UsageError
from headprobe.masks.spec import MaskSpec


@dataclass(frozen=True)
class FixedMask:
    """Heads of one model that stay masked.

    Attributes:
        spec: The canonical mask spec.
        layout: The model's attention layers.
        keep: `[layers, max heads]` bool, True = keep.
    """

    spec: str
    layout: HeadLayout
    keep: Tensor

    @contextmanager
    def applied(self, backbone: nn.Module) -> Iterator[None]:
        """Set the heads to zero in every forward pass while the context is open; no gradient passes them then."""
        of_layer = masks_of_rows(self.keep[None])
        device: Any = next(backbone.parameters())

        def kept(layer: int) -> Tensor | None:
            found = of_layer(layer)
            return None if found is None else found.to(device.device)

        with ablating(backbone, self.layout, kept):
            yield

    def silence(self, backbone: nn.Module) -> None:
        """Set the columns of the output projections that belong to these heads to zero: the mask is in the weights."""
        with torch.no_grad():
            for number, layer in enumerate(self.layout.layers):
                gone = ~self.keep[number, : layer.heads].repeat_interleave(layer.head_dim)  # [channels]
                projection: Any = backbone.get_submodule(layer.projection)
                if bool(gone.any()):
                    projection.weight[:, gone.to(projection.weight.device)] = 0


def fixed_mask(backbone: nn.Module, input_size: tuple[int, int, int], spec: str) -> FixedMask:
    """Return the mask of a spec for a model.

    Args:
        backbone: The model.
        input_size: `(channels, height, width)` of an image.
        spec: A mask spec of one mask.

    Raises:
        UsageError: It is no spec of one mask that is known beforehand, or names heads that could not be removed.
    """
    checked = MaskSpec(spec)
    layout = find_heads(backbone, input_size, "the model")
    if checked.needs_scores:
        raise UsageError(f"model.mask_spec must name heads without scoring any, such as layer:3, got {spec}")
    masks = checked.expand(layout.heads_per_layer, layout.model)
    if len(masks) != 1 or not masks[0].mask.count:
        raise UsageError(f"model.mask_spec must be one mask of one head or more, got {spec}")
    for number in sorted({layer for layer, _ in masks[0].mask.masked}):
        refuse_unprunable(backbone, layout.layers[number].name)
    return FixedMask(checked.canonical, layout, masks[0].mask.keep())
