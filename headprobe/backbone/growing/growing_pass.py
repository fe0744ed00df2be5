"""Many masks in one forward pass: the batch grows with depth, each mask joining at its first masked layer.

A mask whose first masked layer is l changes nothing before l, so up to there the unmasked rows (the trunk) stand for
it. A pre-hook on the module around layer l appends one copy of the trunk's rows per joining mask; from there on every
row carries its own mask. Each module runs once; nothing is cached and nothing is run again. Which module that is, is
decided by trial (`headprobe.backbone.growing.joins`).
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.capture.taps import RowsOfLayer, Tap, tapping
from headprobe.backbone.growing.row_plan import Arguments, Batched, PassRows, RowPlan, grown
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Hook, Shortcuts, Shortcutting
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import HookCount, ablating
from headprobe.backbone.masking.donors import GROUP
from headprobe.backbone.masking.replacement import WITH_ZERO, Replacement, Resample, check_replacements
from headprobe.errors import RunError


@dataclass(frozen=True)
class Join:
    """The module at whose input a layer's masks join.

    Attributes:
        module: Its qualified name, empty for the whole model.
        place: When it is called, counted over all modules of one forward pass.
        batched: Its tensor arguments that carry the batch, with their rows per image.
        proven: Masks that join here gave the logits of plain forward passes in a trial.
    """

    module: str
    place: int
    batched: Batched
    proven: bool = False


def first_layers(keep: Tensor) -> list[int | None]:
    """Return the first layer that each mask of `[masks, layers, max heads]` masks, None for one without heads."""
    masked = (~keep).any(dim=2).cpu()  # [masks, layers]
    return [int(row.int().argmax()) if bool(row.any()) else None for row in masked]


def first_equal(keep: Tensor, replacements: Sequence[Replacement]) -> list[int]:
    """Return for each variant the first one that masks the same heads and fills them by the same replacement.

    Args:
        keep: `[variants, layers, max heads]` bool, True = keep.
        replacements: One for each; two objects are two replacements, as draws of resampling are.
    """
    seen: dict[tuple[bytes, int], int] = {}
    heads = keep.cpu().flatten(1).numpy()  # [variants, layers x max heads]
    return [
        seen.setdefault((of_variant.tobytes(), id(replacement)), number)
        for number, (of_variant, replacement) in enumerate(zip(heads, replacements, strict=True))
    ]


class GrowingPass:
    """Runs a backbone on images under many variants at once: each a head mask and what fills its slots.

    Variants that are the same, as the first masks of several orders may be, run once. Use it as a context manager:
    hooks live only inside.

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
        self.first_layers = first_layers(keep)
        self.first_equal = first_equal(keep, self.replacements) if once else list(range(len(keep)))
        self._masked = (~keep).any(dim=2).tolist()
        self._rows = PassRows()
        self._keep_of_waves: dict[tuple[int, ...], Tensor] = {}
        self._shortcutting = Shortcutting(backbone, layout, self.replacements, shortcuts, self._rows)
        self._stack = ExitStack()
        self._count = HookCount(len(layout.layers))

    @property
    def join_places(self) -> list[int | None]:
        """For every variant when its join is called in a forward pass, None for one that needs no rows of its own."""
        return [
            None if layer is None or self.first_equal[variant] != variant else self.joins[layer].place
            for variant, layer in enumerate(self.first_layers)
        ]

    @property
    def layers_run(self) -> list[int]:
        """For every variant how many layers its rows run through: those from its join on."""
        places = [join.place for join in self.joins]
        return [0 if place is None else sum(other >= place for other in places) for place in self.join_places]

    def plan(self, batch_size: int, budget: int) -> RowPlan:
        """Plan the forward passes of batches of `batch_size` images within `budget` rows."""
        together = GROUP if any(isinstance(kind, Resample) for kind in self.replacements) else 1
        return RowPlan.build(self.join_places, batch_size, budget, together)

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

    def joined(self, variant: int) -> bool:
        """Return whether rows of a variant exist in the pass under way; before they do, the trunk's stand for it."""
        return variant in self._rows.wave[: self._rows.joined]

    def rows_of(self, variant: int | None = None) -> RowsOfLayer:
        """Return where a tap finds the rows of a variant, or without one the rows of the trunk: the baseline."""

        def rows(_layer: int, _images: int) -> slice:
            now = self._rows
            copy = 1 + now.wave.index(variant) if variant is not None and self.joined(variant) else 0
            return slice(copy * now.images, (copy + 1) * now.images)

        return rows

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
                out = of_wave.new_empty(1 + len(self.first_layers), *of_wave.shape[1:])
                out[0] = of_wave[0]
            for place, variant in enumerate(wave):
                out[1 + variant] = of_wave[1 + place]
        if out is None:
            raise RunError("the row plan has no wave")
        ran = {variant for wave in plan.waves for variant in wave}
        for variant in plan.idle:
            same = self.first_equal[variant]
            out[1 + variant] = out[1 + same if same in ran else 0]
        return out

    def _forward(self, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        """Run one wave and return `[1 + variants of the wave, images, classes]`.

        Args:
            images: `[images, channels, height, width]`, normalised.
            wave: Numbers of the variants.
            whole: Take no shortcut.
        """
        self._rows.begin(len(images), wave, self._keep_of_wave(wave), whole)
        try:
            logits: Tensor = self.backbone(images)
            joined, left_out = self._rows.joined, self._rows.left_out
        finally:
            self._rows.begin(0, (), self.keep[:0], whole=False)
        self._count.check(self.layout)
        if left_out or joined != len(wave) or len(logits) != len(images) * (1 + joined):
            raise RunError(f"{joined} of {len(wave)} masks joined the forward pass of {self.layout.model!r}")
        return logits.reshape(1 + joined, len(images), *logits.shape[1:])

    def _keep_of_wave(self, wave: tuple[int, ...]) -> Tensor:
        """Return which heads the trunk and the variants of a wave keep, `[1 + variants, layers, max heads]`.

        Made once, for choosing variants by number makes the host wait until a GPU has done all that it was given.
        Layers take slices of it.
        """
        if wave not in self._keep_of_waves:
            with torch.inference_mode(False):  # a later pass may need gradients
                masks = self.keep[list(wave)]
                self._keep_of_waves[wave] = torch.cat([masks.new_ones(1, *self.keep.shape[1:]), masks])
        return self._keep_of_waves[wave]

    def _keep_of_layer(self, layer: int) -> Tensor | None:
        """Return which heads of `layer` the trunk and the variants joined so far keep, `[1 + joined, max heads]`."""
        rows = self._rows
        joined, waiting = rows.wave[: rows.joined], rows.wave[rows.joined :]
        if any(self._masked[variant][layer] for variant in waiting):
            raise RunError(f"a mask of {self.layout.layers[layer].name!r} of {self.layout.model!r} joined too late")

        # The last rows may have been filled before they were put back: then only earlier rows can need a fill.
        filled, rows.filled = rows.filled, 0
        if not any(self._masked[variant][layer] for variant in joined[: len(joined) - filled]):
            return None
        return rows.keep[: 1 + len(joined), layer]

    def _replacements_now(self) -> Sequence[Replacement]:
        """Return what fills the slots of the trunk's rows, where nothing is masked, and of each joined variant's."""
        joined = [self.replacements[variant] for variant in self._rows.wave[: self._rows.joined]]
        return [joined[0] if joined else WITH_ZERO, *joined]

    def _join_hook(self, join: Join) -> Hook:
        """Build the pre-hook that appends the trunk's rows for the variants joining at `join`."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self._rows
            joining = 0
            for variant in rows.wave[rows.joined :]:
                layer = self.first_layers[variant]
                if layer is None or self.joins[layer].module != join.module:
                    break
                joining += 1
            rows.joined += joining
            rows.joining = joining
            return grown(args, kwargs, join.batched, rows.images, joining) if joining else None

        return hook
