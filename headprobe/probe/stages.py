"""A stage of a run: one go over all images of a kind. Here is the one that judges.

`headprobe.module.HeadProbe` is Lightning's module and has one stage at a time, which it asks for all that depends on
what the images are there for: what observes the heads, which forward passes run, what is summed, what a batch adds to
the sums, and what follows from them at the end. `calibrating` and `rounds` have the stages before the one that judges.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.row_plan import ROW_BUDGET_CPU, ROW_BUDGET_GPU
from headprobe.backbone.masking.donors import DonorGroups, donor_groups
from headprobe.backbone.masking.replacement import Replacement
from headprobe.calibration.fills import replacements_of
from headprobe.calibration.scores import ScoreStatistic
from headprobe.describe.base import HeadStatistic, Judged
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import ZERO
from headprobe.masks.spec import Variant
from headprobe.metrics.accuracy.donor_labels import CountDonorLabels
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy, image_groups, restrict_classes
from headprobe.metrics.accuracy.scores import paired_scores
from headprobe.metrics.features import CountFeatures, ImageCount, feature_scores
from headprobe.metrics.sums import double_device
from headprobe.passes import ForwardPasses, TapsOf
from headprobe.probe.masked_model import MaskedModel
from headprobe.processes import from_first
from headprobe.units.coverage import COVERAGE, SCORES, Coverage
from headprobe.units.tree import NamedSums, read_sums, write_sums
from headprobe.units.unit_sums import OpenUnit, UnitSums

ROWS_OF_GRADIENTS = 4
"""A pass with gradients has so many times fewer rows: it keeps what every layer computed until it goes back."""

MOVED = f"{CountFeatures.name}/sums"
"""Name of the sums of features."""


class Scored(NamedTuple):
    """What a stage measured on a batch.

    Attributes:
        logits: `[1 + variants, images, classes]`, the baseline first; no numbers where none are asked for.
        labels: `[images]`, in the numbering of the logits' classes.
        features: `[1 + variants, images, features]`, the pooled feature; no numbers where it cannot be read.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor

    @classmethod
    def nothing(cls, batch: Any) -> "Scored":
        """Return what a stage has scored that scores nothing of a batch."""
        none = batch.labels.new_empty(0)
        return cls(none, batch.labels, none)


