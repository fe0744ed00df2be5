"""Where masks may join the growing pass: found from how the model calls its modules, and proven by trial."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import masked_logits
from headprobe.backbone.arguments import Path, batched, shapes
from headprobe.backbone.growing import GrowingPass, Join
from headprobe.backbone.heads import HeadLayout, parent_of
from headprobe.backbone.memory import is_out_of_memory
from headprobe.backbone.shortcuts import NO_SHORTCUTS, Shortcuts
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


@dataclass
class Company:
    """A growing pass of several masks whose logits are those of plain forward passes: what shortcuts are held to.

    Attributes:
        images: Noise `[images, channels, height, width]`, normalised.
        keep: `[masks, layers, max heads]`.
        logits: `[1 + masks, images, classes]`.
        rounding: What rounding alone changes, relative to the largest logit.
    """

    images: Tensor
    keep: Tensor
    logits: Tensor
    rounding: float


def find_joins(
    backbone: nn.Module,
    layout: HeadLayout,
    layers: Collection[int] | None = None,
    proven: list[Company] | None = None,
) -> tuple[Join, ...]:
    """Find, for every layer, the innermost module at whose input masks may join, proven by trial.

    Candidates go outward from the module around the attention layer to the whole model. Each is held to plain forward
    passes with one mask each on noise: alone, and in company of others and of copies, since a module that reads the
    batch's size in one place and uses it in another may go wrong with some numbers of rows only. A layer whose logits
    differ moves one candidate outward.

    Args:
        backbone: The model.
        layout: Its attention layers.
        layers: Layers at which masks will join; the joins of others are not tried and cannot be used. None tries all.
        proven: Is filled with the last trials, in which masks of all these layers joined, two of each.

    Raises:
        UsageError: Not even joining at the model's input reproduces plain forward passes: rows of a batch influence
            each other.
    """
    wanted = sorted(range(len(layout.layers)) if layers is None else layers)
    with evaluating(backbone), torch.inference_mode():
        calls = [record_calls(backbone, layout, images) for images in (2, 3)]
        candidates = [_candidates(layout, number, *calls) for number in range(len(layout.layers))]
        if not wanted:
            return tuple(options[0] for options in candidates)
        keep = _single_heads(layout, next(backbone.parameters()).device)
        images = example_images(backbone, layout.input_size, 2, seed=1)
        _refuse_mixing(backbone, layout, images)
        expected = {layer: masked_logits(backbone, layout, images, keep[layer]) for layer in wanted}
        plain: Tensor = backbone(images)
        trial = _Trial(backbone, layout, keep, images, plain, expected, _rounding(backbone, images, plain))
        joins = _settle(trial, candidates)
        if proven is not None:
            proven.extend(trial.companies[:-1])  # the last is the crowd, which says nothing of other layers
        return tuple(joins)


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
        companies: Trials that were right, since all masks were last tried together.
    """

    backbone: nn.Module
    layout: HeadLayout
    keep: Tensor
    images: Tensor
    plain: Tensor
    expected: dict[int, Tensor]
    rounding: float
    companies: list[Company] = field(default_factory=list)

    def wrong(self, joins: list[Join], layers: list[int]) -> set[int] | None:
        """Run the masks of these layers together; return those whose logits differ, None if the pass is impossible."""
        keep = self.keep[layers]
        found = growing_logits(self.backbone, self.layout, joins, keep, self.images)
        if found is None:
            return None
        wrong = {
            layer
            for logits, layer in zip(found[1:], layers, strict=True)
            if not agree(logits, self.expected[layer], self.tolerance(layer) if len(layers) == 1 else MOST_ROUNDING)
        }
        if not wrong:
            self.companies.append(Company(self.images, keep, found, self.rounding))
        return wrong

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
    trial.companies.clear()
    for company in _companies(trial.expected, joins, trial.images):
        wrong = trial.wrong(joins, company)
        if wrong is None:  # the shapes do not fit: which join's masks spoil the pass?
            return {_spoiler(trial, joins, company)}
        if wrong:
            return wrong
    return set()


def _companies(layers: Collection[int], joins: Sequence[Join], images: Tensor) -> list[list[int]]:
    """Return the layers whose masks are tried together: all twice over, and a crowd at the first join.

    As many at a time as `ROW_PIXELS` of these images allow.
    """
    masks = max(5, ROW_PIXELS // (images.shape[-2] * images.shape[-1]) // len(images)) - 1
    order = sorted(layers, key=lambda layer: joins[layer].place)
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


def growing_logits(
    backbone: nn.Module,
    layout: HeadLayout,
    joins: Sequence[Join],
    keep: Tensor,
    images: Tensor,
    shortcuts: Shortcuts = NO_SHORTCUTS,
) -> Tensor | None:
    """Return the growing pass's logits, or None where these joins or shortcuts give impossible shapes."""
    try:
        with GrowingPass(backbone, layout, joins, keep, shortcuts) as growing:
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


def record_calls(backbone: nn.Module, layout: HeadLayout, images: int) -> Calls:
    """Return for every module of a forward pass the place of its call and the shapes of its tensor arguments."""
    calls: Calls = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = dict(shapes((), args)) | dict(shapes((), kwargs))
            # a module called twice is no join point: masks would join twice
            calls[name] = (-1, {}) if name in calls else (len(calls), found)

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
        Join(name, two[name][0], batched(two[name][1], three[name][1]))
        for name in names
        if name in two and two[name][0] >= 0
    ]
