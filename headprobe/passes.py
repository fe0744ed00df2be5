"""The forward passes of a test: proven, planned, observed, and run again with fewer rows after an out-of-memory."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import lightning
import torch
from torch import Tensor, nn

from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.beginnings import beginning_layers
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.donors import DonorGroups, donor_groups
from headprobe.backbone.masking.replacement import WITH_ZERO, Replacement, Resample
from headprobe.backbone.outputs import Outputs
from headprobe.backbone.proofs.kept import Passes, Proven
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.sandbox import in_single, is_out_of_memory, towards_inputs
from headprobe.calibration.gradient_pass import SCORES_FOLLOW, ImageGradients, Scoring, gradient_pass
from headprobe.calibration.optimal import Head
from headprobe.calibration.trial_pass import OPTIMAL_FOLLOWS, LossOf, refuse_cut_off, trial_pass
from headprobe.describe.base import HeadStatistic
from headprobe.describe.observing import Observing
from headprobe.errors import HeadprobeWarning, RunError
from headprobe.text import counted

T = TypeVar("T")

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
        around: Opened around each forward pass, before the masks of variants.
        outputs: What a pass gives beside the logits; without it logits alone.
        proven: What was proven of this very model before; masks are proven all the same.

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
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        outputs: Outputs | None = None,
        proven: Proven | None = None,
    ) -> None:
        self.around, self._read = around, outputs
        self.used = tuple(sorted(beginning_layers(keep, replacements or [WITH_ZERO] * len(keep))))
        known = None if proven is None else proven.passes.get(self.used)
        self.known = known is not None
        joins, self._shortcuts = self.proven = _proven(backbone, layout, self.used, outputs, known)
        self.growing = GrowingPass(backbone, layout, joins, keep, self._shortcuts, replacements)
        self.plan = self.growing.plan(batch_size, budget)
        self.observing: Observing | None = None
        self._resamples = {id(kind): kind for kind in replacements if isinstance(kind, Resample)}.values()
        self.normalised, self._batch_size = normalised, batch_size

    def take(self, budget: int) -> None:
        """Plan again with another row budget."""
        self.plan = self.growing.plan(self._batch_size, budget)

    @property
    def work(self) -> float:
        """Work of one image under all variants in plain forward passes, counted in layers."""
        return sum(map(self.growing.layers_run, self.plan.waves)) / len(self.growing.layout.layers)

    @property
    def same(self) -> int:
        """Variants with the heads and the replacement of an earlier one, which run once."""
        return sum(same != variant for variant, same in enumerate(self.growing.beginnings.same))

    @property
    def resamples(self) -> bool:
        """Whether heads are filled from other images, so that a pass must hold whole groups of images."""
        return bool(self._resamples)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Let masks join and the model give all its outputs while the context is open."""
        with _reading(self.growing.backbone, self._read), self.around(), self.growing:
            yield

    def outputs(self, images: Tensor, taps_of: TapsOf = lambda _: (), groups: DonorGroups | None = None) -> Tensor:
        """Return outputs `[1 + variants, images, classes + features]` of one or more uint8 images.

        An out-of-memory halves the row budget and goes on.

        Args:
            images: `[images, channels, height, width]`.
            taps_of: Gives the taps of each pass.
            groups: Where heads are resampled, which images are each other's donors; neighbours if not given.

        Raises:
            RunError: Not even one image fits, memory ended while statistics observed, or an image has no donor.
        """
        if groups is None and self.resamples:
            groups = donor_groups(0, range(len(images)), name="a batch")
        donors = {}
        if groups is not None:
            donors = {kind: places.to(images.device) for kind, places in self.donors(groups).items()}

        def run(now: slice) -> Tensor:  # [1 + variants, images of the pass, classes + features]
            for kind, places in donors.items():
                kind.donors = places[now] - now.start  # places in the pass
            return self.growing.logits(self.normalised(images[now]), self.plan, taps_of(now))

        return torch.cat([*self._passes(images, run, groups)], dim=1)

    def change(self, keep: Tensor, replacements: Sequence[Replacement]) -> None:
        """Run other variants from now on, with first layers that the first ones have: nothing is proven again.

        They share rows up to layers with proven joins.
        """
        now = self.growing
        self.growing = GrowingPass(now.backbone, now.layout, now.joins, keep, self._shortcuts, replacements)
        self.take(self.plan.budget)

    def gradients(
        self, images: Tensor, labels: Tensor, heads: Sequence[Head], constants: Sequence[Tensor], loss_of: LossOf
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss `[heads]` of uint8 images and its gradient `[heads, dim]`, float64 on the CPU.

        An out-of-memory halves the row budget and goes on.

        Args:
            images: `[images, channels, height, width]`.
            labels: `[images]`.
            heads: The head that each variant replaces by its constant.
            constants: By layer `[heads, head_dim]`, leaves that need gradients.
            loss_of: The loss of each image from outputs and labels.

        Raises:
            UsageError: The model's forward pass cuts the gradient off.
            RunError: Not even one image fits.
        """
        dim = max(layer.shape[1] for layer in constants)
        losses = torch.zeros(len(heads), dtype=torch.float64)
        gradients = torch.zeros(len(heads), dim, dtype=torch.float64)
        with towards_inputs(self.growing.backbone):
            images, labels = images.clone(), labels.clone()  # they come from an inference mode

            def run(now: slice) -> tuple[Tensor, Tensor]:
                inputs = self.normalised(images[now])
                return trial_pass(self.growing, self.plan, inputs, labels[now], heads, constants, loss_of)

            for of_pass in self._passes(images, run, follows=OPTIMAL_FOLLOWS):
                losses, gradients = losses + of_pass[0], gradients + of_pass[1]
        return losses, gradients

    def score(
        self,
        images: Tensor,
        labels: Tensor,
        taps_of: TapsOf,
        loss_of: LossOf,
        scoring: Scoring,
        take: Callable[[list[ImageGradients], int], None],
    ) -> Tensor:
        """Return outputs `[1, images, classes + features]` of uint8 images, and hand each pass's gradients over.

        Args:
            images: `[images, channels, height, width]`.
            labels: `[images]`, negative for images without a label.
            taps_of: Gives the taps of each pass.
            loss_of: The loss of each image from outputs and labels.
            scoring: What a pass needs to know of the model.
            take: Takes a pass's gradients and its number of labelled images.

        Raises:
            UsageError: The model's forward pass cuts the gradient off.
            RunError: Not even one image fits, or memory ended while statistics observed.
        """
        found: list[Tensor] = []
        with towards_inputs(self.growing.backbone):
            images, labels = images.clone(), labels.to(images.device, copy=True)  # they come from an inference mode

            def run(now: slice) -> tuple[Tensor, list[ImageGradients], int]:
                inputs, own, taps = self.normalised(images[now]), labels[now], taps_of(now)
                outputs, gradients = gradient_pass(self.growing, self.plan, inputs, own, taps, loss_of, scoring)
                return outputs, gradients, int((own >= 0).sum())

            for outputs, gradients, labelled in self._passes(images, run, follows=SCORES_FOLLOW):
                take(gradients, labelled)
                found.append(outputs)
        return torch.cat(found, dim=1)

    def _passes(
        self, images: Tensor, run: Callable[[slice], T], groups: DonorGroups | None = None, follows: str = ""
    ) -> Iterator[T]:
        """Yield what each forward pass over some images of a batch gives; an out-of-memory halves the row budget.

        Args:
            images: `[images, ...]`.
            run: Runs a pass over these images of the batch.
            groups: Where heads are resampled, which images must share a pass.
            follows: What needs gradients, for the refusal of a model that has none.
        """
        done = 0
        while done < len(images):
            now = self._images_of_pass(done, groups)
            try:
                with self._running():
                    found = run(now)
            except RuntimeError as error:
                if follows:
                    refuse_cut_off(error, self.growing.layout.model, follows)
                self._halve_rows(error, images.device)
                continue
            yield found
            done = now.stop

    def _images_of_pass(self, first: int, groups: DonorGroups | None) -> slice:
        """Return the images of the next pass of a batch, from image `first` on."""
        if groups is None:
            return slice(first, first + self.plan.images)
        return groups.of_pass(first, self.plan.images)

    def donors(self, groups: DonorGroups) -> dict[Resample, Tensor]:
        """Return for every draw the place of each image's donor in the batch, `[images]`."""
        return {kind: groups.donors(kind.seed, kind.draw) for kind in self._resamples}

    def observe(self, statistics: Sequence[HeadStatistic], variant: int | None) -> None:
        """Show every pass to statistics from now on.

        Args:
            statistics: The statistics.
            variant: Number of the variant that is described beside the baseline; None for the baseline alone.
        """
        self.observing = Observing(statistics, self.growing, variant)

    def rehearse(self, device: torch.device, scoring: Scoring | None = None) -> None:
        """Find the rows that fit while statistics observe, on images that do not count.

        A run cannot go on after an out-of-memory in the middle of a described pass: some sums hold its images by then.

        Args:
            device: Where the model runs.
            scoring: What passes with gradients need to know of the model.
        """
        observing = self.observing
        while observing is not None:
            most = self.plan.most_images
            images = torch.zeros(most, *self.growing.layout.input_size, dtype=torch.uint8, device=device)
            for kind in self._resamples:
                kind.donors = torch.arange(most, device=device).roll(1)
            try:
                with self._running():
                    self._rehearse_pass(observing.rehearsal(most), images, scoring)
            except RuntimeError as error:
                observing.end_rehearsal()
                self._halve_rows(error, device)
                continue
            observing.end_rehearsal()
            return

    def _rehearse_pass(self, taps: Sequence[Tap], images: Tensor, scoring: Scoring | None) -> None:
        if scoring is None:
            self.growing.logits(self.normalised(images), self.plan, taps)
            return
        with towards_inputs(self.growing.backbone):
            inputs, labels = self.normalised(images.clone()), torch.zeros(len(images), dtype=torch.int64)
            gradient_pass(self.growing, self.plan, inputs, labels.to(images.device), taps, _any_loss, scoring)

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
        if rows <= self.plan.least_rows:
            images = "one image fits" if self.plan.together == 1 else f"{self.plan.most_images} images fit"
            raise RunError(
                f"not even {images} into memory; choose a smaller model or image size, or another device"
            ) from error
        if device.type == "cuda":
            torch.cuda.empty_cache()
        budget = max(rows // 2, self.plan.least_rows if self.plan.together > 1 else 1)
        self.take(budget)
        lightning.pytorch.utilities.rank_zero_warn(
            f"out of memory with {counted(rows, 'row')} in a forward pass; going on with {self.plan.most_rows} "
            f"(--model.row_budget {budget} starts there)",
            category=HeadprobeWarning,
        )


def _any_loss(outputs: Tensor, _: Tensor) -> Tensor:
    """Return a loss of images that do not count, which have no labels."""
    return outputs.double().logsumexp(dim=-1)


def _reading(backbone: nn.Module, outputs: Outputs | None) -> AbstractContextManager[None]:
    return nullcontext() if outputs is None else outputs.reading(backbone)


def _proven(
    backbone: nn.Module, layout: HeadLayout, layers: Collection[int], outputs: Outputs | None, known: Passes | None
) -> Passes:
    """Prove the masks; find the joins of masks whose first layer is one of `layers`, and the shortcuts that hold.

    Args:
        backbone: The model.
        layout: Its attention layers.
        layers: Those at which masks join.
        outputs: What a pass gives.
        known: Joins and shortcuts that were proven before; then masks are proven alone.
    """
    proven = in_single(backbone, layout.model)  # rounding in half precision would hide errors
    try:
        prove_masks(proven, layout)
        if known is not None:
            return known
        with _reading(proven, outputs):
            joins, companies, calls = find_joins(proven, layout, layers, outputs)
            shortcuts = find_shortcuts(proven, layout, joins, companies, calls)
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
