"""`torch.compile` for the parts of a model that no hook reaches into."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.layout import HeadLayout, parent_of
from headprobe.backbone.numerics import agree
from headprobe.backbone.sandbox import evaluating, example_images
from headprobe.errors import UsageError
from headprobe.text import first_line

TOLERANCE = 1e-3
"""Largest difference that fused kernels may make to a logit in float32, relative to the largest."""


def compile_parts(backbone: nn.Module, layout: HeadLayout) -> int:
    """Compile what stands beside attention in each block, and return how many parts there are.

    Only the `forward` of a part is replaced, so that hooks go on working, those that are installed later too: a module
    compiled as a whole may ignore them without a word. Sizes are dynamic: one graph serves all numbers of rows.

    Args:
        backbone: The model; it stays compiled.
        layout: Its attention layers.

    Raises:
        UsageError: torch cannot compile here, or what it made gives other logits.
    """
    images = example_images(backbone, layout.input_size, 2, seed=7)
    parts = list(_parts(backbone, layout))
    with evaluating(backbone), torch.inference_mode():
        expected: Tensor = backbone(images)
        for part in parts:
            part.forward = torch.compile(part.forward, dynamic=True)
        try:
            found: Tensor = backbone(images)
        except RuntimeError as error:  # what torch.compile raises without a C++ compiler, among others
            _restore(parts)
            raise UsageError(
                f"torch.compile does not work for {layout.model!r} on this machine ({first_line(error)}); leave "
                "--model.torch_compile away"
            ) from error
    if not agree(found, expected, TOLERANCE if expected.dtype.itemsize >= 4 else None):
        _restore(parts)
        raise UsageError(
            f"model {layout.model!r} gives other logits when compiled (difference "
            f"{float((found - expected).abs().max()):.1g}); leave --model.torch_compile away"
        )
    return len(parts)


def _parts(backbone: nn.Module, layout: HeadLayout) -> Iterator[nn.Module]:
    """Yield the children of blocks that hold no attention but weights, such as `norm2` and `mlp`, once each."""
    seen: set[int] = set()
    names = [layer.name for layer in layout.layers]
    for block in dict.fromkeys(parent_of(name) for name in names):
        for child, module in backbone.get_submodule(block).named_children():
            name = f"{block}.{child}" if block else child
            holds_attention = any(f"{layer}.".startswith(f"{name}.") for layer in names)
            if not holds_attention and id(module) not in seen and any(True for _ in module.parameters()):
                seen.add(id(module))
                yield module


def _restore(parts: list[nn.Module]) -> None:
    for part in parts:
        del part.forward  # the class' own shows again
