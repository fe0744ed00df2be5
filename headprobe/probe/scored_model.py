"""The model that is scored: a timm model whose heads are known, and what reads its forward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.heads.refusals import refuse_gradients, refuse_unusable
from headprobe.backbone.outputs import Outputs, outputs_of
from headprobe.backbone.preparation import normalisation_decision, normalised
from headprobe.backbone.proofs.kept import Proven
from headprobe.backbone.weights import ModelSource, create_classifier, weights_digest
from headprobe.classifiers import choice
from headprobe.errors import UsageError
from headprobe.metrics.accuracy.paired_accuracy import restrict_classes
from headprobe.metrics.sums import double_device
from headprobe.text import Decision

if TYPE_CHECKING:
    from headprobe.classifiers.classifying import Classifying


class ScoredModel(lightning.LightningModule):
    """A timm model, the layout of its heads, and what its images are judged by: a classifier, or the feature alone.

    Args:
        source: What to build.
        classifier: The option `--model.classifier`; None for the model's own classifier.
        classifying: The classifier of that option; None for the model's own, and for none at all.
        semantics: What masking a head takes away.

    Attributes:
        backbone: The timm model.
        data_config: How its images are prepared, by timm's names.
        known: What earlier runs proved of this very model, where somebody kept it.
        valid_classes: Sorted classes that the data set has; logits of all others are left out. None keeps all.

    Raises:
        UsageError: The model cannot be built, or has no classifier where it needs one.
    """

    def __init__(
        self,
        source: ModelSource,
        classifier: str | None = None,
        classifying: "Classifying | None" = None,
        semantics: Semantics = "slot",
    ) -> None:
        super().__init__()
        self.source, self.semantics = source, semantics
        self.classifier, self.classifying = classifier, classifying
        built = create_classifier(source, own=classifier is None)
        self.backbone, self.data_config, self._own_classes = built[:3]
        self._options, self._own_names, self._decisions = built[3:]
        self._layout: HeadLayout | None = None
        self._outputs: Outputs | None = None
        self.known: Proven | None = None
        self.valid_classes: Tensor | None = None

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

    def normalised(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return uint8 images as the model takes them, in timm's own order of operations; in its dtype by default."""
        return normalised(images, self.data_config, dtype or next(self.backbone.parameters()).dtype)

    # -- classes ---------------------------------------------------------------------------------------------------

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

    # -- what a forward pass gives ---------------------------------------------------------------------------------

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

    def logits_of(self, outputs: Tensor) -> Tensor:
        """Return the logits `[..., classes]` that are scored, of a pass's outputs `[..., classes + features]`.

        Everything that scores goes through here, gradients too.
        """
        logits, features = self.outputs.split(outputs)
        if self.classifying is not None:
            return self.classifying.logits(features)
        return logits[..., : self.num_classes]

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return each image's NLL `[variants, images]`, float64, among the classes that are scored.

        Args:
            outputs: Of a pass, `[variants, images, classes + features]`.
            labels: `[images]`.
        """
        logits = self.logits_of(outputs)
        if self.valid_classes is not None:
            logits, labels = restrict_classes(logits, labels, self.valid_classes.to(logits.device))
        logits = logits.to(double_device(logits.device))
        chances = F.log_softmax(logits, dim=-1, dtype=torch.float64)  # [variants, images, classes]
        places = labels.to(logits.device).expand(len(logits), -1)[..., None]
        return -chances.gather(-1, places)[..., 0]

    # -- what a run says -------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The model's name in tables and figures, which says if its weights are random."""
        return f"{self.source.name} with random weights" if self.source.random else self.source.name

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
        return [
            *self._decisions,
            *(() if self.classifying is None else self.classifying.decisions(self._own_classes)),
            normalisation_decision(self.data_config, self.source.name),
            *self.layout.decisions(),
        ]