class Stage(ABC):
    """One go over all images of a kind.

    The methods stand in the order in which they are called.

    Args:
        model: The model with its masks, whose `passes` and `unit_sums` are those of this stage while it lasts.

    Attributes:
        name: What a round is for, as its units are kept: `rescored` or `optimal`; empty for stages that are no rounds.
        judges: Whether its images judge, in Lightning's test stage; others fit, in its validate stage.
        statistics: What observes the heads.
    """

    name = ""
    judges = False

    def __init__(self, model: MaskedModel) -> None:
        self.model = model
        self.statistics: tuple[HeadStatistic, ...] = ()

    def begin(self) -> None:
        """Begin, before Lightning does anything: callbacks find a run's key before `setup`."""
        return

    @property
    def variants(self) -> list[Variant]:
        """What is scored beside the baseline: nothing while the unmasked model calibrates."""
        return []

    @property
    def scoring(self) -> ScoreStatistic | None:
        """The statistic that scores heads, if there is one."""
        return None

    @property
    def goes_backward(self) -> bool:
        """Whether passes have gradients."""
        return False

    def model_identity(self) -> dict[str, Any]:
        """Return what identifies the model."""
        return self.model.identity()

    def identity(self) -> dict[str, Any]:
        """Return what changes the sums of this stage beside the model, the data and the statistics."""
        return {}

    def check(self, trainer: lightning.Trainer, data: Any) -> None:
        """Refuse data that do not suit the stage.

        Raises:
            UsageError: With the reason.
        """
        return

    @abstractmethod
    def sums(self, units: int, rows: Sequence[Sequence[int]] | None, classes: int) -> UnitSums:
        """Make the empty sums of all units.

        Args:
            units: Number of units of the data set.
            rows: Row numbers of each unit, None where they are known only after reading the data.
            classes: Classes that are scored.
        """

    def plan(self, batch_size: int, fitted: int | None) -> ForwardPasses:
        """Prove the masks on this model and device, unless that is done, and plan the passes: here of no mask.

        Args:
            batch_size: Images of a batch.
            fitted: Rows that are known to fit into memory, None where nobody knows.

        Raises:
            UsageError: A proof fails; the model must not be run under masks.
            RunError: Not even the proofs' few rows fit into memory.
        """
        return self.proven(batch_size, self.model.head_mask[:0], self.budget(fitted))

    @abstractmethod
    def step(self, batch: Any, opened: OpenUnit, name: str) -> Scored:
        """Add a batch to the sums of its unit; no collective, no logging.

        Args:
            batch: The `ImageBatch`.
            opened: The open unit.
            name: Its name in messages.
        """

    @abstractmethod
    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Take what follows from the sums: the first process has those of all, and all processes go on with the same.

        Raises:
            RunError: Units are missing, were counted twice, or hold NaN.
        """

    # -- what stages share -----------------------------------------------------------------------------------------

    @property
    def usual_rows(self) -> int:
        """Rows that share a forward pass if nobody says how many."""
        usual = ROW_BUDGET_CPU if self.model.device.type == "cpu" else ROW_BUDGET_GPU
        return usual // ROWS_OF_GRADIENTS if self.goes_backward else usual

    def given_rows(self, fitted: int | None) -> list[int]:
        """Return the row budgets that the user and an earlier session give."""
        return [rows for rows in (self.model.row_budget, fitted) if rows is not None]

    def budget(self, fitted: int | None) -> int:
        """Return the rows of a forward pass: the fewest that are given, else the usual ones."""
        return min(self.given_rows(fitted), default=self.usual_rows)

    def proven(
        self,
        batch_size: int,
        keep: Tensor,
        budget: int,
        replacements: Sequence[Replacement] = (),
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> ForwardPasses:
        """Return passes under these masks, proven on this model and device; see `ForwardPasses`."""
        model = self.model
        return ForwardPasses(
            model.backbone,
            model.layout,
            keep,
            model.normalised,
            batch_size,
            budget=budget,
            replacements=replacements,
            around=around,
            outputs=model.outputs,
            proven=model.known,
        )

    @property
    def passes(self) -> ForwardPasses:
        """The forward passes.

        Raises:
            RunError: They are not planned.
        """
        if self.model.passes is None:
            raise RunError("plan_passes must be called before a stage has forward passes")
        return self.model.passes

    def taps_of(self, batch: Any, opened: OpenUnit) -> TapsOf:
        """Return what gives the taps of a pass over some images of a batch."""
        observing = self.passes.observing

        def taps_of(images: slice) -> Sequence[Tap]:
            return observing.taps(opened.statistics, batch.unit, batch.rows[images]) if observing else ()

        return taps_of

    def count(self, unit: int, rows: Tensor, logits: Tensor, labels: Tensor, opened: OpenUnit) -> tuple[Tensor, Tensor]:
        """Add logits to the scores of a unit; return logits and labels in the numbering of the data's classes.

        Args:
            unit: The unit.
            rows: `[images]`, their rows inside the unit.
            logits: `[1 + variants, images, classes]`.
            labels: `[images]`.
            opened: The open unit.
        """
        valid = self.model.valid_classes
        if valid is not None:
            logits, labels = restrict_classes(logits, labels, valid.to(logits.device))
        groups = torch.tensor(image_groups(unit, rows.tolist()), dtype=torch.int64)
        device = double_device(logits.device)
        opened.scores.to(device).update(logits.to(device), labels.to(device), groups.to(device))
        opened.rows.labels += labels.tolist()
        return logits, labels


class Judging(Stage):
    """The stage that scores the model under every variant."""

    judges = True

    def __init__(self, model: MaskedModel) -> None:
        super().__init__(model)
        self._rows: Sequence[Sequence[int]] | None = None
        self._features: CountFeatures | None = None

    def begin(self) -> None:
        """Put masks that go by a score into its order.

        Raises:
            UsageError: Nothing was scored.
        """
        self.model.order_heads()

    @property
    def variants(self) -> list[Variant]:
        """All variants of the model."""
        return self.model.variants

    def check(self, trainer: lightning.Trainer, data: Any) -> None:
        """Refuse data whose batches cut groups of donors.

        Raises:
            UsageError: With the remedy.
        """
        if self.model.rows_together > getattr(data, "rows_together", 1):
            raise UsageError(
                "the ablation resample needs batches of whole groups of rows: use headprobe.ProbeTrainer with "
                f"headprobe.ImageNetDataModule, got {type(trainer).__name__} and {type(data).__name__}"
            )

    def sums(self, units: int, rows: Sequence[Sequence[int]] | None, classes: int) -> UnitSums:
        """Make the empty sums of the scores, of the features, of the donors' labels and of every statistic."""
        model, variants = self.model, len(self.variants)
        self._rows = rows
        drawn = model.resampled if model.labelled else None
        model.donor_labels = None if drawn is None else CountDonorLabels(drawn.draws)
        self._features = CountFeatures(variants) if model.outputs.features > 0 else None
        counting = [one for one in (self._features, model.donor_labels) if one is not None]
        scores = partial(PairedAccuracy, variants, classes, model.per_class) if model.labelled else ImageCount
        return UnitSums(units, scores, rows, (*self.statistics, *counting))

    def plan(self, batch_size: int, fitted: int | None) -> ForwardPasses:
        """Prove the masks, then plan passes under all of them."""
        return self.proven(batch_size, self.model.head_mask, self.budget(fitted), self._replacements())

    def _replacements(self) -> list[Replacement]:
        """Return what fills the masked slots of each variant; nothing where all are set to zero."""
        if {variant.ablation for variant in self.variants} <= {ZERO}:
            return []
        seed = 0 if self.model.resampled is None else self.model.resampled.seed
        return replacements_of(self.variants, self.model.layout, self.model.calibration, seed)

    def step(self, batch: Any, opened: OpenUnit, name: str) -> Scored:
        """Score a batch under every variant."""
        model, groups = self.model, self._donor_groups(batch, name)
        if groups is not None:
            self._count_donors(batch, groups, opened)
        outputs = model.masked_outputs(batch.images, self.taps_of(batch, opened), groups)
        _, features = model.outputs.split(outputs)  # [1 + variants, images, features]
        if self._features is not None:
            self._count_features(features, batch, opened.statistics[self._features.name])

        logits, labels = model.logits_of(outputs), batch.labels
        if model.labelled:
            logits, labels = self.count(batch.unit, batch.rows, logits, labels, opened)
        else:
            opened.scores.update(len(batch.rows))
        self._show(batch, logits, opened)
        return Scored(logits, labels, features)

    def _donor_groups(self, batch: Any, name: str) -> DonorGroups | None:
        """Return which images of a batch are each other's donors; None where no heads are resampled."""
        if not self.passes.resamples:
            return None
        return donor_groups(
            batch.unit,
            batch.rows.tolist(),
            {bad.row: bad.reason for bad in batch.bad},
            last=batch.last,
            wanted=None if self._rows is None else self._rows[batch.unit],
            name=name,
        )

    def _count_donors(self, batch: Any, groups: DonorGroups, opened: OpenUnit) -> None:
        """Count how many donors of a batch are of their image's own class."""
        counting = self.model.donor_labels
        if counting is not None and groups.rows:
            donors = torch.stack(list(self.passes.donors(groups).values()))  # [draws, images]
            opened.statistics[counting.name]["labels"].update(batch.labels.cpu(), donors)

    @staticmethod
    def _count_features(features: Tensor, batch: Any, sums: NamedSums) -> None:
        """Add what a batch's masks do to the pooled feature, of all its images."""
        groups = torch.tensor(image_groups(batch.unit, batch.rows.tolist()), dtype=torch.int64)
        device = double_device(features.device)
        sums["sums"].to(device).update(features.to(device), groups.to(device))

    def _show(self, batch: Any, logits: Tensor, opened: OpenUnit) -> None:
        """Hand a judged batch to the statistics."""
        if self.passes.observing is None:
            return
        valid = self.model.valid_classes
        judged = Judged(batch.unit, batch.rows, batch.images, batch.labels, logits[0], valid, batch.sources)
        for statistic in self.statistics:
            statistic.judged(judged, opened.statistics[statistic.name])

    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Take the scores of all variants, on all processes."""
        model = self.model
        arrays = read_sums(BytesIO(from_first(trainer, lambda: _added_up(sums))))
        model.coverage = Coverage.from_arrays(arrays[COVERAGE])
        if model.labelled:
            model.scores = paired_scores(arrays[SCORES], len(model.coverage.bad) if model.bad_are_wrong else 0)
        if MOVED in arrays:
            model.feature_scores = feature_scores(arrays[MOVED])


def _added_up(sums: UnitSums) -> bytes:
    """Add up the units; return the sums that all processes need, coverage and scores, as an npz file."""
    whole, out = sums.whole(), BytesIO()
    write_sums({name: whole[name] for name in (COVERAGE, SCORES, MOVED) if name in whole}, out)
    return out.getvalue()
