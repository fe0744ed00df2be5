"""Trial passes on noise: joins and shortcuts are taken only where these give the logits of plain passes.

`joins.py` finds the joins with them. Which shortcuts a model allows is found below.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.beginnings import Join
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.row_plan import Path, batched, shapes
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, PooledTokens, SharedCore, Shortcuts
from headprobe.backbone.heads.layout import HeadLayout, parent_of
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.outputs import Outputs, all_agree, parts_of
from headprobe.backbone.sandbox import MOST_ROUNDING, ROUNDING, evaluating, is_out_of_memory

Calls = dict[str, tuple[int, dict[Path, torch.Size]]]
"""For every module when its only call in a forward pass comes (-1 if it has several) and its arguments' shapes."""


ROW_PIXELS = 1 << 22
"""Pixels of all rows of a trial: 83 rows of 224 x 224. Larger images are tried in smaller company, to fit in memory."""


@dataclass
class Company:
    """A growing pass of several masks that gave the logits of plain forward passes; shortcuts must give the same.

    Attributes:
        images: Noise `[images, channels, height, width]`, normalised.
        keep: `[masks, layers, max heads]` bool, True = keep.
        logits: `[1 + masks, images, classes]`, the baseline first; with the feature behind them where it is read.
        rounding: How much rounding alone changes each part of these, relative to its largest number.
        outputs: What the parts are; without it they are one.
    """

    images: Tensor
    keep: Tensor
    logits: Tensor
    rounding: tuple[float, ...]
    outputs: Outputs | None = None


def single_heads(layout: HeadLayout, device: torch.device) -> Tensor:
    """Return masks `[layers, layers, max heads]`: mask l hits one head of layer l; more heads could hide an error."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.ones(layers, layers, most, dtype=torch.bool)
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, number, number % heads] = False
    return keep.to(device)


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5  # [mask, layer, head]
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True  # nothing before its layer
        keep[number, number, number % heads] = False  # at least one head there
        keep[:, number, heads:] = True  # places without a head
    return keep.to(device)


def rounding_of(plain: Sequence[Tensor], outputs: Outputs | None = None) -> tuple[float, ...]:
    """Return ten times the largest change, relative to the largest number, when images run in a batch of another size.

    Args:
        plain: The model's outputs `[images, ...]`, and these again, or the first of them, of other batches.
        outputs: What they are, which gives a number for each part; without it they are one.
    """
    expected, *others = plain
    changes = [_relative_parts(other, expected[: len(other)], outputs) for other in others]
    least = ROUNDING * torch.finfo(expected.dtype).eps
    return tuple(max(least, 10 * max(of_part)) for of_part in zip(*changes, strict=True))


def _relative_parts(found: Tensor, expected: Tensor, outputs: Outputs | None) -> list[float]:
    """Return the largest difference of each part of two outputs, relative to its largest number."""
    parts = zip(parts_of(outputs, found), parts_of(outputs, expected), strict=True)
    return [float((one - other).abs().max() / other.abs().max().clamp(min=1e-6)) for one, other in parts]


def growing_logits(
    backbone: nn.Module,
    layout: HeadLayout,
    joins: Sequence[Join],
    keep: Tensor,
    images: Tensor,
    shortcuts: Shortcuts = NO_SHORTCUTS,
) -> Tensor | None:
    """Return the growing pass's logits `[1 + masks, images, classes]`, None where rows do not fit together."""
    try:
        with GrowingPass(backbone, layout, joins, keep, shortcuts, once=False) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except (RuntimeError, ValueError) as error:  # torch and timm raise these for shapes that do not fit
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return None


def record_calls(backbone: nn.Module, images: Tensor) -> tuple[Calls, Tensor]:
    """Run images; return for every module when it is called with which shapes of tensors, and the model's outputs."""
    calls: Calls = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = dict(shapes((), args)) | dict(shapes((), kwargs))
            # nothing joins at a module that is called twice: it would join twice
            calls[name] = (-1, {}) if name in calls else (len(calls), found)

        return hook

    with _hooks(backbone, hook_of):
        found: Tensor = backbone(images)
    return calls, found


