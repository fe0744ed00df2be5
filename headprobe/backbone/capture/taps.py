"""Hands each layer's heads, attention and residual stream to observers while a model runs; keeps nothing.

Fused attention stays on: a `TorchFunctionMode` watches the operator's calls, with their arguments as they are after all
norms, rotations and biases, and the calls of `softmax` where a model does without the operator. Hooks give the layer
that is running.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.layer_record import FusedAttention, LayerRecord, PlainAttention
from headprobe.backbone.capture.operator_record import AppliedWeights, WatchOperator
from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout, parent_of
from headprobe.backbone.sandbox import without_autocast
from headprobe.errors import RunError

Observer = Callable[[LayerRecord], None]


RowsOfLayer = Callable[[int, int], slice | None]
"""Gives, for a layer's number and the number of images in the batch there, which to hand over; None for no image.

In a growing pass the batch holds the images several times, and a mask's images only from its join on."""


SECOND_HALF = ("norm2", "mlp")
"""The modules of a block's second half in timm; the input of the first one called is the stream after attention."""


def all_rows(_: int, images: int) -> slice:
    """Hand over the whole batch at every layer."""
    return slice(0, images)


@dataclass(frozen=True)
class Tap:
    """One observer and the rows that it observes.

    Attributes:
        observer: Called once per layer and forward pass, in the order of the layers, without gradients or autocast.
        rows: Which images of the batch it takes.
    """

    observer: Observer
    rows: RowsOfLayer = all_rows


@contextmanager
def tapping(backbone: nn.Module, layout: HeadLayout, taps: Sequence[Tap]) -> Iterator[None]:
    """Call the observers in every forward pass of `backbone` while the context is open, then remove all hooks.

    Open it inside `ablating` or `GrowingPass`: hooks run in the order in which they were installed, and taps hand over
    heads after their ablation. Without taps nothing is installed. A model that was compiled before ignores the hooks.

    Raises:
        RunError: A layer ran out of turn or not at all, or its attention could not be tapped: numbers would be wrong.
    """
    if not taps:
        yield
        return
    pass_ = _Pass(layout, tuple(taps))
    with ExitStack() as stack:
        stack.callback(pass_.watch.close)
        for number, layer in enumerate(layout.layers):
            for handle in _install(backbone, number, layer, pass_):
                stack.callback(handle.remove)
        yield
        pass_.check_ended()


@dataclass
class _Gathered:
    """What the hooks of the layer under way have handed over so far, for all rows."""

    layer: int
    stream_before: Tensor | None  # as the block takes it
    heads_out: Tensor | None = None  # as the point takes it
    projected: Tensor | None = None  # as the projection takes it
    operator: WatchOperator | None = None


@dataclass
class _Pass:
    """The forward pass under way: begins and ends one layer after the other."""

    layout: HeadLayout
    taps: tuple[Tap, ...]
    next_layer: int = 0
    streams: dict[int, Tensor] = field(default_factory=dict)  # inputs of entered blocks, until their layer begins
    gathered: _Gathered | None = None
    watch: ExitStack = field(default_factory=ExitStack)  # holds the mode, inside attention modules only: it costs time

    def begin(self, layer: int) -> None:
        """Note that a layer's attention module is entered."""
        name = self.layout.layers[layer].name
        if self.gathered is not None or layer != self.next_layer % len(self.layout.layers):
            raise RunError(f"layer {name!r} of {self.layout.model!r} ran out of turn; its heads cannot be tapped")

        self.gathered = _Gathered(layer, self.streams.pop(layer, None))
        operator = self.layout.layers[layer].operator
        if operator is not None and self.layout.layers[layer].site.maps == "weights":
            self.gathered.operator = self.watch.enter_context(WatchOperator(operator))

    def end(self, stream_after: Tensor | None, norm_follows: bool) -> None:
        """Hand the layer over to the taps."""
        gathered, self.gathered = self.gathered, None
        if gathered is None:
            return
        self.next_layer = (gathered.layer + 1) % len(self.layout.layers)

        layer = self.layout.layers[gathered.layer]
        if gathered.heads_out is None or gathered.projected is None:
            raise RunError(f"the heads of layer {layer.name!r} of {self.layout.model!r} could not be tapped")
        images, rest = divmod(len(gathered.heads_out), layer.rows)
        if rest:
            raise RunError(
                f"the batch of layer {layer.name!r} of {self.layout.model!r} must have {layer.rows} rows per image, "
                f"got {len(gathered.heads_out)}"
            )

        applied = self._applied(gathered, layer, images)
        with torch.no_grad(), without_autocast(gathered.heads_out.device.type):
            for tap in self.taps:
                wanted = tap.rows(gathered.layer, images)
                if wanted is not None:
                    tap.observer(_record(gathered, layer, applied, images, wanted, stream_after, norm_follows))

    def _applied(self, gathered: _Gathered, layer: AttentionLayer, images: int) -> AppliedWeights | None:
        """Return the weights that a layer applied; None where it has none between tokens."""
        if gathered.operator is None:
            return None
        applied = gathered.operator.applied()
        if len(applied) != 1:
            raise RunError(f"the attention of layer {layer.name!r} of {self.layout.model!r} could not be tapped")

        rows, heads = applied[0].attention.shape[:2]
        if rows % images or heads != layer.heads:
            raise RunError(
                f"the attention of layer {layer.name!r} of {self.layout.model!r} must have {layer.heads} heads and "
                f"the rows of {images} images, got {heads} heads in {rows} rows"
            )
        return applied[0]

    def check_ended(self) -> None:
        """Raise unless the last forward pass came to its end."""
        if self.gathered is not None or self.next_layer:
            name = self.layout.layers[self.next_layer].name
            raise RunError(f"the forward pass of {self.layout.model!r} ended before layer {name!r} was tapped")


