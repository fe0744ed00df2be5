"""The importance scores of heads: `scores.csv`, from one pass with gradients over the calibration images.

| score | what it is | source |
| --- | --- | --- |
| `gradient_abs` | E abs(dL/dxi), xi multiplying the head's slot | Michel 2019, eq. 2 |
| `gradient_abs_l2` | the same, over its Euclidean norm in the layer | Molchanov 2017 |
| `gradient_fisher` | E (dL/dxi)^2, image by image | Molchanov 2019 |
| `taylor_zero`, `taylor_mean` | first-order rise of the loss under ablation by zero, by the mean | Nanda 2023 |
| `variance_after_projection` | tr(W Cov W'), the squared error of mean ablation at the layer's output | |
| `residual_variance_after_projection` | tr(W Cov(h given rest) W'), the squared error of linear ablation | |
| `stable_rank` | tr(W Cov W') over its largest eigenvalue | |
| `direct_logit` | what the head adds to the logit of the image's label | Gandelsman 2024 |
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from headprobe.backbone.capture.readout import readout_of
from headprobe.calibration.constants import LayerConstants, predict_masked
from headprobe.calibration.gradient_pass import ImageGradients, Scoring
from headprobe.describe.base import HeadStatistic, Observation, Subject, Undefined
from headprobe.masks.tables import SCORES
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.importance import ScoreSums
from headprobe.metrics.projection import HeadProjection
from headprobe.units.tree import NamedSums

GRADIENTS = ("gradient_abs", "gradient_abs_l2", "gradient_fisher", "taylor_zero", "taylor_mean")
OF_VARIANCE = ("variance_after_projection", "residual_variance_after_projection", "stable_rank")
DIRECT = "direct_logit"

NOTHING_CLASSIFIES = "nothing classifies images, so no loss has a gradient (--model.classifier none)"

Projections = Sequence[HeadProjection | None]
"""By layer the output projection by head; None where it is not linear."""


class ScoreStatistic(HeadStatistic):
    """Keeps the sums that need gradients or labels; `Moments` of the same calibration give the variances.

    Args:
        backbone: The model.
        folded: Makes the output projections of a model without some heads from its own.
        labelled: Whether a classifier has a loss that gradients could be taken of.
        no_direct: Why logits are no sums over heads, where another classifier than the model's own gives them.
    """

    def __init__(
        self,
        backbone: Any,
        folded: Callable[[Projections], Projections] = list,
        labelled: bool = True,
        no_direct: str = "",
    ) -> None:
        self._backbone, self._folded, self.labelled, self._elsewhere = backbone, folded, labelled, no_direct

    def options(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": "scores"}

    def begin(self, subject: Subject) -> None:
        """Look how the model reads its logits."""
        super().begin(subject)
        found = self._elsewhere or readout_of(self._backbone, subject.layout)
        self._no_direct = found if isinstance(found, str) else ""
        readout = None if isinstance(found, str) else found
        self.scoring = Scoring(readout, self._folded([fact.projection for fact in subject.facts]))

    def empty_sums(self) -> NamedSums:
        """Make empty sums."""
        return {"gradients": ScoreSums([(layer.heads, layer.head_dim) for layer in self.subject.layout.layers])}

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Take nothing from a forward pass alone."""

    def add(self, gradients: Sequence[ImageGradients], labelled: int, sums: NamedSums) -> None:
        """Add a forward and backward pass.

        Args:
            gradients: Of every layer.
            labelled: How many of its images have a label.
            sums: The sums of its unit.
        """
        own: ScoreSums = sums["gradients"]
        own.update(labelled)
        for one in gradients:
            own.add_gradients(one.layer, one.of_heads, one.of_slots)
            if one.direct is not None:
                own.add_direct(one.layer, one.direct)

    def undefined(self) -> Undefined:
        """Return which layers lack which scores, and why."""
        found: Undefined = {}
        for number, (layer, fact) in enumerate(zip(self.subject.layout.layers, self.subject.facts, strict=True)):
            reasons: dict[str, str] = {}
            if layer.masked_at_operator:
                reasons |= dict.fromkeys(GRADIENTS, "its heads are masked in the attention operator's output")
            if fact.projection is None:
                reasons |= dict.fromkeys(OF_VARIANCE, "the layer has no linear output projection of its own")
            elif layer.inner_norm:
                reasons |= dict.fromkeys(OF_VARIANCE, "a norm stands between the heads and the output projection")
            if self._no_direct:
                reasons[DIRECT] = self._no_direct
            for name, reason in reasons.items():
                found.setdefault(name, {}).setdefault(reason, []).append(number)
        unseen = self._whole is not None and not int(self.whole["gradients"].images)
        if unseen or not self.labelled:
            every = list(range(len(self.subject.layout.layers)))
            why = "no calibration image has a label" if self.labelled else NOTHING_CLASSIFIES
            found |= {name: {why: every} for name in (*GRADIENTS, DIRECT)}
        return found

    def scores(self, constants: Sequence[LayerConstants]) -> list[dict[str, FloatArray]]:
        """Return every layer's scores by name `[heads]`, NaN where they are not defined.

        Args:
            constants: Mean and covariance of every layer's slots over the same images.
        """
        sums: ScoreSums = self.whole["gradients"]
        means, undefined = sums.compute(), self.undefined()
        found, first = [], 0
        for number, layer in enumerate(constants):
            heads = slice(first, first + len(layer.mean))
            first = heads.stop
            of_layer = _by_gradient({name: values[heads] for name, values in means.items()}, layer, sums, number)
            projection = self.scoring.projections[number]
            if projection is not None:
                of_layer |= variance_scores(layer, projection.weight.double().cpu().numpy())
            for name in SCORES:
                if name not in of_layer or any(number in layers for layers in undefined.get(name, {}).values()):
                    of_layer[name] = np.full(len(layer.mean), np.nan)
            found.append({name: of_layer[name] for name in SCORES})
        return found


