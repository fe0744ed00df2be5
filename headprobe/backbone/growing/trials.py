"""Trial passes on noise, which joins and shortcuts are held to."""

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


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True
        keep[number, number, number % heads] = False
        keep[:, number, heads:] = True
    return keep.to(device)


def rounding_of(backbone: nn.Module, images: Tensor, plain: Tensor) -> float:
    """Return ten times what changes, relative to the largest logit, where the same images run among others."""
    among: Tensor = backbone(torch.cat([images, images]))
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
    """Return the growing pass's logits, or None where these joins or shortcuts give impossible shapes."""
    try:
        with GrowingPass(backbone, layout, joins, keep, shortcuts) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except (RuntimeError, ValueError) as error:  # what torch and timm raise for rows that do not fit together
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return None


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
