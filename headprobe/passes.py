"""The forward passes of a test: proven, planned, observed, and run again with fewer rows after an out-of-memory."""

from collections.abc import Callable, Collection, Sequence

import lightning
import torch
from torch import Tensor, nn

from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.growing_pass import GrowingPass, Join, first_layers
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.shortcuts import Shortcuts
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.replacement import Replacement
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.sandbox import in_single, is_out_of_memory
from headprobe.describe.base import HeadStatistic
from headprobe.describe.observing import Observing
from headprobe.errors import HeadprobeWarning, RunError
from headprobe.text import counted

TapsOf = Callable[[slice], Sequence[Tap]]
"""Returns the taps of the pass over these images of a batch."""


class ForwardPasses:
    """Runs a backbone on images under all variants, as many rows at a time as fit.

    Args:
        backbone: The model.
        layout: Its attention layers.
        keep: `[variants, layers, max heads]` bool, True = keep.
        normalised: Turns uint8 images into the input of the backbone.
        batch_size: Images of a batch.
        budget: Rows that may share a forward pass.
        replacements: What fills the masked slots of each variant; zero if not given.

    Raises:
        UsageError: A proof fails; the model must not be run under masks.
        RunError: Not even the proofs' few rows fit into memory.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layout: HeadLayout,
        keep: Tensor,
        normalised: Callable[[Tensor], Tensor],
        batch_size: int,
        budget: int,
        replacements: Sequence[Replacement] = (),
    ) -> None:
        used = {layer for layer in first_layers(keep) if layer is not None}
        joins, shortcuts = _proven(backbone, layout, used)
        self.growing = GrowingPass(backbone, layout, joins, keep, shortcuts, replacements)
        self.plan = self.growing.plan(batch_size, budget)
        self.observing: Observing | None = None
        self.normalised, self._batch_size = normalised, batch_size

    def take(self, budget: int) -> None:
        """Plan again with another row budget."""
        self.plan = self.growing.plan(self._batch_size, budget)

    @property
    def work(self) -> float:
        """Work of one image under all variants in plain forward passes, counted in layers."""
        return len(self.plan.waves) + sum(self.growing.layers_run) / len(self.growing.layout.layers)

    def logits(self, images: Tensor, taps_of: TapsOf = lambda _: ()) -> Tensor:
        """Return logits `[1 + variants, images, classes]` of one or more uint8 images.

        An out-of-memory halves the row budget and goes on.

        Raises:
            RunError: Not even one image fits, or memory ended while statistics observed.
        """
        found: list[Tensor] = []  # each [1 + variants, images of the pass, classes]
        done = 0
        while done < len(images):
            now = slice(done, done + self.plan.images)
            try:
                with self.growing:
                    found.append(self.growing.logits(self.normalised(images[now]), self.plan, taps_of(now)))
            except RuntimeError as error:
                self._halve_rows(error, images.device)
                continue
            done = now.stop
        return torch.cat(found, dim=1)

    def observe(self, statistics: Sequence[HeadStatistic], variant: int | None) -> None:
        """Show every pass to statistics from now on.

        Args:
            statistics: The statistics.
            variant: Number of the variant that is described beside the baseline; None for the baseline alone.
        """
        self.observing = Observing(statistics, self.growing, variant)

    def rehearse(self, device: torch.device) -> None:
        """Find the rows that fit while statistics observe, on images that do not count.

        A run cannot go on after an out-of-memory in the middle of a described pass: some sums hold its images by then.
        """
        observing = self.observing
        while observing is not None:
            images = torch.zeros(self.plan.images, *self.growing.layout.input_size, dtype=torch.uint8, device=device)
            try:
                with self.growing:
                    taps = observing.rehearsal(len(images))
                    self.growing.logits(self.normalised(images), self.plan, taps)
            except RuntimeError as error:
                observing.end_rehearsal()
                self._halve_rows(error, device)
                continue
            observing.end_rehearsal()
            return

    def _halve_rows(self, error: RuntimeError, device: torch.device) -> None:
        """Plan with half the rows after an out-of-memory; raise any other error again."""
        if not is_out_of_memory(error):
            raise error
        rows = self.plan.most_rows
        if self.observing is not None and self.observing.began:
            # Some sums hold this pass already: running it again would count its images twice.
            raise RunError(
                f"out of memory with {counted(rows, 'row')} in a forward pass while heads were described; run the same "
                f"command again with --model.row_budget {max(1, rows // 2)}"
            ) from error
        if rows <= 1 + bool(self.growing.first_layers):
            raise RunError(
                "not even one image fits into memory; choose a smaller model or image size, or another device"
            ) from error
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.take(rows // 2)
        lightning.pytorch.utilities.rank_zero_warn(
            f"out of memory with {counted(rows, 'row')} in a forward pass; going on with {self.plan.most_rows} "
            f"(--model.row_budget {rows // 2} starts there)",
            category=HeadprobeWarning,
        )


def _proven(backbone: nn.Module, layout: HeadLayout, layers: Collection[int]) -> tuple[tuple[Join, ...], Shortcuts]:
    """Prove the masks; find the joins of masks whose first layer is one of `layers`, and the shortcuts that hold."""
    proven = in_single(backbone, layout.model)  # rounding in half precision would hide errors
    try:
        prove_masks(proven, layout)
        joins, companies = find_joins(proven, layout, layers)
        shortcuts = find_shortcuts(proven, layout, joins, companies)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "the model does not fit into memory; choose a smaller model or image size, or another device"
        ) from error
    unproven = [layout.layers[layer].name for layer in layers if not joins[layer].proven]
    if unproven:
        raise RunError(f"masks of {unproven[0]!r} of {layout.model!r} were not tried in the growing pass")
    return joins, shortcuts
