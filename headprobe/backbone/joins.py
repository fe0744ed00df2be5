"""Where masks may join the growing pass: found from how the model calls its modules, and proven by trial."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import masked_logits
from headprobe.backbone.growing import GrowingPass, Join, Path
from headprobe.backbone.heads import HeadLayout, parent_of
from headprobe.backbone.memory import is_out_of_memory
from headprobe.backbone.trace import evaluating, example_images
from headprobe.errors import UsageError

ROUNDING = 100  # times the dtype's eps: 1.2e-5 in float32
SAME_SHAPE = 10  # times the dtype's eps, where rows have the same place in a batch of the same shape
COARSEST = 0.05  # in half precision
MOST_ROUNDING = 1e-3
PART_OF_EFFECT = 5e-5
CROWD = 6
"""Copies of one mask that join at once: with the trunk seven times the rows, by which few shapes divide by chance."""
ROW_PIXELS = 1 << 22
"""Pixels of all rows of a trial: 83 rows of 224 x 224. Larger images are tried in smaller company, to fit in memory."""

Calls = dict[str, tuple[int, dict[Path, torch.Size]]]
"""For every module the place of its only call in a forward pass (-1 if it has several) and its arguments' shapes."""


def find_joins(backbone: nn.Module, layout: HeadLayout, layers: Collection[int] | None = None) -> tuple[Join, ...]:
    """Find, for every layer, the innermost module at whose input masks may join, proven by trial.

    Candidates go outward from the module around the attention layer to the whole model. Each is held to plain forward
    passes with one mask each on noise: alone, and in company of others and of copies, since a module that reads the
    batch's size in one place and uses it in another may go wrong with some numbers of rows only. A layer whose logits
    differ moves one candidate outward.

    Args:
        backbone: The model.
        layout: Its attention layers.
        layers: Layers at which masks will join; the joins of others are not tried and cannot be used. None tries all.

    Raises:
        UsageError: Not even joining at the model's input reproduces plain forward passes: rows of a batch influence
            each other.
    """
    wanted = sorted(range(len(layout.layers)) if layers is None else layers)
    with evaluating(backbone), torch.inference_mode():
        calls = [_record_calls(backbone, layout, images) for images in (2, 3)]
        candidates = [_candidates(layout, number, *calls) for number in range(len(layout.layers))]
        if not wanted:
            return tuple(options[0] for options in candidates)
        keep = _single_heads(layout, next(backbone.parameters()).device)
        images = example_images(backbone, layout.input_size, 2, seed=1)
        _refuse_mixing(backbone, layout, images)
        expected = {layer: masked_logits(backbone, layout, images, keep[layer]) for layer in wanted}
        plain: Tensor = backbone(images)
        trial = _Trial(backbone, layout, keep, images, plain, expected, _rounding(backbone, images, plain))
        return tuple(_settle(trial, candidates))


def _refuse_mixing(backbone: nn.Module, layout: HeadLayout, images: Tensor) -> None:
    """Raise a UsageError where an image's logits depend on the other image of its batch.

    The batch's shape stays the same, so rounding does too: what differs is influence.
    """
    first, other = images
    among_others = (torch.stack([first, one]) for one in (other, other.flip(-1) + 1))
    found, expected = (backbone(batch)[0] for batch in among_others)
    if not agree(found, expected, SAME_SHAPE * torch.finfo(expected.dtype).eps):
        raise UsageError(
            f"model {layout.model!r}: rows of one batch influence each other: an image's logits change by "
            f"{float((found - expected).abs().max()):.1g} with the other image of its batch, so several masks cannot "
            "share a forward pass"
        )


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True
        keep[number, number, number % heads] = False
        keep[:, number, heads:] = True
    return keep.to(device)


