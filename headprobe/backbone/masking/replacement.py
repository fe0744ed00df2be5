"""What the slots of masked heads are filled with.

`replace_heads` is called from exactly two places: the hook at a layer's point (`headprobe.backbone.masking.ablation`)
and the shared core of masks that join at a layer (`headprobe.backbone.growing.shortcuts`). A new kind of ablation is a
subclass of `Replacement`; windows, waves and shortcuts need no change for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprobe.backbone.heads.layout import HeadChannels, HeadLayout, by_row, filled
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import LINEAR, POSITION, RESAMPLE, ZERO


@dataclass(frozen=True)
class LayerSlots:
    """What enters one layer's point in some rows of a batch, and which heads each of these rows keeps.

    Attributes:
        layer: Number of the layer.
        heads_out: `[rows, ..., channels]` or `[rows, channels, ...]`; rows are sample-major, windows of an image join.
        keep: `[groups, heads]` bool, True = keep; group g owns the g-th equal share of the rows.
        channels: Which channels belong to which head.
        trunk: The same of the unmasked images of this pass, `[rows of the trunk, ...]`; None outside a growing pass.
        rows_per_image: Rows of one image: its windows, where the layer has windows here.
    """

    layer: int
    heads_out: Tensor
    keep: Tensor
    channels: HeadChannels
    trunk: Tensor | None = None
    rows_per_image: int = 1

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

    def with_masked(self, values: Tensor) -> Tensor:
        """Return `heads_out` with the slots of masked heads taken from `values`; no bit of a kept head changes.

        Args:
            values: A tensor that broadcasts over `heads_out`, of its type.
        """
        # where() may give another memory layout, for which a product may round differently
        return self.heads_out.clone().copy_(torch.where(self.masked, values, self.heads_out))

    def at_point(self, constants: Tensor) -> Tensor:
        """Return constants of heads in the layout of `heads_out`, over which they broadcast.

        Args:
            constants: `[heads, head_dim]`, or by token position `[positions, heads, head_dim]` where a position is a
                row of an image and a token in it.

        Raises:
            RunError: There are fewer positions than tokens.
        """
        width = self.heads_out.shape[self.channels.axis]
        flat = constants.reshape(-1, self.channels.channels)  # [1 or positions, channels], in the order of heads
        placed = flat.new_zeros(len(flat), width)
        placed[:, self.channels.of_split.to(flat.device)] = flat
        placed = placed.to(self.heads_out)

        if constants.dim() == 2:
            shape = [1] * self.heads_out.dim()
            shape[self.channels.axis] = width
            return placed.view(shape)
        return self._by_position(placed)

    def _by_position(self, placed: Tensor) -> Tensor:
        """Return `[positions, width]` in the layout of `heads_out`, repeated for each image.

        Where the pass needs only the leading tokens of the last layer, only their positions are taken.
        """
        last = self.heads_out.movedim(1, -1) if self.channels.axis == 1 else self.heads_out  # [rows, ..., width]
        tokens = last[0, ..., 0].numel()
        if self.rows_per_image * tokens > len(placed) or len(last) % self.rows_per_image:
            raise RunError(
                f"layer {self.layer} has {self.rows_per_image} x {tokens} token positions where the calibration "
                f"had {len(placed)}"
            )
        of_image = placed.view(self.rows_per_image, -1, placed.shape[1])[
            :, :tokens
        ]  # [rows of an image, tokens, width]
        repeated = of_image.repeat(len(last) // self.rows_per_image, 1, 1).view(last.shape)
        return repeated.movedim(-1, 1) if self.channels.axis == 1 else repeated


class Replacement(ABC):
    """One kind of ablation.

    Attributes:
        name: Its name in the column `ablation` of `masks.csv`.
    """

    name: str

    @abstractmethod
    def fill(self, slots: LayerSlots) -> Tensor:
        """Return `heads_out` with the slots of masked heads filled; no bit of a kept head may change."""

    def fills(self, layer: int) -> bool:
        """Return whether it may have slots to fill in a layer; where not, `fill` is not called for it."""
        return True

    def part(self, layer: int) -> object:
        """Return what of it fills a layer's slots: two replacements with the same object there fill the same alike."""
        return self

    def check(self, keep: Tensor) -> None:
        """Refuse a mask that it was not made for.

        Args:
            keep: `[layers, max heads]` bool, True = keep; entries behind a layer's heads are True.

        Raises:
            RunError: With the layer.
        """
        return


class Zero(Replacement):
    """Fills masked slots with 0.

    Source: Michel, Levy & Neubig, 2019, section 2, https://arxiv.org/abs/1905.10650 (xi_h in {0, 1}).
    """

    name = ZERO

    def fill(self, slots: LayerSlots) -> Tensor:
        """Set the channels of masked heads to 0."""
        return filled(slots.heads_out, slots.masked)


class Constant(Replacement):
    """Fills masked slots with a constant vector per head: its mean, or its optimal constant.

    The masked model equals a really smaller one: remove the head, and add `W_O[:, h] c` to the projection's bias.

    Args:
        name: `mean` or `optimal`.
        constants: By layer `[heads, head_dim]`.
    """

    def __init__(self, name: str, constants: Sequence[Tensor]) -> None:
        self.name, self.constants = name, tuple(constants)

    def fill(self, slots: LayerSlots) -> Tensor:
        """Set the channels of masked heads to the head's constant."""
        return slots.with_masked(slots.at_point(self.constants[slots.layer]))


