"""Many masks in one forward pass: the batch grows with depth, each mask joining where it parts from all others.

A mask whose first masked layer is l changes nothing before l, so up to there the unmasked rows (the trunk) stand for
it, and longer those of another mask that begins alike (`headprobe.backbone.growing.beginnings`). A pre-hook on the
module around the layer appends a copy of these rows; from there on every row carries its own mask. Each module runs
once; nothing is cached and nothing is run again. Which module that is, is decided by trial
(`headprobe.backbone.growing.joins`).
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.taps import RowsOfLayer, Tap, tapping
from headprobe.backbone.growing.beginnings import Beginnings, Join
from headprobe.backbone.growing.row_plan import Arguments, PassRows, RowPlan, Wave, grown
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Hook, Shortcuts, Shortcutting
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import HookCount, ablating
from headprobe.backbone.masking.donors import GROUP
from headprobe.backbone.masking.replacement import WITH_ZERO, Replacement, Resample, check_replacements
from headprobe.errors import RunError


class GrowingPass:
    """Runs a backbone on images under many variants at once: each a head mask and what fills its slots.

    Variants that are the same, as the first masks of several orders may be, run once, and those that begin alike share
    rows until they part, where trials allow it. Use it as a context manager: hooks live only inside.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        joins: For every layer where its masks join, from `find_joins`.
        keep: `[variants, layers, max heads]` bool, True = keep.
        shortcuts: What may be left out, from `find_shortcuts`; a tapped pass leaves nothing out.
        replacements: What fills the masked slots of each variant; zero if not given.
        once: Run variants that are the same once; trials run them all, for the sake of their rows.

    Raises:
        UsageError: There is not one replacement for each variant, or a layer does not allow one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layout: HeadLayout,
        joins: Sequence[Join],
        keep: Tensor,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        replacements: Sequence[Replacement] = (),
        once: bool = True,
    ) -> None:
        self.backbone, self.layout, self.joins, self.keep = backbone, layout, tuple(joins), keep
        self.replacements = tuple(replacements) or (WITH_ZERO,) * len(keep)
        check_replacements(layout, self.replacements, len(keep))
        for replacement, of_variant in zip(self.replacements, keep, strict=True):
            replacement.check(of_variant)
        self.beginnings = Beginnings(keep, self.replacements, self.joins, shortcuts.beginnings, once)
        self._masked = (~keep).any(dim=2).tolist()
        self._rows = PassRows()
        self._waves: dict[tuple[int, ...], Wave] = {}
        self._shortcutting = Shortcutting(backbone, layout, self.replacements, shortcuts, self._rows)
        self._stack = ExitStack()
        self._count = HookCount(len(layout.layers))

    def plan(self, batch_size: int, budget: int) -> RowPlan:
        """Plan the forward passes of batches of `batch_size` images within `budget` rows."""
        together = GROUP if any(isinstance(kind, Resample) for kind in self.replacements) else 1
        plan = RowPlan.build(self.beginnings.order, len(self.keep), batch_size, budget, together)
        return replace(plan, waves=tuple(tuple(self.beginnings.of_wave(wave)) for wave in plan.waves))

    def layers_run(self, wave: tuple[int, ...]) -> int:
        """Return how many layers an image's rows run through in a wave: the trunk's, and others from their joins on."""
        places = [join.place for join in self.joins]
        joined = [places[beginning.layer] for beginning in self.beginnings.of_wave(wave).values()]
        return len(places) + sum(other >= place for place in joined for other in places)

    def __enter__(self) -> "GrowingPass":
        with ExitStack() as stack:
            joins = {join.module: join for join in self.joins}.values()
            hooks = [(join.module, self._join_hook(join)) for join in joins]
            for module, hook in [*hooks, *self._shortcutting.hooks()]:
                handle = self.backbone.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(self._shortcutting.few_queries())
            # Last: hooks run in the order of their installation, and slots are filled when all rows are there.
            masking = ablating(self.backbone, self.layout, self._keep_of_layer, self._replacements_now)
            self._count = stack.enter_context(masking)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def parted(self, variant: int) -> bool:
        """Return whether a variant has parted from the trunk in the pass under way; until then that stands for it."""
        return self._stands_for(variant) > 0

    def rows_of(self, variant: int | None = None) -> RowsOfLayer:
        """Return where a tap finds the rows of a variant, or without one the rows of the trunk: the baseline."""

        def rows(_layer: int, _images: int) -> slice:
            place, images = self._stands_for(variant), self._rows.images
            return slice(place * images, (place + 1) * images)

        return rows

    def _stands_for(self, variant: int | None) -> int:
        """Return the place of the rows that stand for a variant now: its own, or those that it begins as a copy of."""
        rows = self._rows
        variants = rows.wave.variants
        place = 1 + variants.index(variant) if variant in variants else 0
        while place > rows.joined:
            place = rows.wave.copied[place - 1]
        return place

    def logits(self, images: Tensor, plan: RowPlan, taps: Sequence[Tap] = ()) -> Tensor:
        """Return logits `[1 + variants, images, classes]`, the baseline first, of at most `plan.images` images.

        The baseline is the trunk of the first wave, one and the same for every variant.

        Args:
            images: `[images, channels, height, width]`, normalised.
            plan: Which variants share a forward pass.
            taps: Observe the first wave; they get heads after their ablation.

        Raises:
            RunError: A mask did not join, a hook did not fire exactly once, or a tap missed a layer.
        """
        out: Tensor | None = None
        for wave in plan.waves:
            taps_now = taps if out is None else ()
            with tapping(self.backbone, self.layout, taps_now) if taps_now else nullcontext():
                of_wave = self._forward(images, wave, whole=bool(taps_now))  # [1 + variants of the wave, images, ...]
            if out is None:
                out = of_wave.new_empty(1 + len(self.keep), *of_wave.shape[1:])
                out[0] = of_wave[0]
            for place, variant in enumerate(wave):
                out[1 + variant] = of_wave[1 + place]
        if out is None:
            raise RunError("the row plan has no wave")
        ran = {variant for wave in plan.waves for variant in wave}
        for variant in plan.idle:
            same = self.beginnings.same[variant]
            out[1 + variant] = out[1 + same if same in ran else 0]
        return out

    def _forward(self, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        """Run one wave and return `[1 + variants of the wave, images, classes]`.

        Args:
            images: `[images, channels, height, width]`, normalised.
            wave: Numbers of the variants.
            whole: Take no shortcut.
        """
        self._rows.begin(len(images), self._wave(wave), whole)
        try:
            logits: Tensor = self.backbone(images)
            joined, left_out = self._rows.joined, self._rows.left_out
        finally:
            self._rows.begin(0, Wave(), whole=False)
        self._count.check(self.layout)
        if left_out or joined != len(wave) or len(logits) != len(images) * (1 + joined):
            raise RunError(f"{joined} of {len(wave)} masks joined the forward pass of {self.layout.model!r}")
        return logits.reshape(1 + joined, len(images), *logits.shape[1:])

    def _wave(self, variants: tuple[int, ...]) -> Wave:
        """Return what the variants of a wave keep, and where they begin.

        Made once, for choosing variants by number makes the host wait until a GPU has done all that it was given.
        Layers take slices of it.
        """
        if variants not in self._waves:
            begin = self.beginnings.of_wave(variants)
            place: dict[int | None, int] = {None: 0}
            place |= {variant: 1 + at for at, variant in enumerate(variants)}
            with torch.inference_mode(False):  # a later pass may need gradients
                masks = self.keep[list(variants)]
                keep = torch.cat([masks.new_ones(1, *self.keep.shape[1:]), masks])
            layers = tuple(begin[variant].layer for variant in variants)
            copied = tuple(place[begin[variant].copied] for variant in variants)
            self._waves[variants] = Wave(variants, keep, layers, copied)
        return self._waves[variants]

    def _keep_of_layer(self, layer: int) -> Tensor | None:
        """Return which heads of `layer` the trunk and the variants joined so far keep, `[1 + joined, max heads]`."""
        rows = self._rows
        joined = rows.wave.variants[: rows.joined]
        if any(begins <= layer for begins in rows.wave.layers[rows.joined :]):
            raise RunError(f"a mask of {self.layout.layers[layer].name!r} of {self.layout.model!r} joined too late")

        # The last rows may have been filled before they were put back: then only earlier rows can need a fill.
        filled, rows.filled = rows.filled, 0
        if not any(self._masked[variant][layer] for variant in joined[: len(joined) - filled]):
            return None
        return rows.wave.keep[: 1 + len(joined), layer]

    def _replacements_now(self) -> Sequence[Replacement]:
        """Return what fills the slots of the trunk's rows, where nothing is masked, and of each joined variant's."""
        joined = [self.replacements[variant] for variant in self._rows.wave.variants[: self._rows.joined]]
        return [joined[0] if joined else WITH_ZERO, *joined]

    def _join_hook(self, join: Join) -> Hook:
        """Build the pre-hook that appends rows for the variants joining at `join`."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self._rows
            joining = 0
            for layer in rows.wave.layers[rows.joined :]:
                if self.joins[layer].module != join.module:
                    break
                joining += 1
            copied = rows.wave.copied[rows.joined : rows.joined + joining]
            rows.joined += joining
            rows.joining = joining
            return grown(args, kwargs, join.batched, rows.images, copied) if joining else None

        return hook
