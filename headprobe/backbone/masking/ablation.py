"""Zeroes masked heads where a layer concatenates them, while a context is open; afterwards the model is as before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout
from headprobe.backbone.heads.slots import HeadChannels, Operator, by_row, filled
from headprobe.backbone.operator_calls import CallKind, WatchCalls, inside
from headprobe.errors import RunError

KeepOfLayer = Callable[[int], Tensor | None]
"""Gives, for a layer's number, which heads to keep as bool `[groups, heads]`; None keeps all and costs nothing.

The rows of the batch fall into equally long runs, one per group: groups are single rows of the batch, or whole copies
of it."""


def ablate_heads(heads_out: Tensor, keep: Tensor, channels: HeadChannels) -> Tensor:
    """Return `heads_out` with the heads that are not kept set to zero.

    Args:
        heads_out: What enters the head-concat point, `[rows, ..., channels]` or `[rows, channels, ...]`; rows are
            sample-major, windows of an image adjoin.
        keep: `[groups, heads]` bool; group g owns the g-th equal share of the rows.
        channels: Which of them belong to which head.

    Raises:
        RunError: The rows do not divide into the groups.

    Source: Michel, Levy & Neubig, 2019, section 2, https://arxiv.org/abs/1905.10650 (xi_h in {0, 1}).
    """
    kept = channels.of_heads(by_row(keep, len(heads_out)))
    others = heads_out.shape[channels.axis] - channels.channels
    if others:
        kept = torch.cat([kept, kept.new_ones(len(kept), others)], dim=1)
    shape = [len(kept), *[1] * (heads_out.dim() - 1)]
    shape[channels.axis] = kept.shape[1]
    return filled(heads_out, ~kept.view(shape))


class HookCount:
    """How often each layer's hook has fired in the forward pass under way."""

    def __init__(self, layers: int) -> None:
        self.fired = [0] * layers
        self._before = False

    @property
    def ever(self) -> bool:
        """Whether any hook has fired since the beginning."""
        return self._before or any(self.fired)

    def restart(self) -> None:
        """Begin to count a forward pass."""
        self._before = self.ever
        self.fired = [0] * len(self.fired)

    def check(self, layout: HeadLayout) -> None:
        """Raise a RunError unless every layer fired exactly once since the last check."""
        fired = self.fired
        self.restart()
        for layer, times in zip(layout.layers, fired, strict=True):
            if times != 1:
                raise RunError(
                    f"the mask of layer {layer.name!r} of {layout.model!r} was applied {times} times in one forward "
                    "pass instead of once; results would be wrong"
                )


@contextmanager
def ablating(backbone: nn.Module, layout: HeadLayout, keep: KeepOfLayer) -> Iterator[HookCount]:
    """Ablate heads in every forward pass of `backbone` while the context is open, then remove all hooks.

    Fused attention stays on: the heads are zeroed where they are concatenated, after the attention operator, or in what
    the operator gives where the layout's semantics ask for it.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        keep: Asked once per layer and forward pass.
    """
    count = HookCount(len(layout.layers))
    at_operator = [number for number, layer in enumerate(layout.layers) if layer.masked_at_operator]
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):
            if number not in at_operator:
                point = backbone.get_submodule(layer.point)
                stack.callback(point.register_forward_pre_hook(_site_hook(number, layer, keep, count)).remove)
        stack.enter_context(_at_operators(backbone, layout, at_operator, keep, count))
        yield count


def _site_hook(number: int, layer: AttentionLayer, keep: KeepOfLayer, count: HookCount) -> Callable[..., Any]:
    """Build the pre-hook of one layer's head-concat point."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        count.fired[number] += 1
        kept = keep(number)
        if kept is None:
            return None
        return (ablate_heads(args[0], kept[:, : layer.heads], layer.channels), *args[1:])

    return hook


def _at_operators(
    backbone: nn.Module, layout: HeadLayout, numbers: Sequence[int], keep: KeepOfLayer, count: HookCount
) -> AbstractContextManager[None]:
    """Zero heads in the results of these layers' attention operators while the context is open."""

    def watch(place: int) -> ZeroHeads:
        layer = layout.layers[numbers[place]]
        if layer.operator is None:
            raise RunError(f"the attention operator of layer {layer.name!r} was not seen; mask its slots instead")
        kept = keep(numbers[place])
        return ZeroHeads(layer.operator, None if kept is None else kept[:, : layer.heads], count, numbers[place])

    return inside([backbone.get_submodule(layout.layers[number].name) for number in numbers], watch)


class ZeroHeads(WatchCalls):
    """Zeroes heads in what one layer's attention operator gives, while entered around one call of the layer.

    Args:
        operator: The calls.
        keep: `[groups, heads]` bool; None keeps all.
        count: Is told when the operator's last call was seen.
        layer: Number of the layer, for the count.
    """

    def __init__(self, operator: Operator, keep: Tensor | None, count: HookCount | None = None, layer: int = 0) -> None:
        super().__init__(self._zero)
        self.operator, self.keep, self.count, self.layer, self.seen = operator, keep, count, layer, 0

    def _zero(self, kind: CallKind, _: tuple[Any, ...], __: dict[str, Any], result: Tensor) -> Tensor:
        if kind != self.operator.kind:
            return result
        call, self.seen = self.seen, self.seen + 1
        if self.count is not None and call == self.operator.calls[-1]:
            self.count.fired[self.layer] += 1
        if self.keep is None or call not in self.operator.calls:
            return result
        return self.operator.zeroed(call, result, self.keep)


def masks_of_rows(keep: Tensor) -> KeepOfLayer:
    """Serve one fixed mask per row of the batch.

    Args:
        keep: `[rows, layers, max heads]` bool, True = keep.
    """
    masked_layers = (~keep).any(dim=2).any(dim=0).tolist()

    def of_layer(layer: int) -> Tensor | None:
        return keep[:, layer] if masked_layers[layer] else None

    return of_layer


def masked_logits(backbone: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor) -> Tensor:
    """Return the logits `[images, classes]` of a plain forward pass in which every image carries its own mask.

    This is the definition that the growing pass is held to.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        images: `[images, channels, height, width]`, normalised.
        keep: `[layers, max heads]` bool for all images, or `[images, layers, max heads]`.
    """
    of_rows = keep if keep.dim() == 3 else keep.expand(1, *keep.shape)
    with ablating(backbone, layout, masks_of_rows(of_rows.to(images.device))) as count:
        logits: Tensor = backbone(images)
    count.check(layout)
    return logits
