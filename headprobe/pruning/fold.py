"""What an ablation fills masked slots with, folded into the output projection behind the slots that are left."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headprobe.backbone.masking.replacement import Constant, Linear, Replacement, Zero
from headprobe.errors import UsageError
from headprobe.masks.ablations import LINEAR, MEAN, OPTIMAL, POSITION, RESAMPLE, ZERO

FOLDED = (ZERO, MEAN, OPTIMAL, LINEAR)
"""Kinds of ablation that fold into weights."""


class Folded(NamedTuple):
    """A projection of fewer heads with the same output.

    Attributes:
        weight: `[out, channels of kept heads]`, float64.
        bias: What is added to its bias `[out]`, float64; None where nothing is.
    """

    weight: Tensor
    bias: Tensor | None


def folded(projection: nn.Linear, number: int, kept: Tensor, fill: Replacement) -> Folded:
    """Fold what fills a layer's masked slots into its output projection.

    With S the masked and K the kept channels: a constant c gives `W[:, K]` and `bias += W[:, S] c`, the affine
    prediction `B z_K + c` gives `W[:, K] + W[:, S] B` and the same bias.

    Args:
        projection: The layer's output projection, whose inputs are the heads' channels one after the other.
        number: The layer's number.
        kept: `[heads]` bool, True = keep.
        fill: What fills the masked slots.

    Raises:
        UsageError: It depends on the token or the image, so no weights can hold it.
    """
    weight = projection.weight.detach().double()  # [out, channels]
    channels = kept.repeat_interleave(weight.shape[1] // len(kept)).to(weight.device)  # [channels]
    left, gone = weight[:, channels], weight[:, ~channels]
    if isinstance(fill, Zero) or not gone.shape[1]:
        return Folded(left, None)
    if isinstance(fill, Constant):
        constants = fill.constants[number].to(weight).flatten()  # [channels]
        return Folded(left, gone @ constants[~channels])
    if isinstance(fill, Linear):
        found = fill.maps[number]
        if found is None:
            raise UsageError(f"the ablation linear was fitted for another mask: it has nothing for layer {number}")
        return Folded(left + gone @ found.matrix.to(weight), gone @ found.offset.to(weight))
    raise UsageError(why_not_folded(fill.name))


def why_not_folded(kind: str) -> str:
    """Return why a kind of ablation gives no smaller model, as the text of an error."""
    reasons = {
        POSITION: "its constants differ from token to token",
        RESAMPLE: "it takes heads of another image",
    }
    reason = reasons.get(kind, "it is not known to be a constant or linear in the kept heads")
    return f"the ablation {kind} cannot be folded into weights: {reason}; choose {', '.join(FOLDED)}, got {kind}"


def write_projection(projection: nn.Linear, new: Folded) -> None:
    """Give a projection the folded weights, in its own type; it has a bias where something is added to it."""
    with torch.no_grad():
        projection.weight.copy_(new.weight)
        if new.bias is not None:
            projection.bias.copy_(projection.bias.double() + new.bias)
