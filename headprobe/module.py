"""`HeadProbe`: a timm model with chosen head masks, scored by Lightning under all of them at once."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning
import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.row_plan import ROW_BUDGET_CPU, ROW_BUDGET_GPU, RowPlan
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.heads.refusals import refuse_gradients, refuse_unusable
from headprobe.backbone.masking.replacement import REPLACEMENTS
from headprobe.backbone.preparation import normalised
from headprobe.backbone.weights import ModelSource, create_classifier, weights_digest
from headprobe.describe.base import HeadStatistic, Subject
from headprobe.errors import HeadprobeWarning, RunError, UsageError
from headprobe.masks.spec import ZERO, MaskSpec, Variant, expand_all
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores
from headprobe.passes import ForwardPasses, TapsOf
from headprobe.processes import from_first
from headprobe.text import Decision, counted
from headprobe.units.coverage import Coverage
from headprobe.units.store import FinishedUnits
from headprobe.units.tree import NamedSums, read_sums, write_sums
from headprobe.units.unit_sums import COVERAGE, SCORES, UnitSums, gather_nodes


@dataclass
class StepResult:
    """What a test step measured, for callbacks.

    Attributes:
        logits: `[1 + variants, images, classes]`, the baseline first.
        labels: `[images]`, in the numbering of the logits' classes.
        unit: The unit that the images belong to.
        rows: `[images]`, their rows inside the unit.
        last: Whether this ends the unit.
    """

    logits: Tensor
    labels: Tensor
    unit: int
    rows: Tensor
    last: bool


class AfterBatch(lightning.Callback):
    """A callback that looks at every scored batch of a `HeadProbe`; it ignores tests of other modules."""

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

    Attributes:
        class_names: Names of the model's classes in its classifier's order, where its configuration has them.
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
    ) -> None:
        super().__init__()
        if row_budget is not None and row_budget < 1:
            raise UsageError(f"model.row_budget must be 1 or more, got {row_budget}")
        self.save_hyperparameters()
        self.source = ModelSource(name, weights, pretrained, num_classes, options or {}, train_size)
        classifier = create_classifier(self.source)
        self.backbone, self.data_config, self.num_classes = classifier[:3]
        self._options, self.class_names, self._decisions = classifier[3:]
        self.semantics, self.per_class, self.row_budget = semantics, per_class, row_budget
        self.variants: list[Variant] = []
        self.valid_classes: Tensor | None = None
        self.statistics: tuple[HeadStatistic, ...] = ()
        self.passes: ForwardPasses | None = None
        self.unit_sums: UnitSums | None = None
        self.scores: PairedScores | None = None
        self.coverage: Coverage | None = None
        self._finished: FinishedUnits | None = None
        self._layout: HeadLayout | None = None
        self._bad_are_wrong = False
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

    def choose_masks(self, specs: str | Sequence[str], ablations: str | Sequence[str] = ZERO) -> None:
        """Choose what to score beside the baseline, which is always scored.

        Args:
            specs: A mask spec such as `each:layer`, or several.
            ablations: What the slots of masked heads are filled with; each mask is scored under every one.

        Raises:
            UsageError: A spec is wrong or names a layer or head that the model does not have, or there is no such
                ablation.
        """
        kinds = [ablations] if isinstance(ablations, str) else list(dict.fromkeys(ablations))
        unknown = [name for name in kinds if name not in REPLACEMENTS]
        if unknown or not kinds:
            got = unknown[0] if unknown else "none"
            raise UsageError(f"an ablation must be one of {', '.join(REPLACEMENTS)}, got {got}")
        texts = [specs] if isinstance(specs, str) or not isinstance(specs, Iterable) else specs
        checked = [MaskSpec(text) for text in texts]
        self.variants = expand_all(checked, self.layout.heads_per_layer, self.source.name, kinds)

        keep = [variant.mask.mask.keep() for variant in self.variants]  # each [layers, max heads]
        empty = torch.ones(0, len(self.layout.layers), max(self.layout.heads_per_layer), dtype=torch.bool)
        self.head_mask = torch.stack(keep) if keep else empty
        # All of these were made for other masks.
        self.passes = self.unit_sums = self.scores = self.coverage = None

    @property
    def described_variant(self) -> int | None:
        """Number of the variant whose model is described beside the baseline: the only one, if it masks any head."""
        return 0 if len(self.variants) == 1 and self.variants[0].mask.mask.count else None

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model, as plain data: a part of a run's identity."""
        return {
            "name": self.source.name,
            "title": self.title,
            "architecture": self.backbone.pretrained_cfg.get("architecture"),  # type: ignore[union-attr,operator]  # dict
            "weights": self.source.weights,
            "pretrained": self.source.pretrained,
            "weights_sha256": weights_digest(self.backbone),
            "options": self._options,
            "num_classes": self.num_classes,
            "data_config": {name: self.data_config[name] for name in sorted(self.data_config)},
            "heads_per_layer": list(self.layout.heads_per_layer),
            "layers": [layer.name for layer in self.layout.layers],
            "semantics": self.semantics,
            "inner_norm": any(layer.inner_norm for layer in self.layout.layers),
        }

    def decisions(self) -> list[Decision]:
        """Return what was decided about the model where the user did not."""
        return [*self._decisions, _normalisation(self.source, self.data_config), *_of_layers(self.layout)]

    @property
    def title(self) -> str:
        """The model's name in tables and figures, which says if its weights are random."""
        return f"{self.source.name} with random weights" if self.source.random else self.source.name

    # -- test ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Begin the units of the data module."""
        if stage == "test":
            data = data_of(self.trainer)
            self.begin_units(data.units, data.valid_classes, data.unit_rows, data.on_bad_image == "wrong")

    def continue_after(self, finished: FinishedUnits | None) -> None:
        """Continue a test that finished some units before.

        Args:
            finished: Its finished units; their smallest row budget is known to fit into memory. None starts a new test.
        """
        self._finished = finished

    def on_test_start(self) -> None:
        """Prove the masks on this model and device, then plan the forward passes."""
        if not any(getattr(callback, "writes_results", False) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            lightning.pytorch.utilities.rank_zero_warn(
                "this Trainer writes no results: use headprobe.ProbeTrainer, which writes the files of the command "
                "line, or read the `scores` of the HeadProbe afterwards",
                category=HeadprobeWarning,
            )
        data = getattr(self.trainer, "datamodule", None)
        self.plan_passes(int(getattr(data, "batch_size", 32)))
        self.scores = self.coverage = None
        self.observe_heads()

    def plan_passes(self, batch_size: int) -> RowPlan:
        """Prove the masks on this model and device, then plan the forward passes for batches of `batch_size` images.

        Raises:
            UsageError: A proof fails; the model must not be run under masks.
            RunError: Not even the proofs' few rows fit into memory.
        """
        usual = ROW_BUDGET_CPU if self.device.type == "cpu" else ROW_BUDGET_GPU
        fitted = None if self._finished is None else self._finished.least_budget
        given = [rows for rows in (self.row_budget, fitted) if rows is not None]
        self.passes = ForwardPasses(
            self.backbone,
            self.layout,
            self.head_mask,
            self.normalised,
            batch_size,
            budget=min(given, default=usual),
            replacements=[REPLACEMENTS[variant.ablation] for variant in self.variants],
        )
        return self.passes.plan

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
            self.passes.rehearse(self.device)

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
        variants, per_class = len(self.variants), self.per_class
        self.unit_sums = UnitSums(units, lambda: PairedAccuracy(variants, classes, per_class), rows, self.statistics)
        self._bad_are_wrong = bad_are_wrong

    def test_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # callbacks read it, typed
        """Score one batch under every variant; no collective, no logging."""
        if self.unit_sums is None or self.passes is None:
            raise RunError("begin_units must be called before the first batch")
        if batch.failure is not None:
            raise RunError(batch.failure)
        name = batch.name or f"unit {batch.unit}"
        bad_rows = [asdict(bad) for bad in batch.bad]
        opened = self.unit_sums.open(batch.unit, batch.rows.tolist(), bad_rows, name)
        observing = self.passes.observing

        def taps_of(images: slice) -> Sequence[Tap]:
            return observing.taps(opened.statistics, batch.unit, batch.rows[images]) if observing else ()

        logits, labels = self._logits(batch.images, taps_of), batch.labels  # [1 + variants, images, classes], [images]
        if self.valid_classes is not None:
            logits, labels = restrict_classes(logits, labels, self.valid_classes.to(logits.device))
        device = _double_device(logits.device)
        opened.scores.to(device).update(logits.to(device), labels.to(device))
        if batch.last:
            self.unit_sums.close(batch.unit, self.passes.plan.budget, name)
        return StepResult(logits, labels, batch.unit, batch.rows, batch.last)

    def masked_logits(self, images: Tensor) -> Tensor:
        """Return logits `[1 + variants, images, classes]` of uint8 images `[images, channels, height, width]`.

        An out-of-memory halves the row budget and goes on. Statistics do not observe.
        """
        return self._logits(images, lambda _: ())

    def _logits(self, images: Tensor, taps_of: TapsOf) -> Tensor:
        if self.passes is None:
            raise RunError("plan_passes must be called before masked_logits; trainer.test does it")
        if not len(images):
            return images.new_empty(1 + len(self.variants), 0, self.num_classes, dtype=torch.float32)
        return self.passes.logits(images, taps_of)

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
        self.scores = paired_scores(arrays[SCORES], len(self.coverage.bad) if self._bad_are_wrong else 0)

    def _added_up(self) -> bytes:
        """Add up the units; return the sums that all processes need, coverage and scores, as an npz file."""
        whole: NamedSums = self.unit_sums.whole() if self.unit_sums is not None else {}
        out = io.BytesIO()
        write_sums({name: whole[name] for name in (COVERAGE, SCORES)}, out)
        return out.getvalue()

    def teardown(self, stage: str) -> None:
        """Drop the statistics; the hooks are removed already."""
        self._finished = None
        if self.passes is not None:
            self.passes.observing = None


def _normalisation(source: ModelSource, config: Mapping[str, Any]) -> Decision:
    """Return how images are normalised: a file of weights does not say which normalisation they were trained with."""
    numbers = ", ".join(f"{name} {tuple(round(float(value), 4) for value in config[name])}" for name in ("mean", "std"))
    return Decision("normalisation", f"{numbers}, as {source.name} is configured (pretrained_cfg_overlay)")


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