class Position(Replacement):
    """Fills masked slots with the head's mean at the same token position.

    Args:
        constants: By layer `[positions, heads, head_dim]`.
    """

    name = POSITION

    def __init__(self, constants: Sequence[Tensor]) -> None:
        self.constants = tuple(constants)

    def fill(self, slots: LayerSlots) -> Tensor:
        """Set the channels of masked heads to the head's mean at each token's position."""
        return slots.with_masked(slots.at_point(self.constants[slots.layer]))


@dataclass(frozen=True)
class AffineMap:
    """`z_S = B z_K + c` of one layer under one mask.

    Attributes:
        kept: Numbers of the channels that predict, in the order of heads, `[kept]`.
        masked: Numbers of the predicted channels `[masked]`.
        matrix: B `[masked, kept]`.
        offset: c `[masked]`.
    """

    kept: Tensor
    masked: Tensor
    matrix: Tensor
    offset: Tensor


class Linear(Replacement):
    """Fills masked slots with their affine prediction from the slots that the layer keeps.

    Where a layer keeps none, the prediction is the mean. Its model folds too: `W[:, K] += W[:, S] B`, and
    `bias += W[:, S] c`.

    Args:
        maps: By layer the prediction for this variant's mask, None where nothing of the layer is masked.
    """

    name = LINEAR

    def __init__(self, maps: Sequence[AffineMap | None]) -> None:
        self.maps = tuple(maps)

    def fills(self, layer: int) -> bool:
        """Return whether the mask hits the layer."""
        return self.maps[layer] is not None

    def part(self, layer: int) -> object:
        """Return the layer's prediction."""
        return self.maps[layer]

    def check(self, keep: Tensor) -> None:
        """Refuse a mask of other layers than the predictions are for."""
        for layer, masked in enumerate((~keep).any(dim=1).tolist()):
            if masked != self.fills(layer):
                raise RunError(f"the ablation linear was fitted for another mask: layer {layer} differs")

    def fill(self, slots: LayerSlots) -> Tensor:
        """Predict the channels of masked heads from those of kept heads, token by token."""
        found = self.maps[slots.layer]
        if found is None:  # only other variants of the pass mask this layer
            return slots.heads_out
        device, axis = slots.heads_out.device, slots.channels.axis
        place = slots.channels.of_split.to(device)
        out = slots.heads_out.clone()
        view, masked = out.movedim(axis, -1), slots.masked.movedim(axis, -1)  # [rows, ..., width]

        # in float32 where the model computes in halves: a sum over all kept channels
        kept = view[..., place[found.kept.to(device)]]  # [rows, ..., kept]
        dtype = torch.promote_types(kept.dtype, torch.float32)
        matrix, offset = found.matrix.to(device, dtype), found.offset.to(device, dtype)
        predicted = kept.to(dtype) @ matrix.T + offset  # [rows, ..., masked]

        chosen = place[found.masked.to(device)]
        # rows that keep these heads stay as they are: the trunk, or those of other masks
        view[..., chosen] = torch.where(masked[..., chosen], predicted.to(out.dtype), view[..., chosen])
        return out


class Resample(Replacement):
    """Fills masked slots with the same heads' output on another image of the pass, unmasked.

    Args:
        seed: Of all draws.
        draw: Number of the draw.

    Attributes:
        donors: `[images of the pass]`, for each image the place of its donor in the pass; set before every pass.
    """

    name = RESAMPLE

    def __init__(self, seed: int = 0, draw: int = 0) -> None:
        self.seed, self.draw = seed, draw
        self.donors: Tensor | None = None

    def fill(self, slots: LayerSlots) -> Tensor:
        """Set the channels of masked heads to the donor image's."""
        if slots.trunk is None or self.donors is None:
            raise RunError("the ablation resample needs the other images of a forward pass of headprobe test")
        per_image = slots.rows_per_image
        if len(slots.trunk) != per_image * len(self.donors):
            raise RunError(f"{len(self.donors)} images need a donor each, got {len(slots.trunk)} rows of the trunk")
        # [images, rows of an image]: the donor's rows, in order
        first = self.donors.to(slots.trunk.device)[:, None] * per_image
        rows = (first + torch.arange(per_image, device=first.device)).flatten()
        given = slots.trunk[rows]
        return slots.with_masked(given.repeat(len(slots.keep), *[1] * (given.dim() - 1)))


WITH_ZERO = Zero()


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
        if not kind.fills(slots.layer):
            continue
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
    refuse_kinds(layout, {kind.name for kind in replacements})


def refuse_kinds(layout: HeadLayout, kinds: Collection[str]) -> None:
    """Refuse kinds of ablation that a model's layers do not allow.

    Raises:
        UsageError: Heads are masked in the attention operator's output, which can only be set to zero; or linear is
            wanted where a norm over all heads stands before the projection, so that no prediction folds into weights.
    """
    others = sorted(set(kinds) - {ZERO})
    at_operator = [layer.name for layer in layout.layers if layer.masked_at_operator]
    if others and at_operator:
        raise UsageError(
            f"heads of {at_operator[0]!r} of {layout.model!r} are masked in the attention operator's output, which is "
            f"only ever set to zero; choose --model.semantics slot for other ablations, got {', '.join(others)}"
        )
    normed = [layer.name for layer in layout.layers if layer.inner_norm]
    if LINEAR in kinds and normed:
        raise UsageError(
            f"between the heads of {normed[0]!r} of {layout.model!r} and their projection stands a norm over all "
            "heads, which is not linear: choose zero, mean, position, resample or optimal, got linear"
        )