def _record(
    gathered: _Gathered,
    layer: AttentionLayer,
    applied: AppliedWeights | None,
    images: int,
    wanted: slice,
    stream_after: Tensor | None,
    norm_follows: bool,
) -> LayerRecord:
    """Return a layer's record for some of the images.

    Args:
        gathered: What the layer's hooks handed over.
        layer: The layer.
        applied: Its weights and values.
        images: Images in the batch.
        wanted: Which of them to hand over.
        stream_after: The residual stream after attention, as the block has it.
        norm_follows: A norm stands between the output projection and the stream.
    """
    if gathered.heads_out is None or gathered.projected is None:
        raise RunError(f"the heads of layer {layer.name!r} could not be tapped")
    start, stop, _ = wanted.indices(images)

    # rows are sample-major: the windows of an image are neighbours
    rows = slice(start * layer.rows, stop * layer.rows)
    heads_out = layer.channels.split(gathered.heads_out[rows])  # [rows, tokens, heads, head_dim]
    same = gathered.projected is gathered.heads_out

    # attention may have other rows per image than the point: some models make windows inside the layer
    attention: FusedAttention | PlainAttention | None = None
    values: Tensor | None = None
    if applied is not None:
        windows = applied.attention.shape[0] // images
        of_images = slice(start * windows, stop * windows)
        attention, values = applied.attention.rows(of_images), applied.values[of_images]

    return LayerRecord(
        layer=gathered.layer,
        images=stop - start,
        windows=layer.rows,
        heads_out=heads_out,
        projected=heads_out if same else layer.channels.split(gathered.projected[rows]),
        values=values,
        attention=attention,
        stream_before=_stream(gathered.stream_before, layer, images, start, stop),
        stream_after=_stream(stream_after, layer, images, start, stop),
        norm_follows=norm_follows,
    )


def _stream(stream: Tensor | None, layer: AttentionLayer, images: int, start: int, stop: int) -> Tensor | None:
    """Return images of a stream as `[images, tokens, dim]`, from `[images, (tokens | rows, columns), dim]`.

    None where the block's input is not the layer's own tokens: blocks in convolutional models take channels first.
    """
    if stream is None or stream.dim() < 3 or len(stream) != images:
        return None
    tokens = stream[start:stop].flatten(1, -2)  # [images, tokens, dim]
    # by the grid where there is one: windows may be padded, the stream is not
    own = layer.rows * layer.tokens if layer.grid is None else layer.prefix + math.prod(layer.grid)
    return tokens if tokens.shape[1] == own else None


def _install(
    backbone: nn.Module, number: int, layer: AttentionLayer, pass_: _Pass
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook one layer; its record is complete when its block's second half is entered."""
    module = backbone.get_submodule(layer.name)
    point, projection = backbone.get_submodule(layer.point), backbone.get_submodule(layer.projection)

    parent = parent_of(layer.name)
    block = backbone.get_submodule(parent) if parent and layer.site.residual else None
    halves = _second_half(block)

    def enter_block(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            pass_.streams[number] = args[0]

    def enter_attention(*_: object) -> None:
        pass_.begin(number)

    def at_point(_: nn.Module, args: tuple[Any, ...]) -> None:
        if pass_.gathered is not None and pass_.gathered.heads_out is None:
            pass_.gathered.heads_out = args[0]

    def at_projection(_: nn.Module, args: tuple[Any, ...]) -> None:
        if pass_.gathered is not None:
            pass_.gathered.projected = args[0]

    def leave_attention(*_: object) -> None:
        pass_.watch.close()
        if not halves:
            pass_.end(None, norm_follows=False)

    def enter_second_half(half: nn.Module, args: tuple[Any, ...]) -> None:
        if pass_.gathered is not None and pass_.gathered.layer == number:
            # blocks that normalise the attention's output before they add it call the mlp before norm2
            pass_.end(args[0], norm_follows=half is halves[-1])

    handles = [
        module.register_forward_pre_hook(enter_attention),
        point.register_forward_pre_hook(at_point),
        projection.register_forward_pre_hook(at_projection),
        module.register_forward_hook(leave_attention),
    ]
    if block is not None:
        handles.append(block.register_forward_pre_hook(enter_block))
    return handles + [half.register_forward_pre_hook(enter_second_half) for half in halves]


def _second_half(block: nn.Module | None) -> list[nn.Module]:
    """Return the modules of a block's second half; none if one is missing."""
    halves = [getattr(block, name, None) for name in SECOND_HALF]
    found = [half for half in halves if isinstance(half, nn.Module)]
    return found if len(found) == len(SECOND_HALF) else []
