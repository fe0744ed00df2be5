"""What one forward pass gives: a model's logits and, behind them, timm's pooled feature, in one tensor.

timm pools a feature and classifies it in `forward_head`. While a context is open, that method of a model gives both:
`[rows, classes + features]`. Whatever runs the model (the growing pass, its joins and shortcuts, gradients) then works
on features as on logits, without knowing of them. The feature is `forward_head(..., pre_logits=True)`, proven on noise.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headprobe.backbone.sandbox import agree, evaluating, example_images
from headprobe.errors import RunError, UsageError
from headprobe.text import Decision, first_line

Way = Literal["output", "classifier", "twice"]
"""The feature is the model's own output, or what enters its classifier; or `forward_head` is called for each."""

TOWERS = re.compile(r"clip|pe_core")
"""timm's names of image towers, whose last projection leads into the space of texts: CLIP's and its kin."""

FINE_TUNED = re.compile(r"_ft_in\d+k")
"""Tags of towers that got a classifier afterwards."""


@dataclass(frozen=True)
class Outputs:
    """How the logits and the feature of a model are read from one forward pass.

    Attributes:
        classes: Leading columns that are logits; 0 for a model without a classifier.
        features: Columns behind them that are the pooled feature; 0 where it cannot be read.
        way: How the feature is read.
        reason: Why the feature cannot be read; empty where it can.
    """

    classes: int
    features: int
    way: Way = "output"
    reason: str = ""

    @contextmanager
    def reading(self, backbone: nn.Module) -> Iterator[None]:
        """Let the model, or a copy of it, give logits and feature while the context is open."""
        if self.way == "output" or not self.features:
            yield
            return
        with _heading(backbone, _classified if self.way == "classifier" else _pooled_twice):
            yield

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[..., classes]` and features `[..., features]` of outputs `[..., classes + features]`.

        Raises:
            RunError: The outputs have another width: the model was not read.
        """
        if outputs.shape[-1] != self.classes + self.features:
            raise RunError(
                f"the model must give {self.classes} logits and {self.features} numbers of its feature, got "
                f"{outputs.shape[-1]}"
            )
        return outputs[..., : self.classes], outputs[..., self.classes :]

    def parts(self, outputs: Tensor) -> list[Tensor]:
        """Return logits and feature, whichever there are: each has a size of its own, which rounding goes with."""
        return [part for part in self.split(outputs) if part.shape[-1]]


def parts_of(outputs: Outputs | None, tensor: Tensor) -> list[Tensor]:
    """Return the parts of a model's outputs that are compared each by itself; without `outputs` they are one."""
    return [tensor] if outputs is None else outputs.parts(tensor)


def all_agree(outputs: Outputs | None, found: Tensor, expected: Tensor, tolerances: Sequence[float]) -> bool:
    """Return whether every part of two outputs is equal up to its tolerance, relative to its own largest number."""
    if found.shape != expected.shape:
        return False
    pairs = zip(parts_of(outputs, found), parts_of(outputs, expected), tolerances, strict=True)
    return all(agree(one, other, tolerance) for one, other, tolerance in pairs)


def embeds(backbone: nn.Module, own_weights: bool = False) -> bool:
    """Return whether a model's classifier is a projection into the space of texts, as CLIP's towers have one.

    timm's configuration does not say so: the name does, and the width in it. In weights of a user's own, a bias that is
    not zero makes it a classifier: towers have none.

    Args:
        backbone: A timm model.
        own_weights: Whether its weights are a user's file and not timm's own.
    """
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    name, tag = str(config.get("architecture") or ""), str(config.get("tag") or "")
    width = getattr(backbone, "num_classes", 0)
    if not width or width != config.get("num_classes") or FINE_TUNED.search(tag):
        return False
    if not TOWERS.search(f"{name}.{tag}"):
        return False
    bias = getattr(_classifier(backbone), "bias", None)
    return not (own_weights and isinstance(bias, Tensor) and bool(bias.any()))


def no_classifier(name: str, embedding: int = 0) -> UsageError:
    """Return the refusal of a model that has no classifier of its own.

    Args:
        name: The model's name.
        embedding: Width of the projection that it has in its place; 0 where there is none.
    """
    why = f"in its place is {embedding_in_words(embedding)}" if embedding else "its weights were trained without one"
    return UsageError(
        f"model {name!r} has no classifier to score: {why}; choose --model.classifier class-mean or knn, fitted on "
        "labelled calibration images, FILE.safetensors with a weight for each class, or none, which needs no labels; "
        "or give the weights of a fine-tuned model with --model.weights FILE.safetensors"
    )


def embedding_in_words(width: int) -> str:
    """Return what the output of a model is that was trained beside a model of texts."""
    return f"a projection into the {width} numbers of the space of texts: an embedding, which is its feature"


def class_names(backbone: nn.Module, num_classes: int) -> tuple[list[str] | None, list[Decision]]:
    """Return the names of a model's classes from its configuration (`label_names`).

    Returns:
        The names in the classifier's order, None if it has none for each class, or one name for two classes; and what
        was decided where it has names that are not used.
    """
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    written = config.get("label_names")
    if not written or not isinstance(written, Mapping | list | tuple):
        return None, []
    names: list[Any] = list(written)
    if isinstance(written, Mapping):  # {number: name}, the numbers as text where they come from JSON
        numbered = {int(number): name for number, name in written.items() if str(number).isdecimal()}
        names = [numbered[number] for number in sorted(numbered)]
        if sorted(numbered) != list(range(num_classes)):
            names = names[: num_classes - 1]  # too few, whatever their number
    texts = [str(name) for name in names]
    twice = [name for name, times in Counter(texts).items() if times > 1 and name]
    if len(texts) == num_classes and not twice:
        return texts, []
    why = (
        f"several classes are called {twice[0]!r}"
        if len(texts) == num_classes
        else f"they are {len(written):,}, not one for each of the model's {num_classes:,} classes"
    )
    return None, [
        Decision("names of classes", f"label_names of the model's configuration are not used: {why}", shown=True)
    ]


def outputs_of(backbone: nn.Module, input_size: tuple[int, int, int], embedding: bool = False) -> Outputs:
    """Find out how a model's logits and pooled feature are read, proven on noise.

    The logits must be those of a plain pass bit for bit, and the feature what timm gives with `pre_logits=True`.

    Args:
        backbone: A timm model.
        input_size: `(channels, height, width)` of its images.
        embedding: Whether its output is a feature although it has a classifier (`embeds`).
    """
    images = example_images(backbone, input_size, 2, seed=3)
    with evaluating(backbone), torch.inference_mode():
        plain = backbone(images)
        if not isinstance(plain, Tensor) or plain.dim() != 2:
            shape = list(plain.shape[1:]) if isinstance(plain, Tensor) else type(plain).__name__
            return Outputs(0, 0, reason=f"the model gives {shape} for an image, not one vector")
        width = plain.shape[1]
        if embedding or not getattr(backbone, "num_classes", width):
            return Outputs(0, width)
        reasons = []
        for way in _ways(backbone):
            found = _tried(backbone, way, images, plain)
            if isinstance(found, int):
                return Outputs(width, found, way)
            reasons.append(found)
        return Outputs(width, 0, reason=reasons[0])


def _ways(backbone: nn.Module) -> list[Way]:
    """Return the ways to try; a single classifier's input costs nothing to keep."""
    return ["classifier", "twice"] if isinstance(_classifier(backbone), nn.Module) else ["twice"]


def _tried(backbone: nn.Module, way: Way, images: Tensor, plain: Tensor) -> int | str:
    """Return the width of the feature that is read this way, or the reason why it is not.

    Args:
        backbone: The model.
        way: The way.
        images: Noise `[images, channels, height, width]`.
        plain: Its logits `[images, classes]`.
    """
    if not callable(getattr(type(backbone), "forward_head", None)):
        return "the model has no forward_head that pools a feature"
    if "forward_head" in vars(backbone):
        return "its forward_head was replaced by another one"
    pooled: list[Any] = []
    with _heading(backbone, _kept_pooled(pooled, weightless=way == "twice")):
        try:
            backbone(images)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"its forward_head gives no feature ({first_line(error)})"
    if len(pooled) != 1 or not isinstance(pooled[0], Tensor):
        return f"its forward pass calls forward_head {len(pooled)} times, or that gives no single feature"
    if pooled[0].dim() < 2 or pooled[0].shape[1:].numel() != pooled[0].shape[1]:
        return f"its forward_head pools {list(pooled[0].shape[1:])} for an image, not one vector"
    feature = pooled[0].flatten(1)  # [images, features]
    outputs = Outputs(plain.shape[1], feature.shape[1], way)
    with outputs.reading(backbone):
        try:
            found = backbone(images)
        except (AssertionError, RunError, RuntimeError, TypeError, ValueError) as error:
            return f"its feature cannot be read beside its logits ({first_line(error)})"
    if not isinstance(found, Tensor) or found.dim() != 2:
        return "its forward pass changes what forward_head gives"
    if found.shape[1] != outputs.classes + outputs.features:
        return "what enters its classifier is not timm's pooled feature"
    logits, features = outputs.split(found)
    if not torch.equal(logits, plain) or not torch.equal(features, feature):
        return "what enters its classifier is not timm's pooled feature"
    return outputs.features


@contextmanager
def _heading(backbone: nn.Module, head: Callable[..., Any]) -> Iterator[None]:
    """Replace a model's `forward_head` while the context is open.

    The method is bound to the model: a copy that is made meanwhile has one of its own.
    """
    vars(backbone)["forward_head"] = MethodType(head, backbone)
    try:
        yield
    finally:
        vars(backbone).pop("forward_head", None)


def _classified(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return logits and, behind them, what entered the classifier."""
    seen: list[Tensor] = []
    # for this call only: other hooks may be set aside meanwhile
    handle = model.get_classifier().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits: Tensor = type(model).forward_head(model, *args, **kwargs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RunError(f"the classifier must be called once in a forward pass, got {len(seen)} calls")
    return torch.cat([logits, seen[0].flatten(1)], dim=-1)


def _pooled_twice(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return logits and, behind them, what the model pools for several classifiers together."""
    logits: Tensor = type(model).forward_head(model, *args, **kwargs)
    feature: Tensor = type(model).forward_head(model, *args, **{**kwargs, "pre_logits": True})
    return torch.cat([logits, feature.flatten(1)], dim=-1)


def _kept_pooled(pooled: list[Any], weightless: bool) -> Callable[..., Any]:
    """Return a `forward_head` that also keeps timm's own feature.

    Args:
        pooled: Takes the feature.
        weightless: Refuse a feature that modules with weights pool: attention among them must run once.
    """

    def head(model: Any, *args: Any, **kwargs: Any) -> Any:
        logits = type(model).forward_head(model, *args, **kwargs)
        with _refusing_weights(model) if weightless else ExitStack():
            pooled.append(type(model).forward_head(model, *args, **{**kwargs, "pre_logits": True}))
        return logits

    return head


@contextmanager
def _refusing_weights(model: nn.Module) -> Iterator[None]:
    def refuse(module: nn.Module, _: Any) -> None:
        raise ValueError(f"a {type(module).__name__} with weights pools it, which would run twice")

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(refuse).remove)
        yield


def _classifier(backbone: nn.Module) -> Any:
    """Return a model's classifier, several for models with several, None where timm knows of none."""
    get = getattr(backbone, "get_classifier", None)
    found = get() if callable(get) else None
    return None if isinstance(found, nn.ModuleList | nn.Identity) else found