def _by_gradient(
    means: Mapping[str, FloatArray], layer: LayerConstants, sums: ScoreSums, number: int
) -> dict[str, FloatArray]:
    """Return the scores of one layer that follow from gradients, and direct logits; NaN without labels."""
    absolute = means["gradient_abs"]
    size = float(np.sqrt(np.square(absolute).sum()))
    towards_mean = (layer.mean * sums.mean_slot_gradient(number)).sum(axis=1)  # [heads]
    return {
        "gradient_abs": absolute,
        # a layer in which no head matters has no shares
        "gradient_abs_l2": absolute / size if size > 0 else np.zeros_like(absolute),
        "gradient_fisher": means["gradient_square"],
        "taylor_zero": -means["gradient"],
        "taylor_mean": towards_mean - means["gradient"],
        DIRECT: means["direct_logit"],
    }


def variance_scores(layer: LayerConstants, weight: FloatArray) -> dict[str, FloatArray]:
    """Return the scores of one layer that follow from its covariance.

    Args:
        layer: Mean and covariance of the slots.
        weight: The output projection by head `[heads, dim, head_dim]`.
    """
    heads, dim = layer.mean.shape
    found = np.full((3, heads), np.nan)  # variance, residual, stable rank
    covariance = layer.covariance
    if covariance is None:
        return dict(zip(OF_VARIANCE, found, strict=True))
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        output = weight[head] @ covariance[own, own] @ weight[head].T  # [dim, dim]
        total = float(np.trace(output))
        largest = float(np.linalg.eigvalsh(output)[-1]) if total > 0 else 0.0
        found[:, head] = total, _residual(layer, head, weight[head]), total / largest if largest > 0 else np.nan
    return dict(zip(OF_VARIANCE, found, strict=True))


def _residual(layer: LayerConstants, head: int, weight: FloatArray) -> float:
    """Return tr(W_h Cov(h given the layer's other heads) W_h'); the whole variance where the head is alone."""
    keep = [other != head for other in range(len(layer.mean))]
    prediction, covariance = predict_masked(layer, keep), layer.covariance
    if covariance is None:
        return float("nan")
    own, rest = np.ix_(prediction.masked, prediction.masked), np.ix_(prediction.kept, prediction.masked)
    left = covariance[own] - prediction.matrix @ covariance[rest]
    return max(0.0, float(np.trace(weight @ left @ weight.T)))


def score_rows(layers: Sequence[LayerConstants], images: int) -> list[dict[str, Any]]:
    """Return the rows of `scores.csv`, one per head; none where no scores were computed."""
    return [
        {"layer": number, "head": head, "images": images}
        | {name: float(layer.scores[name][head]) for name in SCORES if name in layer.scores}
        for number, layer in enumerate(layers)
        if layer.scores
        for head in range(len(layer.mean))
    ]
