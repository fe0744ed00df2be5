"""What the slots of masked heads are filled with.

`replace_heads` is called from exactly two places: the hook at a layer's point (`headprobe.backbone.masking.ablation`)
and the shared core of masks that join at a layer (`headprobe.backbone.growing.shortcuts`). A new kind of ablation is a
subclass of `Replacement`; windows, waves and shortcuts need no change for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprobe.backbone.heads.layout import HeadChannels, HeadLayout, by_row, filled
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import ZERO


@dataclass(frozen=True)
class LayerSlots:
    """What enters one layer's point in some rows of a batch, and which heads each of these rows keeps.

    Attributes:
        layer: Number of the layer.
        heads_out: `[rows, ..., channels]` or `[rows, channels, ...]`; rows are sample-major, windows of an image join.
        keep: `[groups, heads]` bool, True = keep; group g owns the g-th equal share of the rows.
        channels: Which channels belong to which head.
    """

    layer: int
    heads_out: Tensor
    keep: Tensor
    channels: HeadChannels

    @property
    def masked(self) -> Tensor:
        """True at the channels of masked heads; a shape that broadcasts over `heads_out`.

        Raises:
            RunError: The rows do not divide into the groups.
        """
        kept = self.channels.of_heads(by_row(self.keep, len(self.heads_out)))  # [rows, channels of heads]
        others = self.heads_out.shape[self.channels.axis] - self.channels.channels
        if others:  # channels of an mlp beside attention belong to no head
            kept = torch.cat([kept, kept.new_ones(len(kept), others)], dim=1)

        shape = [len(kept), *[1] * (self.heads_out.dim() - 1)]
        shape[self.channels.axis] = kept.shape[1]
        return ~kept.view(shape)

    def of_groups(self, groups: Sequence[int]) -> tuple["LayerSlots", Tensor]:
        """Return the slots of some groups, and the numbers of their rows."""
        chosen = torch.tensor(groups, device=self.heads_out.device)
        share = len(self.heads_out) // len(self.keep)
        rows = (chosen[:, None] * share + torch.arange(share, device=chosen.device)).flatten()
        return replace(self, heads_out=self.heads_out[rows], keep=self.keep[chosen]), rows


class Replacement(ABC):
    """One kind of ablation.

    Attributes:
        name: Its name in the column `ablation` of `masks.csv`.
    """

    name: str

    @abstractmethod
    def fill(self, slots: LayerSlots) -> Tensor:
        """Return `heads_out` with the slots of masked heads filled; no bit of a kept head may change."""


class Zero(Replacement):
    """Fills masked slots with 0.

    Source: Michel, Levy & Neubig, 2019, section 2, https://arxiv.org/abs/1905.10650 (xi_h in {0, 1}).
    """

    name = ZERO

    def fill(self, slots: LayerSlots) -> Tensor:
        """Set the channels of masked heads to 0."""
        return filled(slots.heads_out, slots.masked)


WITH_ZERO = Zero()
REPLACEMENTS: dict[str, Replacement] = {WITH_ZERO.name: WITH_ZERO}
"""Kinds of ablation by name."""


def replace_heads(slots: LayerSlots, replacements: Sequence[Replacement]) -> Tensor:
    """Return `heads_out` with the slots of masked heads filled.

    Args:
        slots: The layer's slots and masks.
        replacements: What fills each group's slots; a single one fills all groups'.

    Raises:
        RunError: The rows do not divide into the groups, or a replacement returns something of another shape or type.
    """
    # By identity: two equal replacements are two, and neither needs a hash.
    kinds = list({id(kind): kind for kind in replacements}.values())
    if len(kinds) == 1:
        return _filled_by(kinds[0], slots)
    if len(replacements) != len(slots.keep) or len(slots.heads_out) % len(slots.keep):
        raise RunError(f"{len(slots.keep)} groups of rows need a replacement each, got {len(replacements)}")

    out = slots.heads_out.clone()
    for kind in kinds:
        groups = [group for group, own in enumerate(replacements) if own is kind]
        part, rows = slots.of_groups(groups)
        out[rows] = _filled_by(kind, part)
    return out


def _filled_by(kind: Replacement, slots: LayerSlots) -> Tensor:
    """Return what a replacement gives, if the model can go on with it."""
    found, expected = kind.fill(slots), slots.heads_out
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise RunError(
            f"the ablation {kind.name!r} must return a tensor like the slots of layer {slots.layer}, "
            f"{expected.dtype} {list(expected.shape)}, got {got}"
        )
    return found


def check_replacements(layout: HeadLayout, replacements: Sequence[Replacement], variants: int) -> None:
    """Refuse replacements that do not fit the variants, or that a model's layers do not allow.

    Raises:
        UsageError: There is not one replacement for each variant; or heads are masked in the attention operator's
            output, which can only be set to zero.
    """
    if len(replacements) != variants:
        raise UsageError(f"{variants} variants need a replacement each, got {len(replacements)}")
    others = sorted({kind.name for kind in replacements if kind.name != ZERO})
    at_operator = [layer.name for layer in layout.layers if layer.masked_at_operator]
    if others and at_operator:
        raise UsageError(
            f"heads of {at_operator[0]!r} of {layout.model!r} are masked in the attention operator's output, which is "
            f"only ever set to zero; choose --model.semantics slot for other ablations, got {', '.join(others)}"
        )
