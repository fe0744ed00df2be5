"""Where masks may join the growing pass: found from how the model calls its modules, and proven by trial."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.beginnings import Join
from headprobe.backbone.growing.row_plan import batched
from headprobe.backbone.growing.trials import (
    ROW_PIXELS,
    Calls,
    Company,
    growing_logits,
    record_calls,
    rounding_of,
    single_heads,
)
from headprobe.backbone.heads.layout import HeadLayout, parent_of
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.outputs import Outputs, all_agree, parts_of
from headprobe.backbone.sandbox import MOST_ROUNDING, SAME_SHAPE, evaluating, example_images
from headprobe.errors import UsageError

PART_OF_EFFECT = 5e-5
"""How much a mask that joins alone may differ on account of its own effect, relative to the largest logit."""


CROWD = 6
"""Copies of one mask that join at once: seven times the trunk's rows, a number that divides few shapes by chance."""


BOTH = slice(0, 2)
"""Both images of the trials."""


NOWHERE = Join("", 0, ())
"""The join of a layer at which no mask joins."""


class FoundJoins(NamedTuple):
    """Where masks join, and the trials that proved it.

    Attributes:
        joins: For every layer the join of its masks.
        companies: The last trials: masks of all tried layers joined in them, two of each.
        calls: How the model calls its modules with 2 and with 4 images; empty where nothing was tried.
    """

    joins: tuple[Join, ...]
    companies: tuple[Company, ...]
    calls: tuple[Calls, ...] = ()


def find_joins(
    backbone: nn.Module,
    layout: HeadLayout,
    layers: Collection[int] | None = None,
    outputs: Outputs | None = None,
) -> FoundJoins:
    """Find, for every layer, the innermost module where masks may join at the input, proven by trial.

    Candidates go outward from the module around the attention layer to the whole model. Each is compared with plain
    forward passes of one mask on noise: alone, and in company of other masks and of copies, because a module that reads
    the batch's size here and uses it there may go wrong with some numbers of rows only. A layer with wrong logits moves
    one candidate outward. A large model waits for these passes, so they are as small as shows it: an image alone and in
    the crowd, and two in company, where rows of one image could pass for all by broadcasting. A mask has one image on
    which its logits are compared, even layers the first one.

    Args:
        backbone: The model.
        layout: Its attention layers.
        layers: Layers at which masks will join; the joins of others are not tried and cannot be used. None tries all.
        outputs: What the model gives now, if that is more than one thing: each is compared by itself.

    Raises:
        UsageError: Not even joining at the model's input reproduces plain forward passes: rows of a batch influence
            each other.
    """
    wanted = sorted(range(len(layout.layers)) if layers is None else layers)
    if not wanted:
        return FoundJoins((NOWHERE,) * len(layout.layers), ())
    with evaluating(backbone), torch.inference_mode():
        images = example_images(backbone, layout.input_size, 2, seed=1)
        plain: Tensor = backbone(images)
        few = _calls_unmixed(backbone, layout, images, plain, outputs)
        many, twice = record_calls(backbone, torch.cat([images, images]))
        rounding = rounding_of([plain, backbone(images[:1]), twice[: len(images)], twice[len(images) :]], outputs)

        keep = single_heads(layout, images.device)
        trial = _Trial(backbone, layout, wanted, keep, images, plain, rounding, outputs)
        joins = _settle(trial, [_candidates(layout, number, few, many) for number in range(len(layout.layers))])
        # the last company is the crowd of one mask: it proves nothing of other layers
        return FoundJoins(tuple(joins), tuple(trial.companies[:-1]), (few, many))


def _own(layer: int) -> slice:
    """Return which of the two images is the one on which masks of a layer are compared."""
    return slice(layer % 2, layer % 2 + 1)


