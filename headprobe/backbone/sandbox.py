"""Evaluates a model without leaving a trace: on copies and noise, hooks aside, in full float32; when outputs agree."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.errors import UsageError
from headprobe.text import first_line


def copied(backbone: nn.Module, model: str) -> nn.Module:
    """Return a copy of a model.

    Raises:
        UsageError: It cannot be copied.
    """
    try:
        return deepcopy(backbone)
    except (RuntimeError, TypeError) as error:  # torch copies no tensor with a gradient history, as pruned weights are
        raise UsageError(
            f"model {model!r} cannot be copied, and it is tried on a copy ({first_line(error)}); make pruned or "
            "otherwise computed weights permanent first"
        ) from error


def in_single(backbone: nn.Module, model: str) -> nn.Module:
    """Return the model, or a float32 copy where it is in half precision: coarse rounding would hide errors."""
    half = next(backbone.parameters()).dtype.itemsize < 4
    return copied(backbone, model).float() if half else backbone


def perturbed(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """Add seeded normal noise to every parameter in place, and return the model.

    Projections, scales and tables that are zero at initialisation would hide errors. Weights with more than one axis
    get a standard deviation of 0.5 / sqrt(inputs), which keeps activations at their size. Vectors (norms, biases,
    scales) get 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.is_floating_point():
                inputs = parameter[0].numel() if parameter.dim() > 1 else 0  # [outputs, inputs, ...]
                size = 0.5 / math.sqrt(inputs) if inputs else 0.1
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.device, parameter.dtype))
    return backbone


HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where `torch.nn.Module` keeps hooks: PyTorch has no public way to set them aside. A test fails if one is renamed."""


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Set aside the forward hooks of `model` and its parts, and put them back in their order afterwards.

    They are the user's own: a pass on noise would enter their data.
    """
    aside = [(hooks, dict(hooks)) for module in model.modules() for hooks in _hooks_of(module)]
    for hooks, _ in aside:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in aside:
            hooks.clear()
            hooks.update(own)


def hook_count(model: nn.Module) -> int:
    """Return how many forward hooks a model and its parts carry."""
    return sum(len(hooks) for module in model.modules() for hooks in _hooks_of(module))


def _hooks_of(module: nn.Module) -> list[dict[int, object]]:
    return [getattr(module, name) for name in HOOKS]


def example_images(backbone: nn.Module, input_size: tuple[int, int, int], images: int, seed: int = 0) -> Tensor:
    """Return seeded normal noise `[images, channels, height, width]` on the backbone's device and in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, *input_size, generator=generator)
    like = next(backbone.parameters())
    return noise.to(device=like.device, dtype=like.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep `module` in evaluation mode and compute float32 in full; afterwards give every part its own mode back.

    Caches are cleared before and after: in evaluation mode timm caches attention biases, which may belong to other
    weights.
    """
    modes = [(part, part.training) for part in module.modules()]
    # entering the training mode clears timm's caches
    module.train()
    module.eval()
    try:
        with _unrounded(_device(module)):
            yield
    finally:
        module.train()
        for part, training in modes:
            part.training = training


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Switch autocast off on a kind of device; the meta device has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def _unrounded(device: str) -> Iterator[None]:
    """Switch off coarser float32: autocast, and TF32, which convolutions on GPUs use by default.

    They round by 1e-3, and differently for each batch shape: that would hide errors, or look like one.
    """
    with ExitStack() as stack:
        stack.enter_context(without_autocast(device))
        if device == "cuda":
            stack.enter_context(_ieee_float32())
        yield


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32; torch refuses a mix of its two ways to set that."""
    backends: Any = torch.backends
    ways: list[tuple[Any, str, Any]] = [(backends.cudnn, "benchmark", False)]
    if hasattr(backends, "fp32_precision"):  # torch 2.9 and later
        ways += [(part, "fp32_precision", "ieee") for part in (backends.cuda.matmul, backends.cudnn.conv)]
    else:
        ways += [(part, "allow_tf32", False) for part in (backends.cuda.matmul, backends.cudnn)]
    with ExitStack() as stack:
        for part, name, value in ways:
            stack.callback(setattr, part, name, getattr(part, name))
            setattr(part, name, value)
        yield


# -- numbers -----------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory has ended; on a CPU torch raises no class of its own for it, so the text decides."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a part of the largest expected number."""
    return float((found - expected).abs().max()) / float(expected.abs().max().clamp(min=1e-12))


ROUNDING = 100  # times the dtype's eps: 1.2e-5 in float32
SAME_SHAPE = 10  # times the dtype's eps, where a row has the same place in a batch of the same shape
COARSEST = 0.05  # in half precision
MOST_ROUNDING = 1e-3  # relative to the largest number; a larger difference is an error, whatever the reason


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Return whether two outputs are equal up to rounding.

    Args:
        found: An output.
        expected: What it should be.
        tolerance: Largest difference relative to the largest expected number; without it `ROUNDING` of the dtype.
    """
    part = min(ROUNDING * torch.finfo(expected.dtype).eps, COARSEST) if tolerance is None else tolerance
    allowed = part * float(expected.abs().max().clamp(min=1e-6))
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())
