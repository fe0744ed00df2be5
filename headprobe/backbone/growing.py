"""Many masks in one forward pass: the batch grows with depth, each mask joining at its first masked layer.

A mask whose first masked layer is l changes nothing before l, so up to there the unmasked rows (the trunk) stand for
it. A pre-hook on the module around layer l appends one copy of the trunk's rows per joining mask; from there on every
row carries its own mask. Each module runs once; nothing is cached and nothing is run again. Which module that is, is
decided by trial (`headprobe.backbone.joins`).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import HookCount, ablating
from headprobe.backbone.heads import HeadLayout
from headprobe.backbone.rows import RowPlan
from headprobe.backbone.taps import RowsOfLayer, Tap, tapping
from headprobe.errors import RunError

Path = tuple[int | str, ...]
"""Where a tensor is among a module's arguments: a position or keyword, then places in the lists that it may be in."""


@dataclass(frozen=True)
class Join:
    """The module at whose input a layer's masks join.

    Attributes:
        module: Its qualified name, empty for the whole model.
        place: When it is called, counted over all modules of one forward pass.
        batched: Its tensor arguments that carry the batch, with their rows per image.
        proven: Masks that join here were seen to give the logits of plain forward passes.
    """

    module: str
    place: int
    batched: tuple[tuple[Path, int], ...]
    proven: bool = False


def first_layers(keep: Tensor) -> list[int | None]:
    """Return the first layer that each mask of `[masks, layers, max heads]` masks, None for one without heads."""
    masked = (~keep).any(dim=2).cpu()
    return [int(row.int().argmax()) if bool(row.any()) else None for row in masked]


