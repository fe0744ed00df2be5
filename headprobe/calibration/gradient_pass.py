"""One forward and backward pass of some images through the unmasked model: what each head's output is worth.

xi multiplies all of a head's slot, padding of windows too, as an ablation fills all of it. With z the slot,
dL/dxi = sum over tokens and channels of z * dL/dz, so one backward pass to all slots gives every head's.

Source: Michel, Levy & Neubig, 2019, eq. 2, https://arxiv.org/abs/1905.10650.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.readout import Readout, seen_by_norm
from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.calibration.trial_pass import LossOf, cut_off
from headprobe.metrics.projection import HeadProjection

SCORES_FOLLOW = "the scores of heads follow"

Slots = dict[int, Tensor]
"""By layer what entered its point, in the graph of the pass."""


@dataclass(frozen=True)
class ImageGradients:
    """What one pass says about the heads of one layer; only images with a label count.

    Attributes:
        layer: The layer's number.
        of_heads: dL/dxi `[images, heads]`, float64.
        of_slots: dL/dz summed over images and tokens `[heads, head_dim]`, float64.
        direct: What a head adds to the logit of its image's label `[images, heads]`; None where that is not known.
    """

    layer: int
    of_heads: Tensor
    of_slots: Tensor
    direct: Tensor | None


@dataclass(frozen=True)
class Scoring:
    """What a pass needs to know of the model.

    Attributes:
        readout: How logits are read from the stream; None where that is not known.
        projections: By layer the output projection by head, None without a linear one.
    """

    readout: Readout | None
    projections: Sequence[HeadProjection | None]


def gradient_pass(
    growing: GrowingPass,
    plan: RowPlan,
    images: Tensor,
    labels: Tensor,
    taps: Sequence[Tap],
    loss_of: LossOf,
    scoring: Scoring,
) -> tuple[Tensor, list[ImageGradients]]:
    """Return the outputs `[1, images, classes + features]` of the unmasked model, and each layer's gradients.

    Args:
        growing: Runs no variant; it is entered.
        plan: Of its passes.
        images: `[images, channels, height, width]`, normalised.
        labels: `[images]`, negative for images without a label.
        taps: Observe the pass.
        loss_of: The loss of each image from outputs and labels.
        scoring: What the pass needs to know of the model.

    Raises:
        UsageError: The model's forward pass cuts the gradient off.
    """
    labelled = labels >= 0  # [images]
    with _slots_in_graph(growing.backbone, growing.layout) as slots:
        with seen_by_norm(growing.backbone, scoring.readout) as seen:
            outputs = growing.logits(images, plan, taps)
        if not bool(labelled.any()) or not slots:  # heads that are masked in the operator have no slot of their own
            return outputs.detach(), []
        loss = loss_of(outputs[:, labelled], labels[labelled]).sum()
        if not loss.requires_grad:
            raise cut_off(growing.layout.model, "a loss without a history", SCORES_FOLLOW)
        gradients = torch.autograd.grad(loss, list(slots.values()), allow_unused=True)
    with torch.no_grad():
        found = [
            _of_layer(growing.layout, layer, slot, gradient, labels, seen, scoring)
            for (layer, slot), gradient in zip(slots.items(), gradients, strict=True)
        ]
    return outputs.detach(), found


def _of_layer(
    layout: HeadLayout,
    number: int,
    slot: Tensor,
    gradient: Tensor | None,
    labels: Tensor,
    seen: Sequence[Tensor],
    scoring: Scoring,
) -> ImageGradients:
    layer, labelled = layout.layers[number], labels >= 0
    if gradient is None:
        raise cut_off(layout.model, f"none at layer {layer.name!r}", SCORES_FOLLOW)
    # [rows, tokens, heads, head_dim]: rows of an image are neighbours
    heads_out, towards = layer.channels.split(slot.detach()), layer.channels.split(gradient)
    products = (heads_out * towards).sum(dim=-1, dtype=torch.float64).sum(dim=1)  # [rows, heads]
    of_heads = torch.unflatten(products, 0, (-1, layer.rows)).sum(dim=1)  # [images, heads]
    of_slots = towards.sum(dim=(0, 1), dtype=torch.float64)  # [heads, head_dim]; zero for images without a label
    direct, projection = None, scoring.projections[number]
    if scoring.readout is not None and projection is not None and layer.rows == 1:
        weights = scoring.readout.token_weights(seen[0], heads_out.shape[1])  # [images, tokens]
        direct = scoring.readout.direct(heads_out, weights, labels.clamp_min(0), projection)[labelled]
    return ImageGradients(number, of_heads[labelled], of_slots, direct)


@contextmanager
def _slots_in_graph(backbone: nn.Module, layout: HeadLayout) -> Iterator[Slots]:
    """Keep every layer's slots as they enter its point, in the graph, while the context is open.

    The graph begins there: what comes before the first layer needs no gradient. Where heads are masked meanwhile, it is
    before their slots are filled.
    """
    slots: Slots = {}
    handles = []

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            slots[number] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            # a copy, as no leaf may be changed in place
            return (slots[number].clone() if slots[number].is_leaf else slots[number], *args[1:])

        return hook

    for number, layer in enumerate(layout.layers):
        if not layer.masked_at_operator:
            handles.append(backbone.get_submodule(layer.point).register_forward_pre_hook(keep(number), prepend=True))
    try:
        yield slots
    finally:
        for handle in handles:
            handle.remove()
