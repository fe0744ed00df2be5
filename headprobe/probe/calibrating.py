"""The stages that fit in one pass of the unmasked model: a classifier, constants and scores of heads."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
from torch import Tensor

from headprobe.calibration.constants import (
    CLASSIFIER,
    Calibration,
    LayerConstants,
    check_finite,
    from_bytes,
    to_bytes,
)
from headprobe.calibration.gradient_pass import ImageGradients
from headprobe.calibration.scores import ScoreStatistic
from headprobe.calibration.slots import SlotStatistic
from headprobe.describe.base import HeadStatistic
from headprobe.errors import RunError
from headprobe.masks.ablations import LINEAR
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.features import ImageCount
from headprobe.metrics.sums import double_device
from headprobe.passes import TapsOf
from headprobe.probe.masked_model import MaskedModel
from headprobe.probe.stages import Scored, Stage
from headprobe.processes import from_first
from headprobe.units.coverage import COVERAGE, SCORES, Coverage, bad_calibration_message, check_coverage, images_read
from headprobe.units.tree import NamedSums
from headprobe.units.unit_sums import OpenUnit, UnitSums

if TYPE_CHECKING:
    from headprobe.classifiers.classifying import Classifying


class Calibrating(Stage):
    """The stage that fits constants and scores heads, in one pass of the unmasked model.

    Args:
        model: The model.
        statistics: What it sums; by default all that the masks need.
    """

    def __init__(self, model: MaskedModel, statistics: Sequence[HeadStatistic] | None = None) -> None:
        super().__init__(model)
        self.statistics = calibrating_statistics(model) if statistics is None else tuple(statistics)

    def begin(self) -> None:
        """Forget an earlier calibration."""
        self.model.calibration = None

    @property
    def scoring(self) -> ScoreStatistic | None:
        """The statistic that scores heads, if there is one."""
        return next((one for one in self.statistics if isinstance(one, ScoreStatistic)), None)

    @property
    def goes_backward(self) -> bool:
        """Whether heads are scored."""
        return self.scoring is not None

    def sums(self, units: int, rows: Sequence[Sequence[int]] | None, classes: int) -> UnitSums:
        """Make the empty sums of the baseline's scores and of every statistic."""
        scores = partial(PairedAccuracy, 0, classes, False) if self.model.labelled else ImageCount
        return UnitSums(units, scores, rows, self.statistics)

    def step(self, batch: Any, opened: OpenUnit, name: str) -> Scored:
        """Add a batch to the sums; images without a label are left out of the scores alone."""
        model, taps_of = self.model, self.taps_of(batch, opened)
        if self.scoring is not None and len(batch.images) and model.labelled:
            outputs = self._scored(self.scoring, batch, taps_of, opened)  # [1, images, classes + features]
        else:
            outputs = model.masked_outputs(batch.images, taps_of)
        _, features = model.outputs.split(outputs)  # [1, images, features]

        logits, labels = model.logits_of(outputs), batch.labels
        if model.labelled:
            known = labels >= 0  # constants need no labels
            kept = batch.rows[known.to(batch.rows.device)]
            logits, labels = self.count(batch.unit, kept, logits[:, known.to(logits.device)], labels[known], opened)
        else:
            opened.scores.update(len(batch.rows))
        return Scored(logits, labels, features)

    def _scored(self, statistic: ScoreStatistic, batch: Any, taps_of: TapsOf, opened: OpenUnit) -> Tensor:
        """Return the unmasked model's outputs `[1, images, ...]`; add the batch's gradients to the unit's sums."""
        sums = opened.statistics[statistic.name]

        def take(gradients: list[ImageGradients], labelled: int) -> None:
            statistic.add(gradients, labelled, sums)

        return self.passes.score(batch.images, batch.labels, taps_of, self.model.nll, statistic.scoring, take)

    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Keep the constants that follow, as the first process has made them."""
        self.model.calibration = from_bytes(from_first(trainer, lambda: self._calibrated(data, sums)))

    def _calibrated(self, data: Any, sums: UnitSums) -> bytes:
        """Return the calibration as the bytes of its file; on the first process only, which has all sums."""
        whole = whole_calibration(self.model, data, sums)
        statistic = self.statistics[0]
        if not isinstance(statistic, SlotStatistic):
            raise RunError("only the slots' own statistic calibrates")
        labelled = int(whole[SCORES].images) if self.model.labelled else 0
        constants: Sequence[LayerConstants] = statistic.constants()
        about = about_calibration(self.model, data, whole[COVERAGE], labelled)
        if self.scoring is not None:
            scores = self.scoring.scores(constants)
            constants = [replace(layer, scores=own) for layer, own in zip(constants, scores, strict=True)]
            about["undefined_scores"] = self.scoring.undefined()
        calibration = Calibration(constants, about)
        check_finite(calibration)
        return to_bytes(calibration)


def calibrating_statistics(model: MaskedModel) -> tuple[HeadStatistic, ...]:
    """Return what a calibration sums: scores need the covariances that linear ablation needs."""
    if not model.score_heads:
        return (SlotStatistic(model.fitted_kinds),)
    scores = ScoreStatistic(model.backbone, labelled=model.labelled, no_direct=no_direct(model))
    return SlotStatistic({*model.fitted_kinds, LINEAR}), scores


def no_direct(model: MaskedModel) -> str:
    """Return why logits are no sums over heads: another classifier than the model's own gives them."""
    return "" if model.classifying is None else f"its logits come from {model.classifying.choice.text}"


