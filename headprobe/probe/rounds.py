"""The stages that score heads and seek constants round by round, and the order of all that fit what masks need.

A round is a go over the calibration images, as any stage is. What one has found decides what the next one measures.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from torch import Tensor

from headprobe.backbone.masking.replacement import Constant
from headprobe.calibration.constants import RESCORED_ORDERS, from_bytes, to_bytes
from headprobe.calibration.optimal import Round, Search, TrialSums, heads_to_optimise
from headprobe.errors import UsageError
from headprobe.masks.ablations import OPTIMAL
from headprobe.passes import ForwardPasses
from headprobe.probe.calibrating import Calibrating, no_direct
from headprobe.probe.masked_model import MaskedModel
from headprobe.probe.stages import Scored, Stage
from headprobe.processes import from_first
from headprobe.units.coverage import COVERAGE, SCORES, check_coverage
from headprobe.units.unit_sums import OpenUnit, UnitSums

if TYPE_CHECKING:
    from headprobe.calibration.rescoring import Rescoring


def fitting_of(model: MaskedModel) -> Iterator[Stage]:
    """Give the stages that fit constants and score heads; go over each before the next one is asked for."""
    yield Calibrating(model)
    yield from rescoring_rounds(model)
    yield from search_rounds(model)


def rescoring_rounds(model: MaskedModel) -> Iterator["RescoringRound"]:
    """Score heads anew after each step of the orders that want it, once the first scores are there."""
    if model.calibration is None or not model.rescored_orders:
        return
    from headprobe.calibration.rescoring import Rescoring, distinct  # here: few runs need it

    orders = distinct(model.rescored_orders, sum(model.layout.heads_per_layer))
    rescoring = Rescoring(orders, model.layout, model.calibration, model.gone_by)
    while rescoring.now is not None:
        yield RescoringRound(model, rescoring)
    model.calibration = rescoring.found()


class RescoringRound(Calibrating):
    """A round that scores the heads that an order has left, in the model without the others.

    Args:
        model: The whole model.
        rescoring: The orders; its round `now` is this one.
    """

    name = RESCORED_ORDERS
    goes_backward = True

    def __init__(self, model: MaskedModel, rescoring: "Rescoring") -> None:
        super().__init__(model, rescoring.statistics(model.backbone, no_direct(model)))
        self.rescoring = rescoring

    def begin(self) -> None:
        """Keep the calibration, which has the constants of the masked heads."""
        return

    def model_identity(self) -> dict[str, Any]:
        """Return it as the calibration has it: a digest of all weights for each round would take long."""
        return dict(self.rescoring.calibration.about["model"])

    def identity(self) -> dict[str, Any]:
        """Return the masked heads, and what fills them."""
        return {RESCORED_ORDERS: self.rescoring.identity()}

    def plan(self, batch_size: int, fitted: int | None) -> ForwardPasses:
        """Plan passes of the model without the masked heads; in later rounds nothing is proven again."""
        self.rescoring.begin_round()
        around = partial(self.rescoring.ablated, self.model.backbone)
        passes = self.model.passes
        if self.rescoring.done and passes is not None:
            passes.around = around
            passes.take(min(*self.given_rows(fitted), self.usual_rows, passes.plan.budget))
            return passes
        return self.proven(batch_size, self.model.head_mask[:0], self.budget(fitted), around=around)

    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Take the scores, on the first process; all go on with the order that follows from them."""
        scores = from_first(trainer, lambda: self._scored_anew(data, sums))
        self.rescoring.take(np.frombuffer(scores, dtype="<f8"))

    def _scored_anew(self, data: Any, sums: UnitSums) -> bytes:
        check_coverage(sums.whole()[COVERAGE], data)
        return self.rescoring.scores(self.statistics).astype("<f8").tobytes()


# -- rounds of the search ----------------------------------------------------------------------------------------------


