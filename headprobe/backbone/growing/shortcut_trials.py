"""Which shortcuts a model allows: tried on noise, and taken only where the logits stay the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from headprobe.backbone.growing.growing_pass import Join
from headprobe.backbone.growing.row_plan import batched
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, PooledTokens, SharedCore, Shortcuts
from headprobe.backbone.growing.trials import Calls, Company, growing_logits, record_calls
from headprobe.backbone.heads.layout import HeadLayout, parent_of
from headprobe.backbone.sandbox import MOST_ROUNDING, agree, evaluating


def find_shortcuts(
    backbone: nn.Module, layout: HeadLayout, joins: Sequence[Join], proven: Sequence[Company]
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
    """
    if not proven:
        return NO_SHORTCUTS
    with evaluating(backbone), torch.inference_mode():
        trial = _Trial(backbone, layout, joins, proven)
        two, three = (record_calls(backbone, layout, images) for images in (2, 3))
        options = _core_options(layout, joins, two, three)
        pooled = _pooled_options(backbone, layout, two)

        # in most models the best option of everything is right at once
        best = {module: cores[0] for module, cores in options.items()}
        everything = Shortcuts(_cores(best), next(iter(pooled), None))
        return everything if trial.right(everything) else _settled(trial, options, pooled)


@dataclass(frozen=True)
class _Trial:
    """The growing passes that shortcuts must reproduce; see `find_shortcuts`."""

    backbone: nn.Module
    layout: HeadLayout
    joins: Sequence[Join]
    proven: Sequence[Company]

    def right(self, shortcuts: Shortcuts) -> bool:
        """Say whether all logits stay the same."""
        for company in self.proven:
            try:
                found = growing_logits(self.backbone, self.layout, self.joins, company.keep, company.images, shortcuts)
            except (AssertionError, IndexError, TypeError):  # models raise these for too few tokens
                return False
            if found is None or not agree(found, company.logits, min(company.rounding, MOST_ROUNDING)):
                return False
        return True


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


def _core_options(layout: HeadLayout, joins: Sequence[Join], two: Calls, three: Calls) -> dict[str, list[SharedCore]]:
    """Return, for every module at which masks join, what they may share, the longest stretch first."""
    options: dict[str, list[SharedCore]] = {}
    for join in {join.module: join for join in joins if join.proven}.values():
        number = _first_inside(layout, join.module)
        if number is None or layout.layers[number].masked_at_operator:
            continue

        for entry in _entries(layout, number, two):
            arguments = batched(two[entry][1], three[entry][1])
            if two[entry][0] >= join.place and arguments:  # masks have joined when the stretch begins
                options.setdefault(join.module, []).append(SharedCore(number, entry, arguments))
    return options


def _pooled_options(backbone: nn.Module, layout: HeadLayout, two: Calls) -> list[PooledTokens]:
    """Return which tokens may be enough behind the last attention, if the model pools its class token."""
    last = layout.layers[-1]
    block = parent_of(last.name)
    if getattr(backbone, "global_pool", None) != "token" or not layout.prefix_tokens or last.window or not block:
        return []
    entries = _entries(layout, len(layout.layers) - 1, two)
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
