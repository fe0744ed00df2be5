"""Trial passes on noise: joins and shortcuts are taken only where these give the logits of plain passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import GrowingPass, Join
from headprobe.backbone.growing.row_plan import Path, shapes
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Shortcuts
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.sandbox import ROUNDING, example_images, is_out_of_memory

Calls = dict[str, tuple[int, dict[Path, torch.Size]]]
"""For every module when its only call in a forward pass comes (-1 if it has several) and its arguments' shapes."""


@dataclass
class Company:
    """A growing pass of several masks that gave the logits of plain forward passes; shortcuts must give the same.

    Attributes:
        images: Noise `[images, channels, height, width]`, normalised.
        keep: `[masks, layers, max heads]` bool, True = keep.
        logits: `[1 + masks, images, classes]`, the baseline first.
        rounding: How much rounding alone changes, relative to the largest logit.
    """

    images: Tensor
    keep: Tensor
    logits: Tensor
    rounding: float


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5  # [mask, layer, head]
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True  # nothing before its layer
        keep[number, number, number % heads] = False  # at least one head there
        keep[:, number, heads:] = True  # places without a head
    return keep.to(device)


def rounding_of(backbone: nn.Module, images: Tensor, plain: Tensor) -> float:
    """Return ten times the change, relative to the largest logit, when the images run in a batch twice as large."""
    among: Tensor = backbone(torch.cat([images, images]))  # [2 x images, classes]
    differs = (torch.unflatten(among, 0, (2, len(images))) - plain).abs().max()
    return max(ROUNDING * torch.finfo(plain.dtype).eps, 10 * float(differs / plain.abs().max().clamp(min=1e-6)))


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
        with GrowingPass(backbone, layout, joins, keep, shortcuts) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except (RuntimeError, ValueError) as error:  # torch and timm raise these for shapes that do not fit
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return None


def record_calls(backbone: nn.Module, layout: HeadLayout, images: int) -> Calls:
    """Return for every module of a forward pass when it is called and the shapes of its tensor arguments."""
    calls: Calls = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = dict(shapes((), args)) | dict(shapes((), kwargs))
            # nothing joins at a module that is called twice: it would join twice
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