def search_rounds(model: MaskedModel) -> Iterator["SearchRound"]:
    """Seek the optimal constants that the variants need, once the means are there.

    Raises:
        UsageError: No image has a label.
    """
    model.order_heads()
    if model.calibration is None or OPTIMAL not in model.fitted_kinds:
        return
    if model.calibration.about.get("images_labelled") == 0:
        raise UsageError(
            "the ablation optimal lowers the loss on calibration images, and none of them has a label: choose "
            "another --data.calibration or ablation, got labels of -1"
        )
    search = Search(heads_to_optimise(model.variants), model.calibration)
    if not search.now.heads:
        model.calibration = search.found()
    while search.now.heads:
        yield SearchRound(model, search)


class SearchRound(Stage):
    """A round that measures the loss of every head's trial constant, and its gradient.

    Args:
        model: The model.
        search: The search; its round `now` is this one.
    """

    name = OPTIMAL
    goes_backward = True

    def __init__(self, model: MaskedModel, search: Search) -> None:
        super().__init__(model)
        self.search = search
        self._leaves: tuple[Tensor, ...] = ()  # the constants by layer `[heads, head_dim]`, which need gradients

    def model_identity(self) -> dict[str, Any]:
        """Return it as the calibration has it: a digest of all weights for each round would take long."""
        return dict(self.search.calibration.about["model"])

    def identity(self) -> dict[str, Any]:
        """Return the heads and their constants."""
        return {OPTIMAL: self.search.now.identity()}

    def sums(self, units: int, rows: Sequence[Sequence[int]] | None, classes: int) -> UnitSums:
        """Make the empty sums of losses and gradients."""
        trials, dim = len(self.search.now.heads), self.search.dim
        return UnitSums(units, lambda: TrialSums(trials, dim), rows)

    def plan(self, batch_size: int, fitted: int | None) -> ForwardPasses:
        """Plan the passes: a variant per head, in which it alone is replaced by its trial constant."""
        layout, search = self.model.layout, self.search
        with torch.inference_mode(False):  # the outer one would make tensors that no gradient can pass
            keep = search.now.keep(layout.heads_per_layer).to(self.model.device)
            constants = search.now.constants(layout.heads_per_layer, [layer.head_dim for layer in layout.layers])
            self._leaves = tuple(layer.to(self.model.device).requires_grad_() for layer in constants)
        fills = [Constant(OPTIMAL, self._leaves)] * len(keep)
        passes = self.model.passes
        if search.done and passes is not None:
            passes.change(keep, fills)
            if fitted is not None and fitted < passes.plan.budget:
                passes.take(fitted)
            return passes
        return self.proven(batch_size, keep, min([*self.given_rows(fitted), self.usual_rows]), fills)

    def step(self, batch: Any, opened: OpenUnit, name: str) -> Scored:
        """Add the losses and gradients of a batch's images with a label."""
        known = batch.labels >= 0
        images, labels = batch.images[known.to(batch.images.device)], batch.labels[known]
        opened.scores.update(*self.trial_losses(images, labels), len(labels))
        return Scored.nothing(batch)

    def trial_losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed NLL `[heads]` of the trials on uint8 images, and its gradient `[heads, dim]`.

        Raises:
            UsageError: The model's forward pass cuts gradients off.
            RunError: The passes are not planned, or not even one image fits into memory.
        """
        return self.passes.gradients(images, labels, self.search.now.heads, self._leaves, self.model.nll)

    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Take the sums, on the first process; all go on with the constants that follow from them."""
        search = self.search
        search.now = Round.from_bytes(from_first(trainer, lambda: self._next_round(data, sums)))
        search.done += 1
        if not search.now.heads:
            self.model.calibration = from_bytes(from_first(trainer, lambda: to_bytes(search.found())))

    def _next_round(self, data: Any, sums: UnitSums) -> bytes:
        whole = sums.whole()
        check_coverage(whole[COVERAGE], data)
        return self.search.take(whole[SCORES]).to_bytes()
