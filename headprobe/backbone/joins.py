"""Where masks may join the growing pass: found from how the model calls its modules, and proven by trial."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import masked_logits
from headprobe.backbone.growing import GrowingPass, Join, Path
from headprobe.backbone.heads import HeadLayout, parent_of
from headprobe.backbone.trace import evaluating, example_images
from headprobe.errors import UsageError

ROUNDING = 100  # times the dtype's eps: 1.2e-5 in float32
MOST_ROUNDING = 1e-3

Calls = dict[str, tuple[int, dict[Path, torch.Size]]]
"""For every module the place of its only call in a forward pass (-1 if it has several) and its arguments' shapes."""


def find_joins(backbone: nn.Module, layout: HeadLayout) -> tuple[Join, ...]:
    """Find, for every layer, the innermost module at whose input masks may join, proven by trial.

    Candidates go outward from the module around the attention layer to the whole model. Each is held to plain forward
    passes with one mask each on noise; a layer whose logits differ moves one candidate outward.

    Raises:
        UsageError: Not even joining at the model's input reproduces plain forward passes: rows of a batch influence
            each other.
    """
    with evaluating(backbone), torch.inference_mode():
        calls = [_record_calls(backbone, layout, images) for images in (2, 3)]
        candidates = [_candidates(layout, number, *calls) for number in range(len(layout.layers))]
        keep = trial_masks(layout, next(backbone.parameters()).device)
        images = example_images(backbone, layout.input_size, 2, seed=1)
        expected = torch.stack([masked_logits(backbone, layout, images, mask) for mask in keep])
        trial = _Trial(keep, images, expected, _tolerance(backbone, images, len(keep)))
        return tuple(_settle(backbone, layout, candidates, trial))


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True
        keep[number, number, number % heads] = False
        keep[:, number, heads:] = True
    return keep.to(device)


@dataclass(frozen=True)
class _Trial:
    """What joins are held to.

    Attributes:
        keep: `[masks, layers, max heads]`, mask l beginning at layer l.
        images: Noise.
        expected: Logits of plain forward passes, `[masks, images, classes]`.
        tolerance: Largest difference, relative to the largest logit.
    """

    keep: Tensor
    images: Tensor
    expected: Tensor
    tolerance: float


def _tolerance(backbone: nn.Module, images: Tensor, masks: int) -> float:
    """Return what rounding alone may change where the same images run among others: more in deep convolutional nets.

    It has a bound: where rows influence each other for other reasons than rounding, that is no tolerance but the fault.
    """
    alone: Tensor = backbone(images)
    among: Tensor = backbone(images.repeat(1 + masks, *[1] * (images.dim() - 1)))
    differs = (torch.unflatten(among, 0, (1 + masks, len(images))) - alone).abs().max()
    noise = float(differs / alone.abs().max().clamp(min=1e-6))
    return min(max(ROUNDING * torch.finfo(alone.dtype).eps, 10 * noise), MOST_ROUNDING)


def _settle(backbone: nn.Module, layout: HeadLayout, candidates: list[list[Join]], trial: _Trial) -> list[Join]:
    """Move layers outward until every mask's logits agree with its plain forward pass."""
    chosen = [0] * len(candidates)
    while True:
        joins = [options[choice] for options, choice in zip(candidates, chosen, strict=True)]
        wrong = _disagreeing(backbone, layout, joins, trial)
        if not wrong:
            return joins
        for layer in wrong:
            chosen[layer] += 1
            if chosen[layer] >= len(candidates[layer]):
                raise UsageError(
                    f"model {layout.model!r}: rows of one batch influence each other at {layout.layers[layer].name!r}, "
                    "so several masks cannot share a forward pass"
                )


def _disagreeing(backbone: nn.Module, layout: HeadLayout, joins: list[Join], trial: _Trial) -> list[int]:
    """Return the layers whose mask gives other logits in the growing pass than in its plain forward pass."""
    everyone = list(range(len(joins)))
    found = _growing_logits(backbone, layout, joins, trial.keep, trial.images)
    if found is not None:
        return [layer for layer in everyone if not agree(found[1 + layer], trial.expected[layer], trial.tolerance)]
    wrong = []  # a join with impossible shapes spoils the whole pass: try the layers one by one
    for layer in everyone:
        alone = _growing_logits(backbone, layout, joins, trial.keep[layer : layer + 1], trial.images)
        if alone is None or not agree(alone[1], trial.expected[layer], trial.tolerance):
            wrong.append(layer)
    return wrong


def _growing_logits(
    backbone: nn.Module, layout: HeadLayout, joins: list[Join], keep: Tensor, images: Tensor
) -> Tensor | None:
    """Return the growing pass's logits, or None where these joins give impossible shapes."""
    try:
        with GrowingPass(backbone, layout, joins, keep) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except (RuntimeError, ValueError):  # what torch and timm raise for rows that do not fit, together or into memory
        return None


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Say whether two outputs are equal up to rounding.

    Args:
        found: An output.
        expected: What it is to be.
        tolerance: Largest difference relative to the largest expected number; without it that of their dtype.
    """
    relative = ROUNDING * torch.finfo(expected.dtype).eps if tolerance is None else tolerance
    allowed = relative * float(expected.abs().max().clamp(min=1e-6))
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())


def _record_calls(backbone: nn.Module, layout: HeadLayout, images: int) -> Calls:
    """Return for every module of a forward pass the place of its call and the shapes of its tensor arguments."""
    calls: Calls = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes = dict(_shapes((), args)) | dict(_shapes((), kwargs))
            # a module called twice is no join point: masks would join twice
            calls[name] = (-1, {}) if name in calls else (len(calls), shapes)

        return hook

    with _hooks(backbone, hook_of):
        backbone(example_images(backbone, layout.input_size, images))
    return calls


@contextmanager
def _hooks(backbone: nn.Module, hook_of: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Hold a pre-hook on every module."""
    with ExitStack() as stack:
        for name, module in backbone.named_modules():
            handle = module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _candidates(
    layout: HeadLayout,
    layer: int,
    two: Calls,
    three: Calls,
) -> list[Join]:
    """Return the modules around a layer, innermost first, with the arguments that grow with the number of images."""
    attention = layout.layers[layer]
    name = attention.name
    names = [name] if attention.joins_itself else []
    while name:
        name = parent_of(name)
        names.append(name)
    return [
        Join(name, two[name][0], _batched(two[name][1], three[name][1]))
        for name in names
        if name in two and two[name][0] >= 0
    ]


def _batched(two: dict[Path, torch.Size], three: dict[Path, torch.Size]) -> tuple[tuple[Path, int], ...]:
    """Return the tensor arguments that grow from 2 to 3 images as the batch does, with their rows per image."""
    batched = []
    for path, shape in two.items():
        if shape and path in three and 2 * three[path][0] == 3 * shape[0] and shape[0] % 2 == 0:
            batched.append((path, shape[0] // 2))
    return tuple(batched)


def _shapes(path: Path, value: Any) -> Iterator[tuple[Path, torch.Size]]:
    """Yield the places and shapes of all tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield path, value.shape
    elif type(value) in (tuple, list):
        for key, item in enumerate(value):
            yield from _shapes((*path, key), item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from _shapes((*path, key), item)