def _calls_unmixed(
    backbone: nn.Module, layout: HeadLayout, images: Tensor, plain: Tensor, outputs: Outputs | None
) -> Calls:
    """Return how the model calls its modules with two images, if one's logits do not depend on the other.

    The batch's shape stays the same, and so does rounding: any difference is influence.

    Args:
        backbone: The model.
        layout: Its attention layers.
        images: Noise `[2, channels, height, width]`.
        plain: The model's outputs `[2, ...]` of them.
        outputs: What the parts of these are.

    Raises:
        UsageError: An image's logits change with the other image of its batch.
    """
    first, other = images
    calls, beside = record_calls(backbone, torch.stack([first, other.flip(-1) + 1]))
    found, expected = beside[0], plain[0]
    allowed = [SAME_SHAPE * torch.finfo(expected.dtype).eps] * len(parts_of(outputs, expected))
    if not all_agree(outputs, found, expected, allowed):
        raise UsageError(
            f"model {layout.model!r}: rows of one batch influence each other: an image's logits change by "
            f"{float((found - expected).abs().max()):.1g} with the other image of its batch, so several masks cannot "
            "share a forward pass"
        )
    return calls


@dataclass(frozen=True)
class _Trial:
    """The plain forward passes that joins must reproduce.

    Attributes:
        backbone: The model.
        layout: Its attention layers.
        layers: Those that are tried.
        keep: `[layers, layers, max heads]`, mask l of one head of layer l.
        images: Noise `[2, channels, height, width]`, normalised.
        plain: Outputs `[2, classes]` without a mask.
        rounding: How much rounding alone changes each part of the outputs, relative to its largest number.
        outputs: What the parts are; without it the outputs are one.
        companies: Trials that were right, since all masks were last tried together.
        references: Plain forward passes that were run, by layer and first and last image.
    """

    backbone: nn.Module
    layout: HeadLayout
    layers: list[int]
    keep: Tensor
    images: Tensor
    plain: Tensor
    rounding: tuple[float, ...]
    outputs: Outputs | None = None
    companies: list[Company] = field(default_factory=list)
    references: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def expected(self, layer: int, of: slice) -> Tensor:
        """Return the outputs `[images, classes]` of a plain forward pass of these images with a layer's mask."""
        key = layer, of.start, of.stop
        if key not in self.references:
            self.references[key] = masked_logits(self.backbone, self.layout, self.images[of], self.keep[layer])
        return self.references[key]

    def wrong_alone(self, joins: list[Join], layer: int) -> bool:
        """Run a layer's mask by itself, and say whether its logits are wrong."""
        own = _own(layer)
        found = self._growing(joins, [layer], own)
        if found is None or not self._right(found[1], layer, own, [MOST_ROUNDING] * len(self.rounding)):
            return True
        # one image and two copies of it may take other kernels, and a deep net makes much of it: two and four do not
        return not self._right(found[1], layer, own, self.tolerance(layer, own)) and self.wrong_with_both(joins, layer)

    def wrong_with_both(self, joins: list[Join], layer: int) -> bool:
        """Run a layer's mask by itself on both images, and say whether its logits are wrong."""
        found = self._growing(joins, [layer], BOTH)
        return found is None or not self._right(found[1], layer, BOTH, self.tolerance(layer, BOTH))

    def wrong(self, joins: list[Join], layers: list[int], of: slice) -> set[int] | None:
        """Run these layers' masks together; return the layers with wrong logits, None if the pass is impossible.

        Args:
            joins: Where masks join, by layer.
            layers: The layers, one for each mask.
            of: The images.
        """
        found = self._growing(joins, layers, of)
        if found is None:
            return None
        allowed = [MOST_ROUNDING] * len(self.rounding)  # the number of rows, and so rounding, may be any
        wrong = set()
        for logits, layer in zip(found[1:], layers, strict=True):
            own = logits if of == _own(layer) else logits[_own(layer)]
            if not self._right(own, layer, _own(layer), allowed):
                wrong.add(layer)
        if not wrong:
            self.companies.append(Company(self.images[of], self.keep[layers], found, self.rounding, self.outputs))
        return wrong

    def _growing(self, joins: list[Join], layers: list[int], of: slice) -> Tensor | None:
        """Return the outputs `[1 + masks, images, classes]` of a growing pass, None where rows do not fit together."""
        return growing_logits(self.backbone, self.layout, joins, self.keep[layers], self.images[of])

    def _right(self, found: Tensor, layer: int, of: slice, allowed: list[float]) -> bool:
        return all_agree(self.outputs, found, self.expected(layer, of), allowed)

    def tolerance(self, layer: int, of: slice) -> list[float]:
        """Return how much each part of a layer's outputs may differ where its mask joins alone: of its largest number.

        Rounding depends on the number of rows, most of all in deep convolutional nets. A wrong join changes as much as
        the mask does, or mixes up images. So a twentieth of the mask's own effect is allowed, up to `PART_OF_EFFECT`,
        where that is more than rounding. The bound on both is `MOST_ROUNDING`: a larger difference is the fault itself.
        """
        masked, plain = self.expected(layer, of), self.plain[of]
        parts = zip(parts_of(self.outputs, masked), parts_of(self.outputs, plain), self.rounding, strict=True)
        allowed = []
        for expected, unmasked, rounding in parts:
            effect = float((expected - unmasked).abs().max() / expected.abs().max().clamp(min=1e-6))
            allowed.append(min(max(rounding, min(effect / 20, PART_OF_EFFECT)), MOST_ROUNDING))
        return allowed