def _single_heads(layout: HeadLayout, device: torch.device) -> Tensor:
    """Return masks `[layers, layers, max heads]`, mask l of one head of layer l: others could hide an error there."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.ones(layers, layers, most, dtype=torch.bool)
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, number, number % heads] = False
    return keep.to(device)


@dataclass(frozen=True)
class _Trial:
    """What joins are held to.

    Attributes:
        backbone: The model.
        layout: Its attention layers.
        keep: `[layers, layers, max heads]`, mask l of one head of layer l.
        images: Noise.
        plain: Logits `[images, classes]` without a mask.
        expected: Logits of the plain forward pass with mask l, for the layers that are tried.
        rounding: What rounding alone changes, relative to the largest logit.
    """

    backbone: nn.Module
    layout: HeadLayout
    keep: Tensor
    images: Tensor
    plain: Tensor
    expected: dict[int, Tensor]
    rounding: float

    def wrong(self, joins: list[Join], layers: list[int]) -> set[int] | None:
        """Run the masks of these layers together; return those whose logits differ, None if the pass is impossible."""
        found = _growing_logits(self.backbone, self.layout, joins, self.keep[layers], self.images)
        if found is None:
            return None
        return {
            layer
            for logits, layer in zip(found[1:], layers, strict=True)
            if not agree(logits, self.expected[layer], self.tolerance(layer) if len(layers) == 1 else MOST_ROUNDING)
        }

    def tolerance(self, layer: int) -> float:
        """Return how much a layer's logits may differ where its mask joins alone, relative to the largest.

        Rounding depends on the number of rows, more so in deep convolutional nets; a wrong join differs by what the
        mask changes, or by other images. So a small part of the mask's own effect is allowed. There is a bound: where
        rows influence each other for other reasons than rounding, that is no tolerance but the fault.
        """
        expected = self.expected[layer]
        effect = float((expected - self.plain).abs().max() / expected.abs().max().clamp(min=1e-6))
        return min(max(self.rounding, min(effect / 20, PART_OF_EFFECT)), MOST_ROUNDING)


def _rounding(backbone: nn.Module, images: Tensor, plain: Tensor) -> float:
    """Return ten times what changes, relative to the largest logit, where the same images run among others."""
    among: Tensor = backbone(torch.cat([images, images]))
    differs = (torch.unflatten(among, 0, (2, len(images))) - plain).abs().max()
    return max(ROUNDING * torch.finfo(plain.dtype).eps, 10 * float(differs / plain.abs().max().clamp(min=1e-6)))


def _settle(trial: _Trial, candidates: list[list[Join]]) -> list[Join]:
    """Move layers outward until every mask's logits agree with its plain forward pass."""
    chosen = [0] * len(candidates)
    agreed: set[tuple[int, int]] = set()  # layers that were right alone, with the candidate
    while True:
        joins = [options[choice] for options, choice in zip(candidates, chosen, strict=True)]
        untried = [layer for layer in trial.expected if (layer, chosen[layer]) not in agreed]
        wrong = {layer for layer in untried if trial.wrong(joins, [layer]) != set()}
        agreed |= {(layer, chosen[layer]) for layer in untried if layer not in wrong}
        wrong = wrong or _wrong_together(trial, joins)
        if not wrong:
            return [replace(join, proven=layer in trial.expected) for layer, join in enumerate(joins)]
        for layer in wrong:
            chosen[layer] += 1
            if chosen[layer] >= len(candidates[layer]):
                name = trial.layout.layers[layer].name
                raise UsageError(
                    f"model {trial.layout.model!r}: rows of one batch influence each other at {name!r}, "
                    "so several masks cannot share a forward pass"
                )


def _wrong_together(trial: _Trial, joins: list[Join]) -> set[int]:
    """Return layers whose masks go wrong in company, each of them being right alone."""
    height, width = trial.images.shape[-2:]
    masks = max(5, ROW_PIXELS // (height * width) // len(trial.images)) - 1
    for company in _companies(sorted(trial.expected, key=lambda layer: joins[layer].place), masks):
        wrong = trial.wrong(joins, company)
        if wrong is None:  # the shapes do not fit: which join's masks spoil the pass?
            return {_spoiler(trial, joins, company)}
        if wrong:
            return wrong
    return set()


def _companies(order: list[int], masks: int) -> list[list[int]]:
    """Return whose masks are tried together, `masks` at most: all twice over, and a crowd at the first join."""
    share = masks // 2
    pairs = [
        [layer for layer in order[start : start + share] for _ in range(2)] for start in range(0, len(order), share)
    ]
    return [*pairs, order[:1] * min(CROWD, masks)]


def _spoiler(trial: _Trial, joins: list[Join], company: list[int]) -> int:
    """Return the first layer, in the order of their joins, whose masks make the pass impossible or wrong."""
    order = list(dict.fromkeys(company))
    for count in range(1, len(order)):
        if trial.wrong(joins, [layer for layer in company if layer in order[:count]]) != set():
            return order[count - 1]
    return order[-1]


def _growing_logits(
    backbone: nn.Module, layout: HeadLayout, joins: list[Join], keep: Tensor, images: Tensor
) -> Tensor | None:
    """Return the growing pass's logits, or None where these joins give impossible shapes."""
    try:
        with GrowingPass(backbone, layout, joins, keep) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except (RuntimeError, ValueError) as error:  # what torch and timm raise for rows that do not fit together
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return None


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Say whether two outputs are equal up to rounding.

    Args:
        found: An output.
        expected: What it is to be.
        tolerance: Largest difference relative to the largest expected number; without it that of their dtype.
    """
    relative = min(ROUNDING * torch.finfo(expected.dtype).eps, COARSEST) if tolerance is None else tolerance
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
