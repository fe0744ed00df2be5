"""The masks of a model and what fills them: chosen, put into the order of scores, and run in forward passes."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headprobe.backbone.heads.layout import Semantics
from headprobe.backbone.masking.donors import GROUP, DonorGroups, donors_in_words
from headprobe.backbone.masking.replacement import refuse_kinds
from headprobe.backbone.weights import ModelSource
from headprobe.calibration.constants import RESCORED_ORDERS, Calibration, read_calibration, refuse_another
from headprobe.calibration.fills import decisions_of
from headprobe.calibration.optimal import refuse_missing
from headprobe.calibration.scores import DIRECT, GRADIENTS, OF_VARIANCE
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import FITTED, OPTIMAL, RESAMPLE, ZERO, Ablation, Ablations
from headprobe.masks.orders import GrowColumn
from headprobe.masks.spec import NO_ORDERS, MaskSpec, Orders, Scores, Variant, expand_all
from headprobe.metrics.accuracy.donor_labels import CountDonorLabels
from headprobe.metrics.accuracy.scores import PairedScores
from headprobe.metrics.features import FeatureScores
from headprobe.passes import ForwardPasses, TapsOf
from headprobe.probe.scored_model import ScoredModel
from headprobe.text import Decision
from headprobe.units.coverage import Coverage
from headprobe.units.unit_sums import UnitSums

if TYPE_CHECKING:
    from headprobe.classifiers.classifying import Classifying


class MaskedModel(ScoredModel):
    """A scored model, the masks that were chosen for it, and all that is made for these masks.

    Args:
        source: As `ScoredModel` takes it.
        classifier: The same.
        classifying: The same.
        semantics: The same.
        per_class: Also count each class.
        row_budget: Rows (images x masks) that share a forward pass; None for the usual number.

    Attributes:
        variants: A row of `masks.csv` each: a mask, an ablation, a draw.
        calibration: What fills slots now.
        given_calibration: The constants of an earlier run.
        remarks: What was decided about the masks by whoever chose them, such as the study.
        passes: The forward passes, once they are planned.
        unit_sums: The sums of all units, once they have begun.
        bad_are_wrong: Whether images that cannot be read count as wrong, under every variant.
        coverage: The rows that were counted, once they are added up.
        scores: What follows for every variant from labels, once it is added up.
        feature_scores: The same of the pooled feature.
        donor_labels: Whose labels the donors of resampled heads have.
    """

    head_mask: Tensor  #: `[variants, layers, max heads]` bool, True = keep

    def __init__(
        self,
        source: ModelSource,
        classifier: str | None = None,
        classifying: "Classifying | None" = None,
        semantics: Semantics = "slot",
        per_class: bool = False,
        row_budget: int | None = None,
    ) -> None:
        super().__init__(source, classifier, classifying, semantics)
        self.per_class, self.row_budget = per_class, row_budget
        self.variants: list[Variant] = []
        self.specs: list[MaskSpec] = []
        self.ablations = Ablations(ZERO)
        self.score_heads = False
        self.remarks: list[Decision] = []
        self.calibration: Calibration | None = None
        self.given_calibration: Calibration | None = None
        self.passes: ForwardPasses | None = None
        self.unit_sums: UnitSums | None = None
        self.bad_are_wrong = False
        self.coverage: Coverage | None = None
        self.scores: PairedScores | None = None
        self.feature_scores: FeatureScores | None = None
        self.donor_labels: CountDonorLabels | None = None
        self.register_buffer("head_mask", torch.ones(0, 1, 1, dtype=torch.bool), persistent=False)

    def choose_masks(
        self,
        specs: str | Sequence[str],
        ablation: str | Sequence[str] | Ablations = ZERO,
        score_heads: bool = False,
    ) -> None:
        """Choose what to score beside the baseline, which is always scored.

        Args:
            specs: A mask spec such as `each:layer`, or several.
            ablation: What the slots of masked heads are filled with, such as `zero,mean,resample:4`; each mask is
                scored under every one.
            score_heads: Compute every importance score of every head on calibration images, for scores.csv; without
                it only where masks are ordered by one (`grow:calibration:SCORE`).

        Raises:
            UsageError: A spec is wrong or names a layer or head that the model does not have, or there is no such
                ablation.
        """
        self.ablations = Ablations(ablation)
        texts = [specs] if isinstance(specs, str) or not isinstance(specs, Iterable) else specs
        self.specs = [MaskSpec(text) for text in texts]
        self.score_heads = score_heads or any(spec.needs_scores for spec in self.specs)
        self.remarks = []
        if not self.labelled:
            self._refuse_labelled()
        self._expand(None)
        refuse_kinds(self.layout, {variant.ablation for variant in self.variants})

    def _refuse_labelled(self) -> None:
        """Refuse what only a classifier and labels could say.

        Raises:
            UsageError: A spec, an ablation or an option needs them.
        """
        other = "or another --model.classifier, got none"
        if self.per_class:
            raise UsageError(f"--model.per_class counts right answers of each class: leave it out, {other}")
        if OPTIMAL in {one.kind for one in self.ablations}:
            raise UsageError(
                "the ablation optimal lowers the loss of a classifier on labelled images: choose mean or linear, "
                f"{other}"
            )
        for spec in self.specs:
            for score in re.findall(r"grow:calibration:(\w+)", str(spec)):
                if score in (*GRADIENTS, DIRECT):
                    raise UsageError(
                        f"the score {score} needs a classifier and labels: order heads by {', '.join(OF_VARIANCE)} "
                        f"or of an earlier run, {other}"
                    )

    def _expand(self, scores: Scores | None, orders: Orders = NO_ORDERS) -> None:
        """Make the variants of the specs; without scores those that are ordered by one mask any heads."""
        heads = self.layout.heads_per_layer
        self.variants = expand_all(self.specs, heads, self.source.name, self.ablations, scores, orders)
        keep = [variant.mask.mask.keep() for variant in self.variants]  # each [layers, max heads]
        empty = torch.ones(0, len(self.layout.layers), max(self.layout.heads_per_layer), dtype=torch.bool)
        self.head_mask = torch.stack(keep) if keep else empty
        # All of these were made for other masks.
        self.passes = self.unit_sums = self.scores = self.coverage = self.donor_labels = None
        self.feature_scores = None

    def order_heads(self) -> None:
        """Make the masks that a score orders, once the scores are there.

        Raises:
            UsageError: Nothing was scored: the masks would hit any heads.
        """
        ordered = [spec for spec in self.specs if spec.needs_scores]
        if not ordered:
            return
        if self.calibration is None:
            raise UsageError(
                "masks in the order of a score need a calibration: use headprobe.ProbeTrainer, or give "
                f"use_calibration a run with scores, got {ordered[0]} without one"
            )
        self._expand(self.calibration.scores, self.calibration.orders)

    # -- what fills masked slots -----------------------------------------------------------------------------------

    def use_calibration(self, calibration: "Calibration | str | Path") -> None:
        """Fit nothing: take the constants of an earlier run. Call it after `choose_masks`.

        Args:
            calibration: A run's folder, its `calibration.safetensors`, or what `read_calibration` returned.

        Raises:
            UsageError: It is no calibration, or one of another model, other weights, another transform or resolution,
                or it lacks the constants of an ablation.
        """
        if not self.fits:
            raise UsageError(
                f"--calibration-file is for ablations that are fitted, {', '.join(sorted(FITTED))}, for scores, and "
                f"for a classifier that is fitted: leave it out, got {self.ablations.text}"
            )
        found = calibration if isinstance(calibration, Calibration) else read_calibration(Path(calibration))
        if self.classifying is not None and self.classifying.choice.fitted:
            self.classifying.take_given(found.classifier, found.about)
        refuse_another(found, self.identity(), self.fitted_kinds, self.score_heads)
        refuse_missing(found, self.variants)
        if not {"data", "images"} <= found.about.keys():
            raise UsageError(
                "the calibration does not say which images it was fitted on, which could judge themselves: fit it anew "
                f"without --calibration-file, got {', '.join(sorted(found.about))}"
            )
        self.given_calibration = found

    @property
    def fitted_kinds(self) -> list[str]:
        """Kinds of ablation among the variants that are fitted on calibration images."""
        return sorted({variant.ablation for variant in self.variants} & FITTED)

    @property
    def fits(self) -> bool:
        """Whether something is fitted or scored on calibration images."""
        fits = self.classifying is not None and self.classifying.choice.fitted
        return bool(self.fitted_kinds) or self.score_heads or fits

    @property
    def rescored_orders(self) -> list[GrowColumn]:
        """The orders of the specs whose scores are computed anew step by step."""
        return [clause for spec in self.specs for clause in spec.rescored]

    @property
    def gone_by(self) -> str:
        """The kind of ablation that fills the heads which an order has masked while others are scored anew."""
        from headprobe.calibration.rescoring import rescoring_kind  # here: few runs need it

        given = {} if self.given_calibration is None else self.given_calibration.about.get(RESCORED_ORDERS, {})
        return str(given.get("ablation", rescoring_kind(self.ablations)))

    @property
    def resampled(self) -> Ablation | None:
        """The ablation that takes heads of other images, if a variant is one of it."""
        used = any(variant.ablation == RESAMPLE for variant in self.variants)
        return next(one for one in self.ablations if one.kind == RESAMPLE) if used else None

    @property
    def rows_together(self) -> int:
        """Neighbouring rows of a unit that must be in one batch."""
        return 1 if self.resampled is None else GROUP

    # -- forward passes --------------------------------------------------------------------------------------------

    def masked_logits(self, images: Tensor) -> Tensor:
        """Return logits `[1 + variants, images, classes]` of uint8 images `[images, channels, height, width]`.

        An out-of-memory halves the row budget and goes on. Statistics do not observe.
        """
        return self.logits_of(self.masked_outputs(images))

    def masked_outputs(
        self, images: Tensor, taps_of: TapsOf = lambda _: (), groups: DonorGroups | None = None
    ) -> Tensor:
        """Return outputs `[1 + variants, images, classes + features]` of uint8 images.

        Args:
            images: `[images, channels, height, width]`.
            taps_of: Gives the taps of each pass; without it nothing observes.
            groups: Where heads are resampled, which images are each other's donors.
        """
        if self.passes is None:
            raise RunError("plan_passes must be called before masked_logits; trainer.test does it")
        if not len(images):
            width = self.outputs.classes + self.outputs.features
            return images.new_empty(1 + len(self.passes.growing.keep), 0, width, dtype=torch.float32)
        return self.passes.outputs(images, taps_of, groups)

    # -- what a run says -------------------------------------------------------------------------------------------

    def decisions(self) -> list[Decision]:
        """Return what was decided about the model and its masks where the user did not."""
        found = [*super().decisions(), *self.remarks]
        if not self.labelled:
            text = f"none: masks are judged by how far the pooled feature moves ({self.outputs.features} numbers); "
            found.append(Decision("classifier", f"{text}no label is read (--model.classifier)", shown=True))
        if self.resampled is not None:
            found.append(donors_in_words(None if self.donor_labels is None else self.donor_labels.share))
        if self.calibration is not None:
            found += decisions_of(self.calibration, self.fitted_kinds)
        if self.rescored_orders:
            text = (
                f"scores are computed anew after each tenth of the heads, of the model without these by {self.gone_by}"
            )
            one = "; one order for all ablations" * (len(self.ablations) > 1)
            found.append(Decision("rescored", text + one, shown=True))
        return found
