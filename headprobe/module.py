"""`HeadProbe`: a timm backbone with a head-mask buffer, evaluated under all masks at once by Lightning."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.compiled import compile_parts
from headprobe.backbone.growing.row_plan import ROW_BUDGET_CPU, ROW_BUDGET_GPU, RowPlan
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.weights import ModelSource, built_options, create_backbone, data_config, weights_digest
from headprobe.describe.base import HeadStatistic, Subject
from headprobe.errors import RunError, UsageError
from headprobe.fit_steps import FitSteps
from headprobe.masks.spec import MaskSpec, NamedMask, expand_all
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores
from headprobe.passes import ForwardPasses, TapsOf
from headprobe.processes import from_first
from headprobe.units.coverage import Coverage
from headprobe.units.parts import Part, read_part, write_part
from headprobe.units.unit_sums import COVERAGE, SCORES, UnitBook, gather_nodes


@dataclass
class StepResult:
    """What a test step measured, for callbacks.

    Attributes:
        logits: `[1 + masks, images, classes]`, the baseline first.
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


class HeadProbe(FitSteps):
    """Scores a timm model with and without chosen attention heads, on the same images, in one pass.

    `ablate` chooses the masks, then `Trainer.test` does the rest: `begin_units` makes room for sums, `plan_passes`
    proves the masks and plans the forward passes, `masked_logits` runs them. `statistics` describe the heads meanwhile:
    the baseline's and, with a single mask, the masked model's too.

    Args:
        name: timm's name of the model, or a bundled one: digits_vit, digits_swin.
        weights: Local safetensors file; without it timm's pretrained weights are used.
        pretrained: False starts from random weights.
        num_classes: Classes of the classifier; without it the weights' own number.
        options: Further arguments of timm.create_model, such as {img_size: 384} or pretrained_cfg_overlay.
        ablation: What a masked head's output is replaced by; zero is the only choice so far.
        semantics: What masking takes away where a head's slot holds more than what it attended to: the whole slot, or
            the attention alone (docs/heads.md). The same thing in most models.
        row_budget: Rows (images x masks) that share a forward pass; without it a run of more than a minute tries what
            is fastest, and others take 48 on CPUs and 1024 on GPUs.
        torch_compile: Compile what stands beside attention in each block: a few percent faster after up to a minute of
            compiling (benchmarks/README.md), so for long runs only.
        per_class: Also count each class, for classes.csv.
        learning_rate: Peak learning rate of `fit`.
        weight_decay: Weight decay of `fit`.
        warmup: Fraction of `fit`'s steps with a rising learning rate.
        label_smoothing: Label smoothing of `fit`.
    """

    head_mask: Tensor  #: `[masks, layers, max heads]` bool, True = keep

    def __init__(
        self,
        name: str = "digits_vit",
        weights: str | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
        options: dict[str, Any] | None = None,
        ablation: Literal["zero"] = "zero",
        semantics: Semantics = "slot",
        row_budget: int | None = None,
        torch_compile: bool = False,
        per_class: bool = False,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if row_budget is not None and row_budget < 1:
            raise UsageError(f"model.row_budget must be 1 or more, got {row_budget}")
        self.save_hyperparameters()
        self.source = ModelSource(name, weights, pretrained, num_classes, options or {})
        self.backbone = create_backbone(self.source)
        self.data_config = data_config(self.backbone)
        self.num_classes = int(self.backbone.num_classes)  # type: ignore[arg-type]  # timm: int
        self.ablation, self.semantics, self.per_class, self.row_budget = ablation, semantics, per_class, row_budget
        self.torch_compile, self._compiled_parts = torch_compile, 0
        self.masks: list[NamedMask] = []
        self.valid_classes: Tensor | None = None
        self.passes: ForwardPasses | None = None
        self.scores: PairedScores | None = None
        self.coverage: Coverage | None = None
        self.most_rows: int | None = None
        self.statistics: list[HeadStatistic] = []
        self._layout: HeadLayout | None = None
        self.book: UnitBook | None = None
        self._bad_are_wrong = False
        self.register_buffer("head_mask", torch.ones(0, 1, 1, dtype=torch.bool), persistent=False)
        if self.num_classes < 1:
            raise UsageError(f"model {name!r} has no classifier to score; give model.num_classes and model.weights")
        _check_channels(self.data_config, self.source.options.get("in_chans"))

    # -- masks -----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> HeadLayout:
        """The backbone's attention layers, found on first use.

        Raises:
            UsageError: The model's heads cannot be found.
        """
        if self._layout is None:
            self._layout = find_heads(self.backbone, self.data_config["input_size"], self.source.name, self.semantics)
        return self._layout

    def ablate(self, specs: Sequence[MaskSpec]) -> None:
        """Choose the masks to score, beside the baseline that is always scored.

        Raises:
            UsageError: A spec names a layer or head that the model does not have.
        """
        self.masks = expand_all(specs, self.layout.heads_per_layer, self.source.name)
        empty = torch.ones(0, len(self.layout.layers), max(self.layout.heads_per_layer), dtype=torch.bool)
        self.head_mask = torch.stack([named.mask.keep() for named in self.masks]) if self.masks else empty
        self.passes = self.book = self.scores = self.coverage = None  # all of them were made for other masks

    def describe(self) -> dict[str, Any]:
        """Return what identifies the model, as plain data for a run's record and key."""
        return {
            "name": self.source.name,
            "weights": self.source.weights,
            "weights_sha256": weights_digest(self.backbone),
            "options": built_options(self.source),
            "num_classes": self.num_classes,
            "data_config": {name: self.data_config[name] for name in sorted(self.data_config)},
            "heads_per_layer": list(self.layout.heads_per_layer),
            "layers": [layer.name for layer in self.layout.layers],
            "semantics": self.semantics,
            "inner_norm": any(layer.inner_norm for layer in self.layout.layers),
        }

    # -- test ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make room for the sums of every unit that the data module is going to send."""
        if stage == "fit":
            self.backbone.train()
        if stage == "test":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning where there is one
            self.begin_units(data.units, data.valid_classes, data.unit_sizes, data.on_bad_image == "wrong")

    def on_test_start(self) -> None:
        """Prove the masks on this model and device, then plan the forward passes."""
        self.plan_passes(int(getattr(getattr(self.trainer, "datamodule", None), "batch_size", 32)))
        self.scores = self.coverage = None
        self.listen()

    def plan_passes(self, batch_size: int) -> RowPlan:
        """Prove the masks on this model and device, then plan the forward passes for batches of `batch_size` images.

        Raises:
            UsageError: A proof fails; the model must not be run under masks.
            RunError: Not even the proofs' few rows fit into memory.
        """
        usual = ROW_BUDGET_CPU if self.device.type == "cpu" else ROW_BUDGET_GPU
        given = [rows for rows in (self.row_budget, self.most_rows) if rows is not None]
        budget = min(given, default=usual)
        self.passes = ForwardPasses(self.backbone, self.layout, self.head_mask, self.normalised, batch_size, budget)
        if self.torch_compile and not self._compiled_parts:  # after the proofs, which look at the model as it is
            self._compiled_parts = compile_parts(self.backbone, self.layout)
        return self.passes.plan

    @property
    def plan(self) -> RowPlan | None:
        """The plan of the forward passes, if there is one; an out-of-memory may change it."""
        return self.passes.plan if self.passes else None

    @property
    def work(self) -> float:
        """Work of one image under all masks in plain forward passes, counted in layers.

        Raises:
            RunError: Nothing is planned.
        """
        if self.passes is None:
            raise RunError("plan_passes must be called before the work is known")
        return self.passes.work

    @property
    def described_mask(self) -> int | None:
        """Number of the mask whose model is described beside the baseline: that of a run with one mask of any heads."""
        return 0 if len(self.masks) == 1 and self.masks[0].mask.count else None

    def listen(self) -> None:
        """Connect the statistics, if there are any, to the forward passes.

        Raises:
            UsageError: A statistic's options do not suit the model.
            RunError: `begin_units` and `plan_passes` were not called.
        """
        if not self.statistics:
            return
        if self.book is None or self.passes is None:
            raise RunError("begin_units and plan_passes must be called before statistics can listen")
        self.book.statistics = tuple(self.statistics)
        mask = self.described_mask
        subject = Subject(
            layout=self.layout,
            facts=layer_facts(self.backbone, self.layout),
            units=self.book.units,
            mask=None if mask is None else self.masks[mask].name,
            device=_double_device(self.device),
        )
        self.passes.listen(self.statistics, subject, mask)
        if self.device.type == "cuda":
            self.passes.rehearse(self.device)

    def begin_units(
        self,
        units: int,
        valid_classes: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        bad_are_wrong: bool = False,
    ) -> None:
        """Make room for the sums of `units` pieces of data.

        Args:
            units: Number of units of the data set.
            valid_classes: Sorted classes that the data set has; logits of all others are left out. None keeps all.
            sizes: Rows of each unit, None where only reading the data would tell.
            bad_are_wrong: Count images that cannot be read as wrong, under every mask; otherwise they do not count.
        """
        self.valid_classes = None if valid_classes is None else torch.tensor(valid_classes)
        classes = self.num_classes if valid_classes is None else len(valid_classes)
        self.book = UnitBook(units, lambda: PairedAccuracy(len(self.masks), classes, self.per_class), sizes)
        self._bad_are_wrong = bad_are_wrong

    def test_step(self, batch: Any, batch_idx: int) -> StepResult:  # type: ignore[override]  # callbacks read it, typed
        """Score one batch under every mask; no collective, no logging."""
        if self.book is None or self.passes is None:
            raise RunError("begin_units must be called before the first batch")
        if batch.failure is not None:
            raise RunError(batch.failure)
        name = batch.name or f"unit {batch.unit}"
        metric = self.book.open(batch.unit, batch.rows.tolist(), [asdict(bad) for bad in batch.bad], name)
        listening = self.passes.listening
        logits = self._logits(
            batch.images, lambda part: listening.taps(batch.unit, batch.rows[part]) if listening else ()
        )
        labels = batch.labels
        if self.valid_classes is not None:
            logits, labels = restrict_classes(logits, labels, self.valid_classes.to(logits.device))
        metric.to(_double_device(logits.device))
        metric.update(logits.to(metric.images.device), labels.to(metric.images.device))
        if batch.last:
            self.book.close(batch.unit, self.passes.plan.budget, name)
        return StepResult(logits, labels, batch.unit, batch.rows, batch.last)

    def masked_logits(self, images: Tensor) -> Tensor:
        """Return logits `[1 + masks, images, classes]` of uint8 images `[images, channels, height, width]`.

        An out-of-memory halves the row budget and goes on. Statistics do not listen.
        """
        return self._logits(images, lambda _: ())

    def _logits(self, images: Tensor, taps_of: TapsOf) -> Tensor:
        if self.passes is None:
            raise RunError("plan_passes must be called before masked_logits; trainer.test does it")
        if not len(images):
            return images.new_empty(1 + len(self.masks), 0, self.num_classes, dtype=torch.float32)
        return self.passes.logits(images, taps_of)

    def normalised(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return uint8 images as the model takes them, in timm's own order of operations; in its dtype by default."""
        mean, std = (
            torch.tensor(self.data_config[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std")
        )
        return images.float().div(255).sub(mean).div(std).to(dtype or next(self.backbone.parameters()).dtype)

    def on_test_epoch_end(self) -> None:
        """Add up all processes' units, each exactly once.

        Raises:
            RunError: Units are missing, or were counted twice.
        """
        if self.book is None:
            raise RunError("begin_units must be called before the first batch")
        gather_nodes(self.trainer, self.book)
        arrays = read_part(io.BytesIO(from_first(self.trainer, self._added_up)))
        self.coverage = Coverage.from_arrays(arrays[COVERAGE])
        self.scores = paired_scores(arrays[SCORES], len(self.coverage.bad) if self._bad_are_wrong else 0)

    def _added_up(self) -> bytes:
        """Add up what this process knows, and return what all processes need of it."""
        whole: Part = self.book.whole() if self.book is not None else {}
        out = io.BytesIO()
        write_part({name: whole[name] for name in (COVERAGE, SCORES)}, out)
        return out.getvalue()

    def teardown(self, stage: str) -> None:
        """Let statistics go; the hooks are gone already."""
        if self.passes is not None:
            self.passes.listening = None


def _check_channels(config: dict[str, Any], channels: int | None) -> None:
    """Refuse a model whose images, mean, standard deviation and `in_chans`, if given, differ in their channels."""
    found = {} if channels is None else {"in_chans": channels}
    found |= {"input_size": config["input_size"][0], "mean": len(config["mean"]), "std": len(config["std"])}
    if len(set(found.values())) > 1:
        raise UsageError(
            "the model's options give different numbers of channels; set input_size, mean and std in "
            f"model.options.pretrained_cfg_overlay to the channels of in_chans, got {found}"
        )


def restrict_classes(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels in the numbering of the valid classes only.

    Args:
        logits: `[..., classes]`.
        labels: `[images]`.
        valid: Sorted classes `[valid classes]`.

    Raises:
        RunError: A label is none of the valid classes.
    """
    places = torch.searchsorted(valid, labels).clamp(max=len(valid) - 1)
    if not torch.equal(valid[places], labels):
        stranger = int(labels[valid[places] != labels][0])
        raise RunError(f"label {stranger} is none of the {len(valid)} classes that the data set was said to have")
    return logits[..., valid], places


def _double_device(device: torch.device) -> torch.device:
    """Return where float64 sums can be kept: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device
