"""One forward and backward pass of some images: the loss of each head's trial constant, and the loss's gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headprobe.backbone.gradients import about_gradients
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.sandbox import is_out_of_memory
from headprobe.calibration.optimal import Head
from headprobe.errors import RunError, UsageError
from headprobe.text import first_line

OPTIMAL_FOLLOWS = "the ablation optimal follows"

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Turns outputs `[variants, images, classes + features]` and labels `[images]` into losses `[variants, images]`."""


def trial_pass(
    growing: GrowingPass,
    plan: RowPlan,
    images: Tensor,
    labels: Tensor,
    heads: Sequence[Head],
    constants: Sequence[Tensor],
    loss_of: LossOf,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss `[heads]` and its gradient `[heads, dim]`, float64.

    The variants are independent of each other, so one backward pass of their summed losses gives all gradients. Each
    wave has its own, which frees what it kept.

    Args:
        growing: Runs one variant per head, in which it alone is replaced by its constant; it is entered.
        plan: Which variants share a forward pass.
        images: `[images, channels, height, width]`, normalised, at most `plan.images`.
        labels: `[images]`.
        heads: The heads.
        constants: By layer `[heads, head_dim]`, leaves that need gradients.
        loss_of: The loss of each image from outputs and labels.

    Raises:
        UsageError: The model's forward pass cuts the gradient off.
    """
    losses = torch.zeros(len(heads), dtype=torch.float64)
    dim = max(layer.shape[1] for layer in constants)
    gradients = torch.zeros(len(heads), dim, dtype=torch.float64)
    for wave in plan.waves:
        outputs = growing.logits(images, replace(plan, waves=(wave,), idle=()))
        summed = loss_of(outputs[[1 + variant for variant in wave]], labels).sum(dim=1)  # [variants of the wave]
        layers = sorted({heads[variant][0] for variant in wave})
        found = dict(zip(layers, _gradients(summed, [constants[layer] for layer in layers]), strict=True))
        for variant, loss in zip(wave, summed.tolist(), strict=True):
            layer, head = heads[variant]
            gradient = found[layer]
            if gradient is None:
                raise cut_off(growing.layout.model, f"none at layer {growing.layout.layers[layer].name!r}")
            losses[variant] = loss
            gradients[variant, : gradient.shape[1]] = gradient[head].double().cpu()
    return losses, gradients


def refuse_cut_off(error: RuntimeError, model: str, wanted: str) -> None:
    """Refuse a model whose error says that it has no gradients; pass over any other error.

    Args:
        error: The error.
        model: The model's name.
        wanted: What needs the gradients.

    Raises:
        UsageError: The model's forward or backward pass fails where gradients are on.
    """
    text = str(error).lower()
    ours = isinstance(error, RunError) or is_out_of_memory(error)
    if not ours and (about_gradients(text) or "derivative" in text or "backward" in text):
        raise cut_off(model, first_line(error), wanted) from error


def _gradients(losses: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradient of each leaf, None where none reaches it."""
    if not losses.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(losses.sum(), leaves, allow_unused=True)


def cut_off(model: str, reason: str, wanted: str = OPTIMAL_FOLLOWS) -> UsageError:
    """Return the refusal of a model without gradients."""
    return UsageError(
        f"{wanted} gradients back to the heads, and the forward pass of model {model!r} gives none: choose mean or "
        f"linear, or leave no_grad, detach and quantised weights out of it, got {reason}"
    )