@contextmanager
def _hooks(backbone: nn.Module, hook_of: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Hold a pre-hook on every module."""
    with ExitStack() as stack:
        for name, module in backbone.named_modules():
            handle = module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def find_shortcuts(
    backbone: nn.Module,
    layout: HeadLayout,
    joins: Sequence[Join],
    proven: Sequence[Company],
    calls: Sequence[Calls],
) -> Shortcuts:
    """Find what the growing pass may leave out.

    Candidates follow from the order in which the model calls its modules. They are compared with growing passes without
    shortcuts: masks of all layers join in them, two of each. A shortcut that changes a logit by more than rounding, or
    gives shapes that do not fit, is not taken.

    Args:
        backbone: The model.
        layout: Its attention layers.
        joins: Where masks join.
        proven: The passes that proved the joins, from `find_joins`; without any there are no shortcuts.
        calls: How the model calls its modules with 2 and with 4 images, from there too.
    """
    if not proven:
        return NO_SHORTCUTS
    with evaluating(backbone), torch.inference_mode():
        trial = _Trial(backbone, layout, joins, proven)
        few, many = calls
        options = _core_options(layout, joins, few, many)
        pooled = _pooled_options(backbone, layout, few)

        # in most models the best option of everything is right at once
        best = {module: cores[0] for module, cores in options.items()}
        everything = Shortcuts(_cores(best), next(iter(pooled), None))
        found = everything if trial.right(everything) else _settled(trial, options, pooled)

        shared = replace(found, beginnings=True)
        return shared if trial.right_in_a_chain(shared) else found


@dataclass(frozen=True)
class _Trial:
    """The growing passes that shortcuts must reproduce; see `find_shortcuts`."""

    backbone: nn.Module
    layout: HeadLayout
    joins: Sequence[Join]
    proven: Sequence[Company]

    def right(self, shortcuts: Shortcuts) -> bool:
        """Return whether all logits stay the same."""
        for company in self.proven:
            try:
                found = growing_logits(self.backbone, self.layout, self.joins, company.keep, company.images, shortcuts)
            except (AssertionError, IndexError, TypeError):  # models raise these for too few tokens
                return False
            allowed = [min(part, MOST_ROUNDING) for part in company.rounding]
            if found is None or not all_agree(company.outputs, found, company.logits, allowed):
                return False
        return True

    def right_in_a_chain(self, shortcuts: Shortcuts) -> bool:
        """Return whether a mask's logits stay the same where its rows are copies of copies, from layer to layer.

        Each mask of the chain hits one layer more than the one before, of whose rows it begins as a copy; the last one
        has come through all joins, and is held to its plain forward pass.
        """
        company = self.proven[0]
        image = company.images[:1]
        most = max(2, ROW_PIXELS // (image.shape[-2] * image.shape[-1]) - 1)
        tried = [layer for layer, join in enumerate(self.joins) if join.proven]
        links = [tried[at * (len(tried) - 1) // (most - 1)] for at in range(most)] if len(tried) > most else tried
        keep = single_heads(self.layout, image.device)[links]  # [links, layers, max heads]
        keep = keep.long().cumprod(dim=0).bool()

        found = growing_logits(self.backbone, self.layout, self.joins, keep, image, shortcuts)
        expected = masked_logits(self.backbone, self.layout, image, keep[-1])
        allowed = [MOST_ROUNDING] * len(company.rounding)  # the number of rows, and so rounding, may be any
        return found is not None and all_agree(company.outputs, found[-1], expected, allowed)


def _settled(trial: _Trial, options: dict[str, list[SharedCore]], pooled: list[PooledTokens]) -> Shortcuts:
    """Return, for each shortcut, the first option that is right by itself, if all are right together."""
    right: dict[str, SharedCore] = {}
    for module, cores in options.items():
        for core in cores:
            if trial.right(Shortcuts(_cores({module: core}))):
                right[module] = core
                break

    shortcuts = Shortcuts(_cores(right))
    if not trial.right(shortcuts):
        shortcuts = NO_SHORTCUTS

    tried = (replace(shortcuts, pooled=one) for one in pooled)
    return next((one for one in tried if trial.right(one)), shortcuts)


def _cores(by_module: dict[str, SharedCore]) -> tuple[tuple[str, SharedCore], ...]:
    return tuple(by_module.items())


def _core_options(layout: HeadLayout, joins: Sequence[Join], few: Calls, many: Calls) -> dict[str, list[SharedCore]]:
    """Return, for every module at which masks join, what they may share, the longest stretch first."""
    options: dict[str, list[SharedCore]] = {}
    for join in {join.module: join for join in joins if join.proven}.values():
        number = _first_inside(layout, join.module)
        if number is None or layout.layers[number].masked_at_operator:
            continue

        for entry in _entries(layout, number, few):
            arguments = batched(few[entry][1], many[entry][1])
            if few[entry][0] >= join.place and arguments:  # masks have joined when the stretch begins
                options.setdefault(join.module, []).append(SharedCore(number, entry, arguments))
    return options


def _pooled_options(backbone: nn.Module, layout: HeadLayout, few: Calls) -> list[PooledTokens]:
    """Return which tokens may be enough behind the last attention, if the model pools its class token."""
    last = layout.layers[-1]
    block = parent_of(last.name)
    if getattr(backbone, "global_pool", None) != "token" or not layout.prefix_tokens or last.window or not block:
        return []
    entries = _entries(layout, len(layout.layers) - 1, few)
    fused = last.operator is not None and last.operator.fused
    few_queries = [True, False] if fused else [False]
    return [PooledTokens(block, entry, layout.prefix_tokens, queries) for entry in entries for queries in few_queries]


def _first_inside(layout: HeadLayout, module: str) -> int | None:
    """Return the first layer inside a module; a module that is an attention layer counts as inside itself."""
    names = [layer.name for layer in layout.layers]
    return next((at for at, name in enumerate(names) if not module or f"{name}.".startswith(f"{module}.")), None)


def _entries(layout: HeadLayout, layer: int, calls: Calls) -> list[str]:
    """Return the module that is called just before an attention layer inside the same block, if any, and the layer."""
    name = layout.layers[layer].name
    if name not in calls or calls[name][0] < 0:
        return []

    block, own_place = parent_of(name), calls[name][0]
    siblings = []
    for other, (place, _) in calls.items():
        if parent_of(other) == block and 0 <= place < own_place:
            siblings.append(other)
    before = max(siblings, key=lambda other: calls[other][0], default=None)
    return [name] if before is None or before == block else [before, name]