def whole_calibration(model: MaskedModel, data: Any, sums: UnitSums) -> NamedSums:
    """Return the sums of all units that calibrate, each read exactly once.

    Raises:
        RunError: Units are missing, or images that must be read cannot be.
    """
    whole = sums.whole()
    model.coverage = whole[COVERAGE]
    check_coverage(whole[COVERAGE], data)
    if whole[COVERAGE].bad and data.on_bad_image == "error":
        raise RunError(bad_calibration_message(whole[COVERAGE].bad))
    return whole


def about_calibration(model: MaskedModel, data: Any, coverage: Coverage, labelled: int) -> dict[str, Any]:
    """Return where constants come from: enough to refuse them for another model, or on the same images.

    Args:
        model: The model.
        data: The data module.
        coverage: The rows that were read.
        labelled: How many of their images have a label.
    """
    return {
        "model": model.identity(),
        "data": data.identity(),
        "kinds": model.fitted_kinds,
        "images": images_read(coverage),
        "images_left_out": len(coverage.bad),
        "images_labelled": labelled,
        **({} if model.classifying is None else {CLASSIFIER: model.classifying.about()}),
    }


# -- the classifier ----------------------------------------------------------------------------------------------------


class FittingClassifier(Stage):
    """The stage that fits a classifier on features of the unmasked model.

    Args:
        model: The model.
        classifying: Its classifier.
    """

    def __init__(self, model: MaskedModel, classifying: "Classifying") -> None:
        super().__init__(model)
        self.classifying = classifying

    def begin(self) -> None:
        """Forget an earlier classifier."""
        self.classifying.begin()

    def identity(self) -> dict[str, Any]:
        """Return what changes the sums of the classifier."""
        return {CLASSIFIER: self.classifying.fit(self.model.outputs.features).identity()}

    def check(self, trainer: lightning.Trainer, data: Any) -> None:
        """Refuse more images than a bank may hold.

        Raises:
            UsageError: With the remedy.
        """
        self.classifying.fit(self.model.outputs.features).refuse_too_many(data.expected_images)

    def sums(self, units: int, rows: Sequence[Sequence[int]] | None, classes: int) -> UnitSums:
        """Make the empty sums of the classifier."""
        return UnitSums(units, self.classifying.fit(self.model.outputs.features).empty, rows)

    def step(self, batch: Any, opened: OpenUnit, name: str) -> Scored:
        """Add the features of a batch."""
        features = self.model.outputs.split(self.model.masked_outputs(batch.images))[1][0]  # [images, features]
        opened.scores.update(features.to(double_device(features.device)), batch.labels)
        return Scored.nothing(batch)

    def end(self, trainer: lightning.Trainer, data: Any, sums: UnitSums) -> None:
        """Fit the classifier, on the first process; all go on with it, and with what is known of its images."""
        found = from_bytes(from_first(trainer, lambda: self._fitted(data, sums)))
        self.classifying.take_fitted(self.classifying.restored(found.classifier, found.about))
        self.model.calibration = Calibration([], found.about)

    def _fitted(self, data: Any, sums: UnitSums) -> bytes:
        """Return a calibration that holds the classifier alone; on the first process only, which has all sums."""
        whole = whole_calibration(self.model, data, sums)
        fit = self.classifying.fit(self.model.outputs.features)
        self.classifying.take_fitted(fit.fitted(whole[SCORES]))
        about = about_calibration(self.model, data, whole[COVERAGE], int(whole[SCORES].labelled))
        return to_bytes(Calibration([], about, self.classifying.saved()))
