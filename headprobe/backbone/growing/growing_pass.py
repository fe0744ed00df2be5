"""Many masks in one forward pass: the batch grows with depth, each mask joining at its first masked layer.

A mask whose first masked layer is l changes nothing before l, so up to there the unmasked rows (the trunk) stand for
it. A pre-hook on the module around layer l appends one copy of the trunk's rows per joining mask; from there on every
row carries its own mask. Each module runs once; nothing is cached and nothing is run again. Which module that is, is
decided by trial (`headprobe.backbone.growing.joins`).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.taps import RowsOfLayer, Tap, tapping
from headprobe.backbone.growing.batch_arguments import Arguments, Batched, grown
from headprobe.backbone.growing.row_plan import PassRows, RowPlan
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Hook, LeavingOut, Shortcuts
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import HookCount, ablating
from headprobe.errors import RunError


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
    batched: Batched
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
        shortcuts: What may be left out, from `find_shortcuts`; while taps listen nothing is.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layout: HeadLayout,
        joins: Sequence[Join],
        keep: Tensor,
        shortcuts: Shortcuts = NO_SHORTCUTS,
    ) -> None:
        self.backbone, self.layout, self.joins = backbone, layout, tuple(joins)
        self.keep = keep
        self.first_layers = first_layers(keep)
        self._masked = (~keep).any(dim=2).tolist()
        self._less = LeavingOut(backbone, layout, keep, shortcuts)
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
            joins = {join.module: join for join in self.joins}.values()
            for module, hook in [*((join.module, self._join_hook(join)) for join in joins), *self._less.hooks()]:
                handle = self.backbone.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(self._less.asking())
            # last, for hooks run in the order in which they were installed: heads are zeroed in rows that are all there
            self._count = stack.enter_context(ablating(self.backbone, self.layout, self._keep_of_layer))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def joined(self, mask: int) -> bool:
        """Say whether rows of a mask exist in the forward pass under way; before they do, the trunk's stand for it."""
        return mask in self._less.rows.chunk[: self._less.rows.joined]

    def rows_of(self, mask: int | None = None) -> RowsOfLayer:
        """Return where a tap finds the rows of a mask, or without one those of the trunk: the baseline."""

        def rows(_layer: int, _images: int) -> slice:
            now = self._less.rows
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
            listening = taps if out is None else ()
            with tapping(self.backbone, self.layout, listening):
                by_mask = self._forward(images, chunk, whole=bool(listening))
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

    def _forward(self, images: Tensor, chunk: tuple[int, ...], whole: bool) -> Tensor:
        """Run one chunk and return `[1 + masks of the chunk, images, classes]`.

        Args:
            images: `[images, channels, height, width]`, normalised.
            chunk: Numbers of the masks.
            whole: Take no shortcut.
        """
        rows = self._less.rows = PassRows(len(images), chunk, whole=whole)
        try:
            logits: Tensor = self.backbone(images)
        finally:
            self._less.rows = PassRows()
        self._count.check(self.layout)
        joined = rows.joined
        if rows.left_out or joined != len(chunk) or len(logits) != len(images) * (1 + joined):
            raise RunError(f"{joined} of {len(chunk)} masks joined the forward pass of {self.layout.model!r}")
        return logits.reshape(1 + joined, len(images), *logits.shape[1:])

    def _keep_of_layer(self, layer: int) -> Tensor | None:
        """Return which heads of `layer` the trunk and the masks joined so far keep."""
        rows = self._less.rows
        joined, waiting = rows.chunk[: rows.joined], rows.chunk[rows.joined :]
        if any(self._masked[mask][layer] for mask in waiting):
            raise RunError(f"a mask of {self.layout.layers[layer].name!r} of {self.layout.model!r} joined too late")
        zeroed, rows.zeroed = rows.zeroed, 0
        if not any(self._masked[mask][layer] for mask in joined[: len(joined) - zeroed]):
            return None
        masks = self.keep[list(joined), layer]
        return torch.cat([torch.ones_like(masks[:1]), masks])

    def _join_hook(self, join: Join) -> Hook:
        """Build the pre-hook that appends the trunk's rows for the masks joining at `join`."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self._less.rows
            joining = 0
            for mask in rows.chunk[rows.joined :]:
                layer = self.first_layers[mask]
                if layer is None or self.joins[layer].module != join.module:
                    break
                joining += 1
            rows.joined += joining
            rows.joining = joining
            return grown(args, kwargs, join.batched, rows.images, joining) if joining else None

        return hook
