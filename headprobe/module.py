"""`HeadProbe`: a timm model with chosen head masks, scored by Lightning under all of them at once."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.row_plan import ROW_BUDGET_CPU, ROW_BUDGET_GPU, RowPlan
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.heads.refusals import refuse_gradients, refuse_unusable
from headprobe.backbone.masking.donors import GROUP, DonorGroups, donor_groups
from headprobe.backbone.masking.replacement import Constant, Replacement, refuse_kinds
from headprobe.backbone.outputs import Outputs, outputs_of
from headprobe.backbone.preparation import normalised
from headprobe.backbone.proofs.kept import Proven
from headprobe.backbone.weights import ModelSource, create_classifier, weights_digest
from headprobe.calibration.constants import (
    CLASSIFIER,
    RESCORED_ORDERS,
    Calibration,
    check_finite,
    from_bytes,
    read_calibration,
    refuse_another,
    to_bytes,
)
from headprobe.calibration.fills import few_in_words, replacements_of
from headprobe.calibration.gradient_pass import ImageGradients
from headprobe.calibration.optimal import (
    Round,
    Search,
    TrialSums,
    heads_to_optimise,
    in_words,
    refuse_missing,
)
from headprobe.calibration.scores import DIRECT, GRADIENTS, OF_VARIANCE, ScoreStatistic
from headprobe.calibration.slots import SlotStatistic
from headprobe.classifiers import choice
from headprobe.describe.base import HeadStatistic, Judged, Subject
from headprobe.errors import HeadprobeWarning, RunError, UsageError
from headprobe.masks.ablations import FITTED, LINEAR, OPTIMAL, RESAMPLE, ZERO, Ablation, Ablations
from headprobe.masks.orders import GrowColumn
from headprobe.masks.spec import NO_ORDERS, MaskSpec, Orders, Scores, Variant, expand_all
from headprobe.metrics.accuracy.donor_labels import CountDonorLabels
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy, image_groups
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores, why_no_e_value
from headprobe.metrics.features import CountFeatures, FeatureScores, FeatureSums, ImageCount, feature_scores
from headprobe.passes import ForwardPasses, TapsOf
from headprobe.processes import from_first
from headprobe.text import Decision, counted
from headprobe.units.coverage import (
    COVERAGE,
    SCORES,
    Coverage,
    bad_calibration_message,
    check_coverage,
    images_read,
)
from headprobe.units.store import FinishedUnits
from headprobe.units.tree import NamedSums, read_sums, write_sums
from headprobe.units.unit_sums import OpenUnit, UnitSums, gather_nodes

if TYPE_CHECKING:
    from headprobe.calibration.rescoring import Rescoring
    from headprobe.classifiers.classifying import Classifying

ROWS_OF_GRADIENTS = 4
"""A pass with gradients has so many times fewer rows: it keeps what every layer computed until it goes back."""

MOVED = f"{CountFeatures.name}/sums"
"""Name of the sums of features."""

MANY_OF_ONE_CLASS = 0.2
"""Share of donors of their image's own class above which a run says so before its table."""


@dataclass
class StepResult:
    """What a test step measured, for callbacks.

    Attributes:
        logits: `[1 + variants, images, classes]`, the baseline first.
        labels: `[images]`, in the numbering of the logits' classes.
        unit: The unit that the images belong to.
        rows: `[images]`, their rows inside the unit.
        last: Whether this ends the unit.
        features: `[1 + variants, images, features]`, the pooled feature; no numbers where it cannot be read.
    """

    logits: Tensor
    labels: Tensor
    unit: int
    rows: Tensor
    last: bool
    features: Tensor


class AfterBatch(lightning.Callback):
    """A callback that looks at every scored batch of a `HeadProbe`; it ignores tests of other modules.

    Attributes:
        calibrates: Whether it also looks at the batches that calibrate, in Lightning's validate stage.
    """

    calibrates = False

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Call `after_batch` with the scored batch."""
        if isinstance(pl_module, HeadProbe) and isinstance(outputs, StepResult):
            self.after_batch(trainer, pl_module, outputs, batch)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Call `after_batch` with a batch that calibrates, if the callback looks at these too."""
        if self.calibrates:
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def after_batch(self, trainer: lightning.Trainer, probe: "HeadProbe", step: StepResult, batch: Any) -> None:
        """Look at a scored batch.

        Args:
            trainer: Runs the test.
            probe: The model with its masks.
            step: What was measured.
            batch: The `ImageBatch` that was scored.
        """
        raise NotImplementedError


