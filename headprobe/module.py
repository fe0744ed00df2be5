"""`HeadProbe`: a timm model with chosen head masks, scored by Lightning under all of them at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.heads.layout import Semantics
from headprobe.backbone.proofs.kept import Proven
from headprobe.backbone.weights import ModelSource
from headprobe.classifiers import choice
from headprobe.describe.base import HeadStatistic, Subject
from headprobe.errors import HeadprobeWarning, RunError, UsageError
from headprobe.masks.spec import Variant
from headprobe.metrics.accuracy.scores import why_no_e_value
from headprobe.metrics.sums import double_device
from headprobe.probe.calibrating import Calibrating
from headprobe.probe.masked_model import MaskedModel
from headprobe.probe.stages import Judging, Stage
from headprobe.text import Decision
from headprobe.units.store import FinishedUnits
from headprobe.units.unit_sums import gather_nodes

if TYPE_CHECKING:
    from headprobe.classifiers.classifying import Classifying


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


class HeadProbe(MaskedModel):
    """Scores a timm model with and without chosen attention heads, on the same images, in one pass.

    `choose_masks` chooses the masks, then `ProbeTrainer.test` does the rest: `begin_units` makes room for sums,
    `plan_passes` proves the masks and plans the forward passes, `test_step` runs them and adds up. `statistics`
    describe the heads of the baseline meanwhile; with a single variant, those of the masked model too.

    What the images are there for is the `stage`'s: it judges, or it fits what judging needs.

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
        stage: What is done with the images now.
    """

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
        classifying = None if classifier in (None, choice.NONE) else _classifying(classifier, num_classes)
        if row_budget is not None and row_budget < 1:
            raise UsageError(f"model.row_budget must be 1 or more, got {row_budget}")
        own_classes = num_classes if classifying is None or not num_classes else None
        source = ModelSource(name, weights, pretrained, own_classes, options or {}, train_size)
        super().__init__(source, classifier, classifying, semantics, per_class, row_budget)
        self.save_hyperparameters()
        self.stage: Stage = Judging(self)
        self._finished: FinishedUnits | None = None

    # -- stages ----------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: Stage) -> None:
        """Go over to a stage.

        A trainer that calibrates calls it before Lightning does anything: callbacks find a run's key before `setup`.
        """
        self.stage = stage
        stage.begin()

    def judge(self) -> None:
        """Go over to the stage that judges; where it is the stage already, what observes in it stays."""
        self.begin_stage(self.stage if self.stage.judges else Judging(self))

    @property
    def calibrating(self) -> bool:
        """Whether images fit now; else they judge."""
        return not self.stage.judges

    @property
    def round_name(self) -> str:
        """What a round of this stage is for, as units are kept: `rescored` or `optimal`; empty where there is none."""
        return self.stage.name

    @property
    def statistics(self) -> tuple[HeadStatistic, ...]:
        """What observes the heads in this stage."""
        return self.stage.statistics

    @statistics.setter
    def statistics(self, statistics: Sequence[HeadStatistic]) -> None:
        self.stage.statistics = tuple(statistics)

    @property
    def variants_now(self) -> list[Variant]:
        """The variants of this stage: none while the unmasked model calibrates."""
        return self.stage.variants

    @property
    def described_variant(self) -> int | None:
        """Number of the variant whose model is described beside the baseline: the only one, if it masks any head."""
        return 0 if len(self.variants_now) == 1 and self.variants[0].mask.mask.count else None

    def setup(self, stage: str) -> None:
        """Begin the units of the data module."""
        if stage not in ("test", "validate"):
            return
        data = data_of(self.trainer)
        if stage == "test":
            self.judge()
        else:  # a plain Trainer calibrates where no stage was begun before
            self.begin_stage(Calibrating(self) if self.stage.judges else self.stage)
        self.stage.check(self.trainer, data)
        self.begin_units(data.units, data.valid_classes, data.unit_rows, data.on_bad_image == "wrong")

    def continue_after(self, finished: FinishedUnits | None) -> None:
        """Continue a test that finished some units before.

        Args:
            finished: Its finished units; their smallest row budget is known to fit into memory. None starts a new test.
        """
        self._finished = finished

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
        self.bad_are_wrong = bad_are_wrong
        classes = self.num_classes if valid_classes is None else len(valid_classes)
        self.unit_sums = self.stage.sums(units, rows, classes)

    def on_validation_start(self) -> None:
        """Plan the forward passes of a stage that fits."""
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
        self.passes = self.stage.plan(batch_size, None if self._finished is None else self._finished.least_budget)
        return self.passes.plan

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
        variant, scoring = self.described_variant, self.stage.scoring
        subject = Subject(
            layout=self.layout,
            facts=layer_facts(self.backbone, self.layout),
            units=self.unit_sums.units,
            mask=None if variant is None else self.variants[variant].name,
            device=double_device(self.device),
        )
        for statistic in self.statistics:
            statistic.begin(subject)
        self.passes.observe(self.statistics, variant)
        if self.device.type == "cuda":
            self.passes.rehearse(self.device, None if scoring is None else scoring.scoring)

    def test_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # callbacks read it, typed
        """Add one batch to the sums of its unit, as the stage does; no collective, no logging."""
        if self.unit_sums is None or self.passes is None:
            raise RunError("begin_units must be called before the first batch")
        if batch.failure is not None:
            raise RunError(batch.failure)
        name = batch.name or f"unit {batch.unit}"
        bad_rows = [asdict(bad) for bad in batch.bad]
        opened = self.unit_sums.open(batch.unit, batch.rows.tolist(), bad_rows, name)

        logits, labels, features = self.stage.step(batch, opened, name)
        if batch.last:
            self.unit_sums.close(batch.unit, self.passes.plan.budget, name)
        return StepResult(logits, labels, batch.unit, batch.rows, batch.last, features)

    def validation_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # as `test_step`
        """Add one batch of the images that calibrate."""
        return self.test_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Add up the units of all processes, each exactly once.

        Raises:
            RunError: Units are missing, or were counted twice.
        """
        self._end_stage()

    def on_validation_epoch_end(self) -> None:
        """Add up the units of all processes, and keep the constants that follow.

        Raises:
            RunError: Units are missing, were counted twice, or hold NaN.
        """
        self._end_stage()

    def _end_stage(self) -> None:
        if self.unit_sums is None:
            raise RunError("begin_units must be called before the first batch")
        gather_nodes(self.trainer, self.unit_sums)
        self.stage.end(self.trainer, data_of(self.trainer), self.unit_sums)

    def teardown(self, stage: str) -> None:
        """Drop the statistics; the hooks are removed already."""
        self._finished = None
        if self.passes is not None:
            self.passes.observing = None

    # -- what a run says -------------------------------------------------------------------------------------------

    def decisions(self) -> list[Decision]:
        """Return what was decided about the model where the user did not."""
        found = super().decisions()
        if self.known is not None and self.passes is not None:
            what = "joins, shortcuts and outputs" if self.passes.known and self.passes.used else "outputs"
            text = f"{what} are those that an earlier run proved of this very model, masks are proven anew"
            found.append(Decision("proofs", f"{text} ({self.known.file}; --resume never proves all)"))
        if self.why_no_e_value:
            found.append(Decision("log_e_value", f"not given: {self.why_no_e_value} (docs/results.md)"))
        return found

    @property
    def why_no_e_value(self) -> str:
        """Why `log_e_value` of a test that is done is left empty, by the order of labels; nothing where it is given."""
        if self.coverage is None or self.scores is None or not self.variants_now:
            return ""
        return why_no_e_value(self.coverage.label_sums, complete=True)

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

    # -- dry runs --------------------------------------------------------------------------------------------------

    def begin_calibration(self, batch_size: int, stage: Stage | None = None) -> RowPlan:
        """Begin to calibrate on a unit of noise, or another stage that fits, for dry runs."""
        self.stage = stage or Calibrating(self)
        self.begin_units(1)
        self.plan_passes(batch_size)
        self.observe_heads()
        if self.passes is None:
            raise RunError("the forward passes are not planned")
        return self.passes.plan  # on a GPU the statistic may have halved the rows

    def end_calibration(self) -> int:
        """End a calibration on noise and return the bytes of a unit's sums."""
        sums = [metric for statistic in self.statistics for metric in statistic.empty_sums().values()]
        self.stage, self.unit_sums = Judging(self), None
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


def _classifying(text: str, num_classes: int | None) -> "Classifying":
    from headprobe.classifiers.classifying import Classifying  # here: few runs need it

    return Classifying(text, num_classes)
