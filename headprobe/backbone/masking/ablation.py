"""Masks heads at each layer's point while a context is open; afterwards the model is as before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout, Operator
from headprobe.backbone.heads.trace import CallKind, WatchCalls, inside
from headprobe.backbone.masking.replacement import WITH_ZERO, LayerSlots, Replacement, replace_heads
from headprobe.errors import RunError

KeepOfLayer = Callable[[int], Tensor | None]
"""Gives, for a layer's number, which heads to keep, bool `[groups, heads]`; None keeps all and costs nothing.

The rows of the batch fall into equally long runs, one per group: a group is a single row of the batch, or a whole copy
of the images."""


Replacements = Callable[[], Sequence[Replacement]]
"""Gives what fills the slots of masked heads: one replacement for each group of rows, or one for all."""


def only_zero() -> Sequence[Replacement]:
    """Fill all masked slots with 0."""
    return (WITH_ZERO,)


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
        """Check that every layer's hook fired exactly once, and begin to count anew.

        Raises:
            RunError: A hook fired never, or more than once.
        """
        fired = self.fired
        self.restart()
        for layer, times in zip(layout.layers, fired, strict=True):
            if times != 1:
                raise RunError(
                    f"the mask of layer {layer.name!r} of {layout.model!r} was applied {times} times in one forward "
                    "pass instead of once; results would be wrong"
                )


@contextmanager
def ablating(
    backbone: nn.Module, layout: HeadLayout, keep: KeepOfLayer, replacements: Replacements = only_zero
) -> Iterator[HookCount]:
    """Ablate heads in every forward pass of `backbone` while the context is open, then remove all hooks.

    Fused attention stays on: slots are filled at the point, behind the attention operator. With the semantics
    `attention`, layers with more in a slot have their heads set to zero in the operator's own output instead.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        keep: Called once per layer and forward pass.
        replacements: Called where a layer has masked heads; heads masked at the operator are always set to 0.

    Yields:
        How often each layer's hook fires.
    """
    count = HookCount(len(layout.layers))
    at_operator = [number for number, layer in enumerate(layout.layers) if layer.masked_at_operator]
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):
            if number not in at_operator:
                point = backbone.get_submodule(layer.point)
                hook = _point_hook(number, layer, keep, replacements, count)
                stack.callback(point.register_forward_pre_hook(hook).remove)
        stack.enter_context(_at_operators(backbone, layout, at_operator, keep, count))
        yield count


def _point_hook(
    number: int, layer: AttentionLayer, keep: KeepOfLayer, replacements: Replacements, count: HookCount
) -> Callable[..., Any]:
    """Build the pre-hook of one layer's point."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        count.fired[number] += 1
        kept = keep(number)  # [groups, max heads]
        if kept is None:
            return None
        # In a growing pass the first group is the trunk; a single group is a batch of its own.
        trunk = args[0][: len(args[0]) // len(kept)] if len(kept) > 1 else None
        slots = LayerSlots(number, args[0], kept[:, : layer.heads], layer.channels, trunk, layer.rows)
        return (replace_heads(slots, replacements()), *args[1:])

    return hook


def _at_operators(
    backbone: nn.Module, layout: HeadLayout, numbers: Sequence[int], keep: KeepOfLayer, count: HookCount
) -> AbstractContextManager[None]:
    """Zero heads in the results of these layers' attention operators while the context is open."""

    def watch(index: int) -> ZeroHeads:
        number = numbers[index]
        layer = layout.layers[number]
        if layer.operator is None:
            raise RunError(f"the attention operator of layer {layer.name!r} was not found; mask its slots instead")
        kept = keep(number)  # [groups, max heads]
        return ZeroHeads(layer.operator, None if kept is None else kept[:, : layer.heads], count, number)

    modules = [backbone.get_submodule(layout.layers[number].name) for number in numbers]
    return inside(modules, watch)


class ZeroHeads(WatchCalls):
    """Zeroes heads in the output of one layer's attention operator, while entered around one call of the layer.

    Args:
        operator: The calls.
        keep: `[groups, heads]` bool, True = keep; None keeps all.
        count: Counts the operator's last call.
        layer: Number of the layer, for the count.
    """

    def __init__(self, operator: Operator, keep: Tensor | None, count: HookCount | None = None, layer: int = 0) -> None:
        super().__init__(self._zero)
        self.operator, self.keep, self.count, self.layer, self.next_call = operator, keep, count, layer, 0

    def _zero(self, kind: CallKind, _: tuple[Any, ...], __: dict[str, Any], result: Tensor) -> Tensor:
        if kind != self.operator.kind:
            return result
        call, self.next_call = self.next_call, self.next_call + 1
        if self.count is not None and call == self.operator.calls[-1]:
            self.count.fired[self.layer] += 1
        if self.keep is None or call not in self.operator.calls:
            return result
        return self.operator.zeroed(call, result, self.keep)


def masks_of_rows(keep: Tensor) -> KeepOfLayer:
    """Return the function that gives each row of the batch its own fixed mask.

    Args:
        keep: `[rows, layers, max heads]` bool, True = keep.
    """
    masked_layers = (~keep).any(dim=2).any(dim=0).tolist()

    def of_layer(layer: int) -> Tensor | None:
        return keep[:, layer] if masked_layers[layer] else None

    return of_layer


def masked_logits(backbone: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor) -> Tensor:
    """Return the logits `[images, classes]` of a plain forward pass in which every image carries its own mask.

    The growing pass must give these logits.

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