def data_of(trainer: lightning.Trainer) -> Any:
    """Return the data module of a test.

    Raises:
        UsageError: There is none.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning where there is one
    if data is None:
        raise UsageError("a test needs a data module: test(probe, datamodule=headprobe.ImageNetDataModule())")
    return data


class HeadProbe(lightning.LightningModule):
    """Scores a timm model with and without chosen attention heads, on the same images, in one pass.

    `choose_masks` chooses the masks, then `ProbeTrainer.test` does the rest: `begin_units` makes room for sums,
    `plan_passes` proves the masks and plans the forward passes, `masked_logits` runs them. `statistics` describe the
    heads of the baseline meanwhile; with a single variant, those of the masked model too.

    Args:
        name: timm's name of the model, hf-hub:OWNER/MODEL, local-dir:FOLDER, or a bundled one: digits_vit, digits_swin.
        weights: Local safetensors file; without it timm's pretrained weights are used.
        pretrained: False starts from random weights.
        num_classes: Classes of the classifier; without it the weights' own number.
        options: Further arguments of timm.create_model, such as {img_size: 384} or pretrained_cfg_overlay.
        semantics: What masking takes away where a head's slot holds more than what it attended to: the whole slot, or
            the attention alone (docs/heads.md). The same thing in most models.
        row_budget: Rows (images x masks) that share a forward pass; 48 on CPUs and 1024 on GPUs if not given.
        per_class: Also count each class, for classes.csv.
        train_size: Prepare images as in training where timm tests the model at another size and crop.
        classifier: What classifies: the model's own classifier if not given; `class-mean` or `knn`, fitted on
            calibration images; FILE.safetensors with a linear head; `none` scores the feature alone, without labels.

    Attributes:
        class_names: Names of the model's classes in its classifier's order, where its configuration has them.
        remarks: What was decided about the masks by whoever chose them, such as the study.
        known: What earlier runs proved of this very model, where somebody kept it.
    """

    head_mask: Tensor  #: `[variants, layers, max heads]` bool, True = keep

    def __init__(
        self,
        name: str = "digits_vit",
        weights: str | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
        options: dict[str, Any] | None = None,
        semantics: Semantics = "slot",
        row_budget: int | None = None,
        per_class: bool = False,
        train_size: bool = False,
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.classifying = None if classifier in (None, choice.NONE) else _classifying(classifier, num_classes)
        if row_budget is not None and row_budget < 1:
            raise UsageError(f"model.row_budget must be 1 or more, got {row_budget}")
        self.save_hyperparameters()
        own_classes = num_classes if self.classifying is None or not num_classes else None
        self.source = ModelSource(name, weights, pretrained, own_classes, options or {}, train_size)
        self.classifier = classifier
        built = create_classifier(self.source, own=classifier is None)
        self.backbone, self.data_config, self._own_classes = built[:3]
        self._options, self._own_names, self._decisions = built[3:]
        self.semantics, self.per_class, self.row_budget = semantics, per_class, row_budget
        self.variants: list[Variant] = []
        self.specs: list[MaskSpec] = []
        self.ablations = Ablations(ZERO)
        self.score_heads = False
        self.remarks: list[Decision] = []
        self.calibration: Calibration | None = None  # what fills slots now
        self.given_calibration: Calibration | None = None
        self.calibrating = False
        self.rescoring: Rescoring | None = None  # under way while heads are scored anew, round by round
        self.search: Search | None = None  # under way while optimal constants are sought, round by round
        self.donor_labels: CountDonorLabels | None = None
        self.valid_classes: Tensor | None = None
        self.statistics: tuple[HeadStatistic, ...] = ()
        self.passes: ForwardPasses | None = None
        self.unit_sums: UnitSums | None = None
        self.scores: PairedScores | None = None
        self.feature_scores: FeatureScores | None = None
        self._features: CountFeatures | None = None
        self.coverage: Coverage | None = None
        self._finished: FinishedUnits | None = None
        self._layout: HeadLayout | None = None
        self._outputs: Outputs | None = None
        self.known: Proven | None = None
        self._bad_are_wrong = False
        self._unit_rows: Sequence[Sequence[int]] | None = None
        self.register_buffer("head_mask", torch.ones(0, 1, 1, dtype=torch.bool), persistent=False)

    # -- masks -----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> HeadLayout:
        """The backbone's attention layers, found on first use.

        Raises:
            UsageError: The model's heads cannot be found.
        """
        if self._layout is None:
            refuse_unusable(self.backbone, self.source.name)
            layout = find_heads(self.backbone, self.data_config["input_size"], self.source.name, self.semantics)
            refuse_gradients(layout.gradients, self.source.name)
            self._layout = layout
        return self._layout

    @property
    def num_classes(self) -> int:
        """Classes that are scored; 0 without a classifier, or before it has seen the data that it is fitted on."""
        if self.classifying is not None:
            return self.classifying.classes
        return self._own_classes if self.labelled else 0

    @property
    def labelled(self) -> bool:
        """Whether images are judged by their labels; without a classifier by their features alone."""
        return self.classifier != choice.NONE

    @property
    def class_names(self) -> list[str] | None:
        """Names of these classes; None where the model's configuration, or the classifier, has none."""
        return self._own_names if self.classifying is None else self.classifying.class_names

    @property
    def takes_classes(self) -> bool:
        """Whether the classes are those of the data: a classifier is fitted on them."""
        return self.classifying is not None and self.classifying.fits

    @property
    def classes_asked(self) -> int | None:
        """The number of classes that the user gave, for data that do not say theirs."""
        return None if self.classifying is None else self.classifying.asked

    def take_classes(self, classes: int, class_names: Sequence[str] | None) -> None:
        """Take the classes of the data that the classifier is fitted on."""
        if self.classifying is not None:
            self.classifying.take_classes(classes, class_names)

    @property
    def outputs(self) -> Outputs:
        """What a forward pass gives: logits of the model's own classifier and its pooled feature, found on first use.

        Raises:
            UsageError: It gives nothing that can be scored.
        """
        if self._outputs is None:
            size = self.layout.input_size
            known = None if self.known is None else self.known.outputs
            self._outputs = known or outputs_of(self.backbone, size, embedding=not self._own_classes)
        if self.classifier is not None and not self._outputs.features:
            raise UsageError(
                f"--model.classifier {self.classifier} reads the pooled feature of model {self.source.name!r}, which "
                f"cannot be read: {self._outputs.reason}; choose another model, or one with a classifier of its own"
            )
        if self.classifying is not None:
            self.classifying.check_width(self._outputs.features, self.source.name)
        return self._outputs

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
        self.feature_scores = self._features = None

    @property
    def variants_now(self) -> list[Variant]:
        """The variants of this stage: none while the unmasked model calibrates."""
        return [] if self.calibrating else self.variants

    @property
    def described_variant(self) -> int | None:
        """Number of the variant whose model is described beside the baseline: the only one, if it masks any head."""
        return 0 if len(self.variants_now) == 1 and self.variants[0].mask.mask.count else None

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model, as plain data: a part of a run's identity."""
        return {**self.identity_as_built(), "features": self.outputs.features}

    def identity_as_built(self) -> dict[str, Any]:
        """Return what identifies the model before it is known how its outputs are read."""
        return {
            "name": self.source.name,
            "title": self.title,
            "architecture": self.backbone.pretrained_cfg.get("architecture"),  # type: ignore[union-attr,operator]  # dict
            "weights": self.source.weights,
            "pretrained": self.source.pretrained,
            "weights_sha256": weights_digest(self.backbone),
            "options": self._options,
            "num_classes": self.num_classes,
            "classifier": self.classifier if self.classifying is None else self.classifying.identity(),
            "data_config": {name: self.data_config[name] for name in sorted(self.data_config)},
            "heads_per_layer": list(self.layout.heads_per_layer),
            "layers": [layer.name for layer in self.layout.layers],
            "semantics": self.semantics,
            "inner_norm": any(layer.inner_norm for layer in self.layout.layers),
        }

    def decisions(self) -> list[Decision]:
        """Return what was decided about the model where the user did not."""
        found = [
            *self._decisions,
            *(() if self.classifying is None else self.classifying.decisions(self._own_classes)),
            _normalisation(self.source, self.data_config),
            *_of_layers(self.layout),
            *self.remarks,
        ]
        if not self.labelled:
            text = f"none: masks are judged by how far the pooled feature moves ({self.outputs.features} numbers); "
            found.append(Decision("classifier", f"{text}no label is read (--model.classifier)", shown=True))
        if self.resampled is not None:
            found.append(self._donors_in_words())
        if self.calibration is not None:
            found += _of_calibration(self.calibration, self.fitted_kinds)
        if self.calibration is not None and OPTIMAL in self.calibration.about:
            found.append(Decision("optimal", in_words(self.calibration.about[OPTIMAL]), shown=True))
        if self.rescored_orders:
            text = (
                f"scores are computed anew after each tenth of the heads, of the model without these by {self.gone_by}"
            )
            one = "; one order for all ablations" * (len(self.ablations) > 1)
            found.append(Decision("rescored", text + one, shown=True))
        if self.known is not None and self.passes is not None:
            what = "joins, shortcuts and outputs" if self.passes.known and self.passes.used else "outputs"
            text = f"{what} are those that an earlier run proved of this very model, masks are proven anew"
            found.append(Decision("proofs", f"{text} ({self.known.file}; --resume never proves all)"))
        if self.why_no_e_value:
            found.append(Decision("log_e_value", f"not given: {self.why_no_e_value} (docs/results.md)"))
        return found

    @property
    def title(self) -> str:
        """The model's name in tables and figures, which says if its weights are random."""
        return f"{self.source.name} with random weights" if self.source.random else self.source.name

    @property
    def why_no_e_value(self) -> str:
        """Why `log_e_value` of a test that is done is left empty, by the order of labels; nothing where it is given."""
        if self.coverage is None or self.scores is None or not self.variants_now:
            return ""
        return why_no_e_value(self.coverage.label_sums, complete=True)

    def _donors_in_words(self) -> Decision:
        """Return where resampled heads come from and, once it is counted, how many donors take little away."""
        text = f"heads of another image among {GROUP} neighbouring rows of a unit"
        share = None if self.donor_labels is None else self.donor_labels.share
        if share is None:
            return Decision("resample", text)
        many = share > MANY_OF_ONE_CLASS
        text += f"; donors are of the image's own class in {share:.0%} of rows"
        if many:
            text += ", as in data sorted by class: drops are understated"
        return Decision("resample", text, shown=many)

    # -- test ------------------------------------------------------------------------------------------------------

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
    def resampled(self) -> Ablation | None:
        """The ablation that takes heads of other images, if a variant is one of it."""
        used = any(variant.ablation == RESAMPLE for variant in self.variants)
        return next(one for one in self.ablations if one.kind == RESAMPLE) if used else None

    @property
    def rows_together(self) -> int:
        """Neighbouring rows of a unit that must be in one batch."""
        return 1 if self.resampled is None else GROUP

    def begin_stage(self, stage: str) -> None:
        """Begin to calibrate (`validate`) or to judge (`test`).

        A trainer that calibrates calls it before Lightning does anything: callbacks find a run's key before `setup`.
        """
        calibrated, self.calibrating = self.calibrating, stage == "validate"
        if not self.calibrating:
            self.search = self.rescoring = None  # one that broke off
        if self.search is not None or self._fitting is not None:
            self.statistics = ()
        elif self.rescoring is not None:
            self.statistics = self.rescoring.statistics(self.backbone, self._no_direct)
        elif self.calibrating:
            self.calibration, self.statistics = None, self._calibrating_statistics()
        elif calibrated:
            self.statistics = ()
        if not self.calibrating:
            self._order_heads()

    def _order_heads(self) -> None:
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

    @property
    def round_name(self) -> str:
        """What a round of this stage is for, as units are kept: `rescored` or `optimal`; empty where there is none."""
        return RESCORED_ORDERS if self.rescoring is not None else OPTIMAL if self.search is not None else ""

    @property
    def rescored_orders(self) -> list[GrowColumn]:
        """The orders of the specs whose scores are computed anew step by step."""
        return [clause for spec in self.specs for clause in spec.rescored]

    def begin_rescoring(self) -> None:
        """Begin to score heads anew after each step of the orders that want it, once the first scores are there."""
        if self.calibration is None or not self.rescored_orders:
            return
        from headprobe.calibration.rescoring import Rescoring, distinct  # here: few runs need it

        orders = distinct(self.rescored_orders, sum(self.layout.heads_per_layer))
        rescoring = Rescoring(orders, self.layout, self.calibration, self.gone_by)
        if rescoring.now is None:
            self.calibration = rescoring.found()
        else:
            self.rescoring = rescoring

    @property
    def gone_by(self) -> str:
        """The kind of ablation that fills the heads which an order has masked while others are scored anew."""
        from headprobe.calibration.rescoring import rescoring_kind

        given = {} if self.given_calibration is None else self.given_calibration.about.get(RESCORED_ORDERS, {})
        return str(given.get("ablation", rescoring_kind(self.ablations)))

    @property
    def _fitting(self) -> "Classifying | None":
        """The classifier, while it is being fitted."""
        return self.classifying if self.classifying is not None and self.classifying.fitting else None

    def sums_of_classifier(self) -> dict[str, Any]:
        """Return what changes the sums of the classifier that is being fitted, for a round's identity."""
        fitting = self._fitting
        return {} if fitting is None else {CLASSIFIER: fitting.fit(self.outputs.features).identity()}

    def _calibrating_statistics(self) -> tuple[HeadStatistic, ...]:
        """Return what a calibration sums: scores need the covariances that linear ablation needs."""
        if not self.score_heads:
            return (SlotStatistic(self.fitted_kinds),)
        scores = ScoreStatistic(self.backbone, labelled=self.labelled, no_direct=self._no_direct)
        return SlotStatistic({*self.fitted_kinds, LINEAR}), scores

    @property
    def _no_direct(self) -> str:
        """Why logits are no sums over heads: another classifier than the model's own gives them."""
        return "" if self.classifying is None else f"its logits come from {self.classifying.choice.text}"

    def setup(self, stage: str) -> None:
        """Begin the units of the data module."""
        if stage in ("test", "validate"):
            data = data_of(self.trainer)
            self.begin_stage(stage)
            if not self.calibrating and self.rows_together > getattr(data, "rows_together", 1):
                raise UsageError(
                    "the ablation resample needs batches of whole groups of rows: use headprobe.ProbeTrainer with "
                    f"headprobe.ImageNetDataModule, got {type(self.trainer).__name__} and {type(data).__name__}"
                )
            if self._fitting is not None:
                self._fitting.fit(self.outputs.features).refuse_too_many(data.expected_images)
            self.begin_units(data.units, data.valid_classes, data.unit_rows, data.on_bad_image == "wrong")

    def continue_after(self, finished: FinishedUnits | None) -> None:
        """Continue a test that finished some units before.

        Args:
            finished: Its finished units; their smallest row budget is known to fit into memory. None starts a new test.
        """
        self._finished = finished

    def on_validation_start(self) -> None:
        """Plan the forward passes of the unmasked model, which calibrates, or those of a round of `search`."""
        self._begin_passes()

    def on_test_start(self) -> None:
        """Prove the masks on this model and device, then plan the forward passes."""
        if not any(getattr(callback, "writes_results", False) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            lightning.pytorch.utilities.rank_zero_warn(
                "this Trainer writes no results: use headprobe.ProbeTrainer, which writes the files of the command "
                "line, or read the `scores` of the HeadProbe afterwards",
                category=HeadprobeWarning,
            )
        self._begin_passes()

    def begin_calibration(self, batch_size: int) -> RowPlan:
        """Begin to calibrate on a unit of noise, or a round of `rescoring`, for dry runs."""
        self.calibrating = True
        if self._fitting is not None:
            self.statistics = ()
        elif self.rescoring is None:
            self.statistics = self._calibrating_statistics()
        else:
            self.statistics = self.rescoring.statistics(self.backbone, self._no_direct)
        self.begin_units(1)
        self.plan_passes(batch_size)
        self.observe_heads()
        if self.passes is None:
            raise RunError("the forward passes are not planned")
        return self.passes.plan  # on a GPU the statistic may have halved the rows

    def end_calibration(self) -> int:
        """End a calibration on noise and return the bytes of a unit's sums."""
        sums = [metric for statistic in self.statistics for metric in statistic.empty_sums().values()]
        self.calibrating, self.statistics, self.unit_sums = False, (), None
        return sum(getattr(metric, name).nbytes for metric in sums for name in metric.layout)

    def begin_judging(self, batch_size: int, statistics: Sequence[HeadStatistic]) -> None:
        """Begin to judge a unit of noise, which these statistics observe, for dry runs."""
        self.statistics = tuple(statistics)
        self.begin_units(1)
        self.plan_passes(batch_size)
        self.observe_heads()

    def end_judging(self) -> None:
        """End the judging of noise; nothing of it is kept."""
        self.statistics, self.unit_sums, self.donor_labels = (), None, None

    def _begin_passes(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.plan_passes(int(getattr(data, "batch_size", 32)))
        self.scores = self.coverage = self.feature_scores = None
        self.observe_heads()

    def plan_passes(self, batch_size: int) -> RowPlan:
        """Prove the masks on this model and device, then plan the forward passes for batches of `batch_size` images.

        Raises:
            UsageError: A proof fails; the model must not be run under masks.
            RunError: Not even the proofs' few rows fit into memory.
        """
        usual = ROW_BUDGET_CPU if self.device.type == "cpu" else ROW_BUDGET_GPU
        if self.search is not None:
            return self._plan_round(self.search, batch_size, usual // ROWS_OF_GRADIENTS)
        around: Any = nullcontext
        if self.rescoring is not None:
            self.rescoring.begin_round()
            around = partial(self.rescoring.ablated, self.backbone)
        if self._scoring is not None or self.rescoring is not None:
            usual //= ROWS_OF_GRADIENTS
        fitted = None if self._finished is None else self._finished.least_budget
        given = [rows for rows in (self.row_budget, fitted) if rows is not None]
        if self.rescoring is not None and self.rescoring.done and self.passes is not None:
            self.passes.around = around  # all else is proven since the first round
            self.passes.take(min(*given, usual, self.passes.plan.budget))
            return self.passes.plan
        self.passes = ForwardPasses(
            self.backbone,
            self.layout,
            self.head_mask[:0] if self.calibrating else self.head_mask,
            self.normalised,
            batch_size,
            budget=min(given, default=usual),
            replacements=self._replacements(),
            around=around,
            outputs=self.outputs,
            proven=self.known,
        )
        return self.passes.plan

    @property
    def _scoring(self) -> ScoreStatistic | None:
        """The statistic of this stage that scores heads, if there is one."""
        return next((one for one in self.statistics if isinstance(one, ScoreStatistic)), None)

    def _replacements(self) -> list[Replacement]:
        """Return what fills the masked slots of each variant; nothing where all are set to zero."""
        if {variant.ablation for variant in self.variants_now} <= {ZERO}:
            return []
        seed = 0 if self.resampled is None else self.resampled.seed
        return replacements_of(self.variants_now, self.layout, self.calibration, seed)

    def _plan_round(self, search: Search, batch_size: int, usual: int) -> RowPlan:
        """Plan the passes of a round: a variant per head, in which it alone is replaced by its trial constant."""
        with torch.inference_mode(False):  # the outer one would make tensors that no gradient can pass
            keep = search.now.keep(self.layout.heads_per_layer).to(self.device)
            dims = [layer.head_dim for layer in self.layout.layers]
            constants = search.now.constants(self.layout.heads_per_layer, dims)
            search.leaves = tuple(layer.to(self.device).requires_grad_() for layer in constants)
        fills = [Constant(OPTIMAL, search.leaves)] * len(keep)
        fitted = None if self._finished is None else self._finished.least_budget
        if search.done and self.passes is not None:
            self.passes.change(keep, fills)
            if fitted is not None and fitted < self.passes.plan.budget:
                self.passes.take(fitted)
            return self.passes.plan
        budget = min(rows for rows in (self.row_budget, fitted, usual) if rows is not None)
        self.passes = ForwardPasses(
            self.backbone,
            self.layout,
            keep,
            self.normalised,
            batch_size,
            budget,
            replacements=fills,
            outputs=self.outputs,
            proven=self.known,
        )
        return self.passes.plan

    @property
    def proven(self) -> Proven | None:
        """What this stage proved that was not known before; None if there is nothing."""
        if self.passes is None or self.passes.known:
            return None
        return Proven(self.outputs, {self.passes.used: self.passes.proven})

    @property
    def plan(self) -> RowPlan | None:
        """The plan of the forward passes, if there is one; an out-of-memory may change it."""
        return self.passes.plan if self.passes else None

    @property
    def work(self) -> float:
        """Work of one image under all variants in plain forward passes, counted in layers.

        Raises:
            RunError: Nothing is planned.
        """
        if self.passes is None:
            raise RunError("plan_passes must be called before the work is known")
        return self.passes.work

    def observe_heads(self) -> None:
        """Connect the statistics, if there are any, to the forward passes.

        Raises:
            UsageError: A statistic's options do not suit the model.
            RunError: `begin_units` and `plan_passes` were not called.
        """
        if not self.statistics:
            return
        if self.unit_sums is None or self.passes is None:
            raise RunError("begin_units and plan_passes must be called before statistics can observe")
        variant = self.described_variant
        subject = Subject(
            layout=self.layout,
            facts=layer_facts(self.backbone, self.layout),
            units=self.unit_sums.units,
            mask=None if variant is None else self.variants[variant].name,
            device=_double_device(self.device),
        )
        for statistic in self.statistics:
            statistic.begin(subject)
        self.passes.observe(self.statistics, variant)
        if self.device.type == "cuda":
            self.passes.rehearse(self.device, None if self._scoring is None else self._scoring.scoring)

    def begin_units(
        self,
        units: int,
        valid_classes: Sequence[int] | None = None,
        rows: Sequence[Sequence[int]] | None = None,
        bad_are_wrong: bool = False,
    ) -> None:
        """Begin the sums of all units of the data; `statistics` must be set before.

        Args:
            units: Number of units of the data set.
            valid_classes: Sorted classes that the data set has; logits of all others are left out. None keeps all.
            rows: Row numbers of each unit, None where they are known only after reading the data.
            bad_are_wrong: Count images that cannot be read as wrong, under every variant; otherwise they do not count.
        """
        self.valid_classes = None if valid_classes is None else torch.tensor(valid_classes)
        classes = self.num_classes if valid_classes is None else len(valid_classes)
        variants, per_class = len(self.variants_now), self.per_class and not self.calibrating
        if self._fitting is not None:
            self.unit_sums = UnitSums(units, self._fitting.fit(self.outputs.features).empty, rows)
        elif self.search is not None:
            trials, dim = len(self.search.now.heads), self.search.dim
            self.unit_sums = UnitSums(units, lambda: TrialSums(trials, dim), rows)
        else:
            drawn = None if self.calibrating or not self.labelled else self.resampled
            self.donor_labels = None if drawn is None else CountDonorLabels(drawn.draws)
            moved = not self.calibrating and self.outputs.features > 0
            self._features = CountFeatures(variants) if moved else None
            counting = [one for one in (self._features, self.donor_labels) if one is not None]
            scores = partial(PairedAccuracy, variants, classes, per_class) if self.labelled else ImageCount
            self.unit_sums = UnitSums(units, scores, rows, (*self.statistics, *counting))
        self._unit_rows = rows
        self._bad_are_wrong = bad_are_wrong

    def test_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # callbacks read it, typed
        """Score one batch under every variant; no collective, no logging."""
        if self.unit_sums is None or self.passes is None:
            raise RunError("begin_units must be called before the first batch")
        opened, name = self._opened(self.unit_sums, batch)
        observing = self.passes.observing

        def taps_of(images: slice) -> Sequence[Tap]:
            return observing.taps(opened.statistics, batch.unit, batch.rows[images]) if observing else ()

        donated = self._donor_groups(batch, name)
        if donated is not None and self.donor_labels is not None and donated.rows:
            donors = torch.stack(list(self.passes.donors(donated).values()))  # [draws, images]
            opened.statistics[self.donor_labels.name]["labels"].update(batch.labels.cpu(), donors)
        if self._scoring is not None and len(batch.images) and self.labelled:
            outputs = self._scored(self._scoring, batch, taps_of, opened)  # [1, images, classes + features]
        else:
            outputs = self._run(batch.images, taps_of, donated)  # [1 + variants, images, classes + features]
        _, features = self.outputs.split(outputs)  # [1 + variants, images, features]
        if self._features is not None:
            self._add_features(features, batch, opened.statistics[self._features.name]["sums"])
        logits = self._logits_of(outputs)
        labels, rows = batch.labels, batch.rows  # each [images]
        if not self.labelled:
            opened.scores.update(len(rows))
            self._end_batch(batch, logits, labels, opened, name)
            return StepResult(logits, labels, batch.unit, batch.rows, batch.last, features)
        if self.calibrating:  # constants need no labels
            known = labels >= 0
            logits, labels, rows = logits[:, known.to(logits.device)], labels[known], rows[known.to(rows.device)]
        if self.valid_classes is not None:
            logits, labels = restrict_classes(logits, labels, self.valid_classes.to(logits.device))
        groups = torch.tensor(image_groups(batch.unit, rows.tolist()), dtype=torch.int64)
        device = _double_device(logits.device)
        opened.scores.to(device).update(logits.to(device), labels.to(device), groups.to(device))
        opened.rows.labels += labels.tolist()
        self._end_batch(batch, logits, labels, opened, name)
        return StepResult(logits, labels, batch.unit, batch.rows, batch.last, features)

    @staticmethod
    def _add_features(features: Tensor, batch: Any, sums: FeatureSums) -> None:
        """Add what a batch's masks do to the pooled feature, of all its images."""
        groups = torch.tensor(image_groups(batch.unit, batch.rows.tolist()), dtype=torch.int64)
        device = _double_device(features.device)
        sums.to(device).update(features.to(device), groups.to(device))

    def _end_batch(self, batch: Any, logits: Tensor, labels: Tensor, opened: OpenUnit, name: str) -> None:
        """Hand a judged batch to the statistics; end its unit if it was the last."""
        if self.passes is None or self.unit_sums is None:
            raise RunError("begin_units must be called before the first batch")
        if self.passes.observing is not None and not self.calibrating:
            judged = Judged(
                batch.unit, batch.rows, batch.images, batch.labels, logits[0], self.valid_classes, batch.sources
            )
            for statistic in self.statistics:
                statistic.judged(judged, opened.statistics[statistic.name])
        if batch.last:
            self.unit_sums.close(batch.unit, self.passes.plan.budget, name)

    def _scored(self, statistic: ScoreStatistic, batch: Any, taps_of: TapsOf, opened: OpenUnit) -> Tensor:
        """Return the unmasked model's outputs `[1, images, ...]`; add the batch's gradients to the unit's sums."""
        if self.passes is None:
            raise RunError("plan_passes must be called before heads are scored")
        sums = opened.statistics[statistic.name]

        def take(gradients: list[ImageGradients], labelled: int) -> None:
            statistic.add(gradients, labelled, sums)

        return self.passes.score(batch.images, batch.labels, taps_of, self._nll, statistic.scoring, take)

    def _donor_groups(self, batch: Any, name: str) -> DonorGroups | None:
        """Return which images of a batch are each other's donors; None where no heads are resampled."""
        if self.passes is None or not self.passes.resamples:
            return None
        return donor_groups(
            batch.unit,
            batch.rows.tolist(),
            {bad.row: bad.reason for bad in batch.bad},
            last=batch.last,
            wanted=None if self._unit_rows is None else self._unit_rows[batch.unit],
            name=name,
        )

    def validation_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # as `test_step`
        """Add one batch of the images that calibrate."""
        if self._fitting is None and self.search is None:
            return self.test_step(batch, batch_idx)
        return self._round_step(batch)

    def _round_step(self, batch: Any) -> StepResult:
        """Add one batch to the sums of a classifier, or to the losses and gradients of a round's trial constants."""
        if self.unit_sums is None or self.passes is None:
            raise RunError("begin_units must be called before the first batch")
        opened, name = self._opened(self.unit_sums, batch)
        if self._fitting is not None:
            features = self.outputs.split(self._run(batch.images, lambda _: ()))[1][0]  # [images, features]
            opened.scores.update(features.to(_double_device(features.device)), batch.labels)
        else:
            known = batch.labels >= 0
            images, labels = batch.images[known.to(batch.images.device)], batch.labels[known]
            opened.scores.update(*self.trial_losses(images, labels), len(labels))
        if batch.last:
            self.unit_sums.close(batch.unit, self.passes.plan.budget, name)
        nothing = batch.labels.new_empty(0)
        return StepResult(nothing, batch.labels, batch.unit, batch.rows, batch.last, nothing)

    def trial_losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed NLL `[heads]` of a round's trials on uint8 images, and its gradient `[heads, dim]`.

        Raises:
            UsageError: The model's forward pass cuts gradients off.
            RunError: No search is under way, or not even one image fits into memory.
        """
        if self.passes is None or self.search is None:
            raise RunError("begin_search and plan_passes must be called before trial constants have losses")
        return self.passes.gradients(images, labels, self.search.now.heads, self.search.leaves, self._nll)

    @staticmethod
    def _opened(sums: UnitSums, batch: Any) -> tuple[OpenUnit, str]:
        """Return the open unit that takes a batch, and its name."""
        if batch.failure is not None:
            raise RunError(batch.failure)
        name = batch.name or f"unit {batch.unit}"
        bad_rows = [asdict(bad) for bad in batch.bad]
        return sums.open(batch.unit, batch.rows.tolist(), bad_rows, name), name

    def _logits_of(self, outputs: Tensor) -> Tensor:
        """Return the logits `[..., classes]` that are scored, of a pass's outputs `[..., classes + features]`.

        Everything that scores goes through here, gradients too.
        """
        logits, features = self.outputs.split(outputs)
        if self.classifying is not None:
            return self.classifying.logits(features)
        return logits[..., : self.num_classes]

    def _nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return each image's NLL `[variants, images]`, float64, among the classes that are scored.

        Args:
            outputs: Of a pass, `[variants, images, classes + features]`.
            labels: `[images]`.
        """
        logits = self._logits_of(outputs)
        if self.valid_classes is not None:
            logits, labels = restrict_classes(logits, labels, self.valid_classes.to(logits.device))
        logits = logits.to(_double_device(logits.device))
        chances = F.log_softmax(logits, dim=-1, dtype=torch.float64)  # [variants, images, classes]
        places = labels.to(logits.device).expand(len(logits), -1)[..., None]
        return -chances.gather(-1, places)[..., 0]

    def masked_logits(self, images: Tensor) -> Tensor:
        """Return logits `[1 + variants, images, classes]` of uint8 images `[images, channels, height, width]`.

        An out-of-memory halves the row budget and goes on. Statistics do not observe.
        """
        return self._logits_of(self._run(images, lambda _: ()))

    def _run(self, images: Tensor, taps_of: TapsOf, groups: DonorGroups | None = None) -> Tensor:
        """Return outputs `[1 + variants, images, classes + features]` of uint8 images."""
        if self.passes is None:
            raise RunError("plan_passes must be called before masked_logits; trainer.test does it")
        if not len(images):
            width = self.outputs.classes + self.outputs.features
            return images.new_empty(1 + len(self.variants_now), 0, width, dtype=torch.float32)
        return self.passes.outputs(images, taps_of, groups)

    def normalised(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return uint8 images as the model takes them, in timm's own order of operations; in its dtype by default."""
        return normalised(images, self.data_config, dtype or next(self.backbone.parameters()).dtype)

    def on_test_epoch_end(self) -> None:
        """Add up the units of all processes, each exactly once.

        Raises:
            RunError: Units are missing, or were counted twice.
        """
        if self.unit_sums is None:
            raise RunError("begin_units must be called before the first batch")
        gather_nodes(self.trainer, self.unit_sums)
        arrays = read_sums(io.BytesIO(from_first(self.trainer, self._added_up)))
        self.coverage = Coverage.from_arrays(arrays[COVERAGE])
        if self.labelled:
            self.scores = paired_scores(arrays[SCORES], len(self.coverage.bad) if self._bad_are_wrong else 0)
        if MOVED in arrays:
            self.feature_scores = feature_scores(arrays[MOVED])

    def on_validation_epoch_end(self) -> None:
        """Add up the units of all processes, and keep the constants that follow.

        Raises:
            RunError: Units are missing, were counted twice, or hold NaN.
        """
        if self.unit_sums is None:
            raise RunError("begin_units must be called before the first batch")
        gather_nodes(self.trainer, self.unit_sums)
        if self._fitting is not None:
            self.calibration = self._end_fit(self._fitting)
            return
        if self.search is not None:
            self._end_round(self.search)
            return
        if self.rescoring is not None:
            self._end_rescored(self.rescoring)
            return
        self.calibration = from_bytes(from_first(self.trainer, self._calibrated))

    def _end_fit(self, classifying: "Classifying") -> Calibration:
        """Fit the classifier, on the first process; all go on with it. Return what is known of its images."""
        found = from_bytes(from_first(self.trainer, lambda: self._fitted(classifying)))
        classifying.take_fitted(classifying.restored(found.classifier, found.about))
        return Calibration([], found.about)

    def _fitted(self, classifying: "Classifying") -> bytes:
        """Return a calibration that holds the classifier alone; on the first process only, which has all sums."""
        whole = self._whole_calibration()
        classifying.take_fitted(classifying.fit(self.outputs.features).fitted(whole[SCORES]))
        about = self._about_calibration(whole[COVERAGE], int(whole[SCORES].labelled))
        return to_bytes(Calibration([], about, classifying.saved()))

    def begin_search(self) -> None:
        """Begin to seek the optimal constants that the variants need, once the means are there."""
        self._order_heads()
        heads = heads_to_optimise(self.variants)
        if self.calibration is None or OPTIMAL not in self.fitted_kinds:
            return
        if self.calibration.about.get("images_labelled") == 0:
            raise UsageError(
                "the ablation optimal lowers the loss on calibration images, and none of them has a label: choose "
                "another --data.calibration or ablation, got labels of -1"
            )
        search = Search(heads, self.calibration)
        if search.now.heads:
            self.search = search
        else:
            self.calibration = search.found()

    def _end_rescored(self, rescoring: "Rescoring") -> None:
        """Take the scores of a round, on the first process; all go on with the order that follows from them."""
        rescoring.take(np.frombuffer(from_first(self.trainer, lambda: self._scored_anew(rescoring)), dtype="<f8"))
        if rescoring.now is None:
            self.calibration, self.rescoring = rescoring.found(), None

    def _scored_anew(self, rescoring: "Rescoring") -> bytes:
        whole = self.unit_sums.whole() if self.unit_sums is not None else {}
        check_coverage(whole[COVERAGE], data_of(self.trainer))
        return rescoring.scores(self.statistics).astype("<f8").tobytes()

    def _end_round(self, search: Search) -> None:
        """Take the sums of a round, on the first process; all go on with the constants that follow from them."""
        search.now = Round.from_bytes(from_first(self.trainer, lambda: self._next_round(search)))
        search.done += 1
        if not search.now.heads:
            self.calibration = from_bytes(from_first(self.trainer, lambda: to_bytes(search.found())))
            self.search = None

    def _next_round(self, search: Search) -> bytes:
        whole = self.unit_sums.whole() if self.unit_sums is not None else {}
        check_coverage(whole[COVERAGE], data_of(self.trainer))
        return search.take(whole[SCORES]).to_bytes()

    def _calibrated(self) -> bytes:
        """Return the calibration as the bytes of its file; on the first process only, which has all sums."""
        whole = self._whole_calibration()
        statistic = self.statistics[0]
        if not isinstance(statistic, SlotStatistic):
            raise RunError("only the slots' own statistic calibrates")
        labelled = int(whole[SCORES].images) if self.labelled else 0
        constants, about = statistic.constants(), self._about_calibration(whole[COVERAGE], labelled)
        if self._scoring is not None:
            scores = self._scoring.scores(constants)
            constants = [replace(layer, scores=own) for layer, own in zip(constants, scores, strict=True)]
            about["undefined_scores"] = self._scoring.undefined()
        calibration = Calibration(constants, about)
        check_finite(calibration)
        return to_bytes(calibration)

    def _whole_calibration(self) -> NamedSums:
        """Return the sums of all units that calibrate, each read exactly once.

        Raises:
            RunError: Units are missing, or images that must be read cannot be.
        """
        whole = self.unit_sums.whole() if self.unit_sums is not None else {}
        self.coverage = whole[COVERAGE]
        check_coverage(whole[COVERAGE], data_of(self.trainer))
        if whole[COVERAGE].bad and data_of(self.trainer).on_bad_image == "error":
            raise RunError(bad_calibration_message(whole[COVERAGE].bad))
        return whole

    def _about_calibration(self, coverage: Coverage, labelled: int) -> dict[str, Any]:
        """Return where constants come from: enough to refuse them for another model, or on the same images.

        Args:
            coverage: The rows that were read.
            labelled: How many of their images have a label.
        """
        return {
            "model": self.identity(),
            "data": data_of(self.trainer).identity(),
            "kinds": self.fitted_kinds,
            "images": images_read(coverage),
            "images_left_out": len(coverage.bad),
            "images_labelled": labelled,
            **({} if self.classifying is None else {CLASSIFIER: self.classifying.about()}),
        }

    def _added_up(self) -> bytes:
        """Add up the units; return the sums that all processes need, coverage and scores, as an npz file."""
        whole: NamedSums = self.unit_sums.whole() if self.unit_sums is not None else {}
        out = io.BytesIO()
        write_sums({name: whole[name] for name in (COVERAGE, SCORES, MOVED) if name in whole}, out)
        return out.getvalue()

    def teardown(self, stage: str) -> None:
        """Drop the statistics; the hooks are removed already."""
        self._finished = None
        if self.passes is not None:
            self.passes.observing = None


def _classifying(text: str, num_classes: int | None) -> "Classifying":
    from headprobe.classifiers.classifying import Classifying  # here: few runs need it

    return Classifying(text, num_classes)


def _normalisation(source: ModelSource, config: Mapping[str, Any]) -> Decision:
    """Return how images are normalised: a file of weights does not say which normalisation they were trained with."""
    numbers = ", ".join(f"{name} {tuple(round(float(value), 4) for value in config[name])}" for name in ("mean", "std"))
    return Decision("normalisation", f"{numbers}, as {source.name} is configured (pretrained_cfg_overlay)")


def _of_calibration(calibration: Calibration, kinds: Sequence[str]) -> list[Decision]:
    """Return what is to be known of the images that fitted the constants of a run."""
    found = []
    if left_out := calibration.about.get("images_left_out", 0):
        read = counted(calibration.about["images"], "other")
        text = f"{counted(left_out, 'calibration image')} could not be read; constants are of the {read}"
        found.append(Decision("unread calibration images", text, shown=True))
    if few := few_in_words(calibration, kinds):
        found.append(Decision("few calibration images", few, shown=True))
    return found


def _of_layers(layout: HeadLayout) -> list[Decision]:
    """Return what masking a head means in this model, where it could mean something else."""
    found = []
    ambiguous = [layer for layer in layout.layers if layer.ambiguous]
    if ambiguous:
        what = "the whole slot of a head" if ambiguous[0].semantics == "slot" else "what a head attends to, alone"
        text = f"{what}, which are two things in {counted(len(ambiguous), 'layer')} (--model.semantics, docs/heads.md)"
        found.append(Decision("masks take away", text))
    if normed := sum(layer.inner_norm for layer in layout.layers):
        text = f"a norm over all heads in {counted(normed, 'layer')}: masking a head rescales the others too"
        found.append(Decision("norm behind the heads", text, shown=True))
    if layout.headless:
        text = f"{counted(len(layout.headless), 'module')} without heads, which no mask reaches: {layout.headless[0]}"
        found.append(Decision("further attention", f"{text}{' and others' * (len(layout.headless) > 1)}", shown=True))
    return found


def restrict_classes(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels in the numbering of the valid classes only.

    Args:
        logits: `[..., classes]`.
        labels: `[images]`.
        valid: Sorted classes `[valid classes]`.

    Raises:
        RunError: A label is none of the valid classes.
    """
    places = torch.searchsorted(valid, labels).clamp(max=len(valid) - 1)  # [images]
    if not torch.equal(valid[places], labels):
        stranger = int(labels[valid[places] != labels][0])
        raise RunError(f"label {stranger} is none of the {len(valid)} classes that the data set should have")
    return logits[..., valid], places


def _double_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: the CPU beside Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
