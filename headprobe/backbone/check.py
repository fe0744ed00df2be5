"""Proves, on the very model of a run, that masks take effect; cheap enough for the start of every run.

(a) A mask that keeps every head leaves the logits equal bit for bit. (b) Masking heads equals an oracle that shares
no code with it: zeroing their columns of the output projection's weights or, where a norm over all heads stands in
between, zeroing their slice of the attention operator's own output. (c) Every hook fires exactly once per forward
pass. Join points are proven in `growing`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.ablation import masked_logits
from headprobe.backbone.heads import HeadLayout
from headprobe.backbone.joins import agree, trial_masks
from headprobe.backbone.trace import evaluating, example_images
from headprobe.errors import UsageError


def prove_masks(backbone: nn.Module, layout: HeadLayout) -> None:
    """Run the cheap proofs on noise.

    Raises:
        UsageError: A proof fails; the model must not be run under masks.
    """
    images = example_images(backbone, layout.input_size, 2, seed=2)
    keep = trial_masks(layout, images.device, seed=2)[0]
    with evaluating(backbone), torch.inference_mode():
        plain: Tensor = backbone(images)
        if not torch.equal(masked_logits(backbone, layout, images, torch.ones_like(keep)), plain):
            raise UsageError(f"model {layout.model!r}: a mask that keeps every head changes the logits")
        masked = masked_logits(backbone, layout, images, keep)
        if agree(masked, plain):
            warnings.warn(
                f"masking half of the heads of {layout.model!r} changes no logit; are its weights trained?",
                stacklevel=2,
            )
        with _weights_zeroed(backbone, layout, keep), _operators_zeroed(backbone, layout, keep):
            expected: Tensor = backbone(images)
        if not agree(masked, expected):
            worst = float((masked - expected).abs().max())
            raise UsageError(
                f"model {layout.model!r}: masking heads differs from zeroing their part of the weights "
                f"(by up to {worst:.2g} in a logit); its heads are laid out in a way headprobe does not know"
            )
        if not torch.equal(backbone(images), plain):
            raise UsageError(
                f"model {layout.model!r} is not the same after masking: it keeps state between forward passes"
            )


@contextmanager
def _weights_zeroed(backbone: nn.Module, layout: HeadLayout, keep: Tensor) -> Iterator[None]:
    """Zero the masked heads' columns of the output projections, and restore them afterwards."""
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):
            if layer.inner_norm:
                continue
            weight = backbone.get_submodule(f"{layer.name}.proj").weight
            if not isinstance(weight, Tensor):
                raise UsageError(
                    f"model {layout.model!r}: {layer.name!r} has no output projection to check masks against"
                )
            saved = weight.detach().clone()
            stack.callback(weight.data.copy_, saved)
            columns = keep[number, : layer.heads].repeat_interleave(layer.head_dim)
            weight.data[:, ~columns] = 0
        yield


@contextmanager
def _operators_zeroed(backbone: nn.Module, layout: HeadLayout, keep: Tensor) -> Iterator[None]:
    """Zero the masked heads' slices of the fused attention operator's output in layers with a norm over all heads."""
    with ExitStack() as stack:
        mode = _ZeroHeads()
        for number, layer in enumerate(layout.layers):
            if layer.inner_norm:
                module = backbone.get_submodule(layer.name)
                stack.callback(module.register_forward_pre_hook(mode.enter(keep[number, : layer.heads])).remove)
                stack.callback(module.register_forward_hook(mode.leave).remove)
        stack.enter_context(mode)
        yield


class _ZeroHeads(TorchFunctionMode):
    """Zeroes heads in the result `[rows, heads, tokens, head_dim]` of fused attention inside the entered layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def enter(self, kept: Tensor) -> Callable[..., None]:
        """Return a pre-hook that makes `kept` the current heads."""

        def hook(*_: object) -> None:
            self.kept = kept

        return hook

    def leave(self, *_: object) -> None:
        """End the current layer (a forward hook)."""
        self.kept = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and self.kept is not None:
            return result * self.kept.view(1, -1, 1, 1)
        return result