def _settle(trial: _Trial, candidates: list[list[Join]]) -> list[Join]:
    """Move layers outward until every mask's logits agree with its plain forward pass.

    Raises:
        UsageError: A layer has no candidate left.
    """
    chosen = [0] * len(candidates)
    agreed: set[tuple[int, int]] = set()  # layers that were right alone, with the candidate
    while True:
        joins = [options[choice] for options, choice in zip(candidates, chosen, strict=True)]

        # each mask alone, then all in company
        untried = [layer for layer in trial.layers if (layer, chosen[layer]) not in agreed]
        wrong = {layer for layer in untried if trial.wrong_alone(joins, layer)}
        agreed |= {(layer, chosen[layer]) for layer in untried if layer not in wrong}
        wrong = wrong or _wrong_together(trial, joins)
        if not wrong:
            return [replace(join, proven=layer in trial.layers) for layer, join in enumerate(joins)]

        for layer in wrong:
            chosen[layer] += 1
            if chosen[layer] >= len(candidates[layer]):
                name = trial.layout.layers[layer].name
                raise UsageError(
                    f"model {trial.layout.model!r}: rows of one batch influence each other at {name!r}, "
                    "so several masks cannot share a forward pass"
                )


def _wrong_together(trial: _Trial, joins: list[Join]) -> set[int]:
    """Return the layers with masks that are right alone and go wrong in company."""
    trial.companies.clear()
    *pairs, crowd = _companies(trial.layers, joins, trial.images)
    for company in pairs:
        wrong = trial.wrong(joins, company, BOTH)
        if wrong is None:  # the shapes do not fit: with two images, or because one join's masks spoil the pass
            wrong = {layer for layer in company if trial.wrong_with_both(joins, layer)}
            return wrong or {_spoiler(trial, joins, company)}
        if wrong:
            return wrong
    return {crowd[0]} if trial.wrong(joins, crowd, _own(crowd[0])) != set() else set()


def _companies(layers: Collection[int], joins: Sequence[Join], images: Tensor) -> list[list[int]]:
    """Return the layers with masks to try together: all layers twice, and last a crowd at the first join.

    A company has as many masks as `ROW_PIXELS` of these images allow.
    """
    # the trunk and `masks` copies of the images share the pixels; two pairs of masks at least
    masks = max(5, ROW_PIXELS // (images.shape[-2] * images.shape[-1]) // len(images)) - 1
    order = sorted(layers, key=lambda layer: joins[layer].place)

    companies = []
    share = masks // 2
    for start in range(0, len(order), share):
        pairs = [layer for layer in order[start : start + share] for _ in range(2)]
        companies.append(pairs)
    return [*companies, order[:1] * min(CROWD, masks)]


def _spoiler(trial: _Trial, joins: list[Join], company: list[int]) -> int:
    """Return the first layer, in the order of joins, with masks that make the pass impossible or wrong."""
    order = list(dict.fromkeys(company))
    for count in range(1, len(order)):
        if trial.wrong(joins, [layer for layer in company if layer in order[:count]], BOTH) != set():
            return order[count - 1]
    return order[-1]


def _candidates(layout: HeadLayout, layer: int, few: Calls, many: Calls) -> list[Join]:
    """Return the modules around a layer, innermost first, with the arguments that grow with the number of images."""
    attention = layout.layers[layer]
    name = attention.name
    names = [name] if attention.joins_itself else []
    while name:
        name = parent_of(name)
        names.append(name)

    joins = []
    for name in names:
        place, arguments = few.get(name, (-1, {}))
        if place >= 0:  # called, and only once
            joins.append(Join(name, place, batched(arguments, many[name][1])))
    return joins