class GrowingPass:
    """Runs a backbone on images under many head masks at once.

    Use it as a context manager: hooks live only inside.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        joins: For every layer where its masks join, from `find_joins`.
        keep: `[masks, layers, max heads]` bool, True = keep.
    """

    def __init__(self, backbone: nn.Module, layout: HeadLayout, joins: Sequence[Join], keep: Tensor) -> None:
        self.backbone, self.layout, self.joins = backbone, layout, tuple(joins)
        self.keep = keep
        self.first_layers = first_layers(keep)
        self._masked = (~keep).any(dim=2).tolist()
        self._rows = _Rows(0, (), 0)
        self._stack = ExitStack()
        self._count = HookCount(len(layout.layers))

    @property
    def join_places(self) -> list[int | None]:
        """For every mask the place of its join point in execution order, None for a mask without heads."""
        return [None if layer is None else self.joins[layer].place for layer in self.first_layers]

    @property
    def layers_run(self) -> list[int]:
        """For every mask how many layers its rows run through: those from its join point on."""
        places = [join.place for join in self.joins]
        return [0 if place is None else sum(other >= place for other in places) for place in self.join_places]

    def plan(self, batch_size: int, budget: int) -> RowPlan:
        """Plan the forward passes of batches of `batch_size` images within `budget` rows."""
        return RowPlan.build(self.join_places, batch_size, budget)

    def __enter__(self) -> "GrowingPass":
        with ExitStack() as stack:
            self._count = stack.enter_context(ablating(self.backbone, self.layout, self._keep_of_layer))
            for join in {join.module: join for join in self.joins}.values():
                module = self.backbone.get_submodule(join.module)
                handle = module.register_forward_pre_hook(self._join_hook(join), with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def joined(self, mask: int) -> bool:
        """Say whether rows of a mask exist in the forward pass under way; before they do, the trunk's stand for it."""
        return mask in self._rows.chunk[: self._rows.joined]

    def rows_of(self, mask: int | None = None) -> RowsOfLayer:
        """Return where a tap finds the rows of a mask, or without one those of the trunk: the baseline."""

        def rows(_layer: int, _images: int) -> slice:
            now = self._rows
            copy = 1 + now.chunk.index(mask) if mask is not None and self.joined(mask) else 0
            return slice(copy * now.images, (copy + 1) * now.images)

        return rows

    def logits(self, images: Tensor, plan: RowPlan, taps: Sequence[Tap] = ()) -> Tensor:
        """Return logits `[1 + masks, images, classes]`, the baseline first, of at most `plan.images` images.

        The baseline is the trunk of the first chunk, one and the same for every mask.

        Args:
            images: `[images, channels, height, width]`, normalised.
            plan: Which masks share a forward pass.
            taps: Listen to the first chunk, heads being seen after their ablation.

        Raises:
            RunError: A mask did not join, a hook did not fire exactly once, or a tap missed a layer.
        """
        out: Tensor | None = None
        for chunk in plan.chunks:
            with tapping(self.backbone, self.layout, taps if out is None else ()):
                by_mask = self._forward(images, chunk)
            if out is None:
                out = by_mask.new_empty(1 + len(self.first_layers), *by_mask.shape[1:])
                out[0] = by_mask[0]
            for place, mask in enumerate(chunk):
                out[1 + mask] = by_mask[1 + place]
        if out is None:
            raise RunError("the row plan has no chunk")
        for mask in plan.idle:
            out[1 + mask] = out[0]
        return out

    def _forward(self, images: Tensor, chunk: tuple[int, ...]) -> Tensor:
        """Run one chunk and return `[1 + masks of the chunk, images, classes]`."""
        self._rows = _Rows(len(images), chunk, joined=0)
        try:
            logits: Tensor = self.backbone(images)
        finally:
            joined, self._rows = self._rows.joined, _Rows(0, (), 0)
        self._count.check(self.layout)
        if joined != len(chunk) or len(logits) != len(images) * (1 + joined):
            raise RunError(f"{joined} of {len(chunk)} masks joined the forward pass of {self.layout.model!r}")
        return logits.reshape(1 + joined, len(images), *logits.shape[1:])

    def _keep_of_layer(self, layer: int) -> Tensor | None:
        """Return which heads of `layer` the trunk and the masks joined so far keep."""
        joined, waiting = self._rows.chunk[: self._rows.joined], self._rows.chunk[self._rows.joined :]
        if any(self._masked[mask][layer] for mask in waiting):
            raise RunError(f"a mask of {self.layout.layers[layer].name!r} of {self.layout.model!r} joined too late")
        if not any(self._masked[mask][layer] for mask in joined):
            return None
        masks = self.keep[list(joined), layer]
        return torch.cat([torch.ones_like(masks[:1]), masks])

    def _join_hook(self, join: Join) -> Callable[..., Any]:
        """Build the pre-hook that appends the trunk's rows for the masks joining at `join`."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            rows = self._rows
            joining = 0
            for mask in rows.chunk[rows.joined :]:
                layer = self.first_layers[mask]
                if layer is None or self.joins[layer].module != join.module:
                    break
                joining += 1
            if not joining:
                return None
            rows.joined += joining
            return _grown(args, kwargs, join, rows.images, joining)

        return hook


@dataclass
class _Rows:
    """What the rows of the forward pass under way are."""

    images: int
    chunk: tuple[int, ...]
    joined: int


def _grown(
    args: tuple[Any, ...], kwargs: dict[str, Any], join: Join, images: int, joining: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with the trunk's rows appended `joining` times wherever they carry the batch."""
    positional: Any = args
    named: Any = kwargs
    for path, rows_per_image in join.batched:

        def grow(tensor: Tensor, rows: int = images * rows_per_image) -> Tensor:
            return torch.cat([tensor, tensor[:rows].repeat(joining, *[1] * (tensor.dim() - 1))])

        if isinstance(path[0], int):
            positional = _replaced(positional, path, grow)
        else:
            named = _replaced(named, path, grow)
    return positional, named


def _replaced(holder: Any, path: Path, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested tuples, lists and dictionaries with the tensor at `path` changed."""
    if not path:
        return change(holder)
    key, *rest = path
    if isinstance(holder, dict):
        return {**holder, key: _replaced(holder[key], tuple(rest), change)}
    items = list(holder)
    items[int(key)] = _replaced(items[int(key)], tuple(rest), change)
    return type(holder)(items)
