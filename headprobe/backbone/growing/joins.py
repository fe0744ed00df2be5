"""Where masks may join the growing pass: found from how the model calls its modules, and proven by trial."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import Join
from headprobe.backbone.growing.row_plan import batched
from headprobe.backbone.growing.trials import Calls, Company, growing_logits, record_calls, rounding_of
from headprobe.backbone.heads.layout import HeadLayout, parent_of
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.outputs import Outputs, all_agree, parts_of
from headprobe.backbone.sandbox import MOST_ROUNDING, SAME_SHAPE, evaluating, example_images
from headprobe.errors import UsageError

PART_OF_EFFECT = 5e-5
"""How much a mask that joins alone may differ on account of its own effect, relative to the largest logit."""


CROWD = 6
"""Copies of one mask that join at once: seven times the trunk's rows, a number that divides few shapes by chance."""


ROW_PIXELS = 1 << 22
"""Pixels of all rows of a trial: 83 rows of 224 x 224. Larger images are tried in smaller company, to fit in memory."""


class FoundJoins(NamedTuple):
    """Where masks join, and the trials that proved it.

    Attributes:
        joins: For every layer the join of its masks.
        companies: The last trials: masks of all tried layers joined in them, two of each.
    """

    joins: tuple[Join, ...]
    companies: tuple[Company, ...]


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
    one candidate outward.

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
    with evaluating(backbone), torch.inference_mode():
        calls = [record_calls(backbone, layout, images) for images in (2, 3)]
        candidates = [_candidates(layout, number, *calls) for number in range(len(layout.layers))]
        if not wanted:
            return FoundJoins(tuple(options[0] for options in candidates), ())

        keep = _single_heads(layout, next(backbone.parameters()).device)
        images = example_images(backbone, layout.input_size, 2, seed=1)
        _refuse_mixing(backbone, layout, images, outputs)
        expected = {layer: masked_logits(backbone, layout, images, keep[layer]) for layer in wanted}
        plain: Tensor = backbone(images)

        rounding = rounding_of(backbone, images, plain, outputs)
        trial = _Trial(backbone, layout, keep, images, plain, expected, rounding, outputs)
        joins = _settle(trial, candidates)
        # the last company is the crowd of one mask: it proves nothing of other layers
        return FoundJoins(tuple(joins), tuple(trial.companies[:-1]))


def _refuse_mixing(backbone: nn.Module, layout: HeadLayout, images: Tensor, outputs: Outputs | None) -> None:
    """Raise a UsageError where an image's logits depend on the other image of its batch.

    The batch's shape stays the same, and so does rounding: any difference is influence.
    """
    first, other = images
    # the first image's logits, beside the other image and beside a changed one
    found = backbone(torch.stack([first, other]))[0]
    expected = backbone(torch.stack([first, other.flip(-1) + 1]))[0]
    allowed = [SAME_SHAPE * torch.finfo(expected.dtype).eps] * len(parts_of(outputs, expected))
    if not all_agree(outputs, found, expected, allowed):
        raise UsageError(
            f"model {layout.model!r}: rows of one batch influence each other: an image's logits change by "
            f"{float((found - expected).abs().max()):.1g} with the other image of its batch, so several masks cannot "
            "share a forward pass"
        )


def _single_heads(layout: HeadLayout, device: torch.device) -> Tensor:
    """Return masks `[layers, layers, max heads]`: mask l hits one head of layer l; more heads could hide an error."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.ones(layers, layers, most, dtype=torch.bool)
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, number, number % heads] = False
    return keep.to(device)


@dataclass(frozen=True)
class _Trial:
    """The plain forward passes that joins must reproduce.

    Attributes:
        backbone: The model.
        layout: Its attention layers.
        keep: `[layers, layers, max heads]`, mask l of one head of layer l.
        images: Noise `[images, channels, height, width]`, normalised.
        plain: Outputs `[images, classes]` without a mask.
        expected: Outputs `[images, classes]` of the plain forward pass with mask l, for the layers that are tried.
        rounding: How much rounding alone changes each part of the outputs, relative to its largest number.
        outputs: What the parts are; without it the outputs are one.
        companies: Trials that were right, since all masks were last tried together.
    """

    backbone: nn.Module
    layout: HeadLayout
    keep: Tensor
    images: Tensor
    plain: Tensor
    expected: dict[int, Tensor]
    rounding: tuple[float, ...]
    outputs: Outputs | None = None
    companies: list[Company] = field(default_factory=list)

    def wrong(self, joins: list[Join], layers: list[int]) -> set[int] | None:
        """Run these layers' masks together; return the layers with wrong logits, None if the pass is impossible."""
        keep = self.keep[layers]
        found = growing_logits(self.backbone, self.layout, joins, keep, self.images)  # [1 + masks, images, classes]
        if found is None:
            return None

        wrong = set()
        for logits, layer in zip(found[1:], layers, strict=True):
            # in company the number of rows, and so rounding, may be any; a mask alone is compared closely
            allowed = self.tolerance(layer) if len(layers) == 1 else [MOST_ROUNDING] * len(self.rounding)
            if not all_agree(self.outputs, logits, self.expected[layer], allowed):
                wrong.add(layer)
        if not wrong:
            self.companies.append(Company(self.images, keep, found, self.rounding, self.outputs))
        return wrong

    def tolerance(self, layer: int) -> list[float]:
        """Return how much each part of a layer's outputs may differ where its mask joins alone: of its largest number.

        Rounding depends on the number of rows, most of all in deep convolutional nets. A wrong join changes as much as
        the mask does, or mixes up images. So a twentieth of the mask's own effect is allowed, up to `PART_OF_EFFECT`,
        where that is more than rounding. The bound on both is `MOST_ROUNDING`: a larger difference is the fault itself.
        """
        parts = zip(
            parts_of(self.outputs, self.expected[layer]), parts_of(self.outputs, self.plain), self.rounding, strict=True
        )
        allowed = []
        for expected, plain, rounding in parts:
            effect = float((expected - plain).abs().max() / expected.abs().max().clamp(min=1e-6))
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
    """Return the layers with masks that are right alone and go wrong in company."""
    trial.companies.clear()
    for company in _companies(trial.expected, joins, trial.images):
        wrong = trial.wrong(joins, company)
        if wrong is None:  # the shapes do not fit: one join's masks spoil the pass
            return {_spoiler(trial, joins, company)}
        if wrong:
            return wrong
    return set()


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
        if trial.wrong(joins, [layer for layer in company if layer in order[:count]]) != set():
            return order[count - 1]
    return order[-1]


def _candidates(layout: HeadLayout, layer: int, two: Calls, three: Calls) -> list[Join]:
    """Return the modules around a layer, innermost first, with the arguments that grow with the number of images."""
    attention = layout.layers[layer]
    name = attention.name
    names = [name] if attention.joins_itself else []
    while name:
        name = parent_of(name)
        names.append(name)

    joins = []
    for name in names:
        place, arguments = two.get(name, (-1, {}))
        if place >= 0:  # called, and only once
            joins.append(Join(name, place, batched(arguments, three[name][1])))
    return joins
