"""Evaluates a model without leaving a trace: on copies and noise, hooks aside, in full float32; when outputs agree."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from headprobe.backbone.gradients import same_attributes, with_gradients
from headprobe.errors import UsageError
from headprobe.text import first_line


def copied(backbone: nn.Module, model: str) -> nn.Module:
    """Return a copy of a model.

    Raises:
        UsageError: It cannot be copied.
    """
    try:
        return deepcopy(backbone, _kept_maps(backbone))
    except (RuntimeError, TypeError) as error:  # torch copies no tensor with a gradient history, as pruned weights are
        raise UsageError(
            f"model {model!r} cannot be copied, and it is tried on a copy ({first_line(error)}); make pruned or "
            "otherwise computed weights permanent first, and drop what its modules keep of an earlier forward pass"
        ) from error


def _kept_maps(backbone: nn.Module) -> dict[int, Any]:
    """Return a copy for each tensor with a gradient history that a module keeps, as it does its attention for later.

    Torch copies none. A weight that is computed from parameters, as `weight` from `weight_orig`, is left out: a
    constant in its place would be another model.
    """
    copies: dict[int, Any] = {}
    for module in backbone.modules():
        parameters = [name.rpartition("_")[0] for name, _ in module.named_parameters(recurse=False)]
        for name, value in (vars(module) | dict(module.named_buffers(recurse=False))).items():
            parts = [value] if isinstance(value, Tensor) else _parts(value)
            for part in parts:
                if isinstance(part, Tensor) and not part.is_leaf and name not in parameters:
                    copies[id(part)] = part.detach()
    return copies


def _parts(value: Any) -> list[Any]:
    """Return what a list, tuple or dictionary holds; nothing of anything else."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def in_single(backbone: nn.Module, model: str) -> nn.Module:
    """Return the model, or a float32 copy where it is in half precision: coarse rounding would hide errors."""
    half = next(backbone.parameters()).dtype.itemsize < 4
    return copied(backbone, model).float() if half else backbone


def perturbed(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """Add seeded normal noise to every parameter in place, and return the model.

    Projections, scales and tables that are zero at initialisation would hide errors. Weights with more than one axis
    get a standard deviation of 0.5 / sqrt(inputs), which keeps activations at their size. Vectors (norms, biases,
    scales) get 0.1. Quantised weights, which are tensors of a class of their own, stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.is_floating_point() and is_plain(parameter):
                inputs = parameter[0].numel() if parameter.dim() > 1 else 0  # [outputs, inputs, ...]
                size = 0.5 / math.sqrt(inputs) if inputs else 0.1
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.device, parameter.dtype))
    return backbone


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight is an ordinary tensor; quantised ones have classes of their own and cannot be written."""
    return type(weight.data) is Tensor


HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where `torch.nn.Module` keeps hooks: PyTorch has no public way to set them aside. A test fails if one is renamed."""

BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
"""The same for hooks of backward passes, which a forward pass can run too."""


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Set aside the hooks of `model` and its parts, and put them back in their order afterwards.

    They are the user's own: a pass on noise would enter their data. For the same reason what forward passes keep in the
    modules' attributes is afterwards as it was.
    """
    aside = [
        (hooks, dict(hooks))
        for module in model.modules()
        for name in (*HOOKS, *BACKWARD_HOOKS)
        if (hooks := getattr(module, name))
    ]
    for hooks, _ in aside:
        hooks.clear()
    try:
        with same_attributes(model):
            yield
    finally:
        _empty_caches(model)
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
    _empty_caches(module)
    module.eval()
    try:
        with _unrounded(_device(module)):
            yield
    finally:
        for part, training in modes:
            part.training = training
        _empty_caches(module)


def _empty_caches(module: nn.Module) -> None:
    """Empty timm's caches, as it does where a module enters the training mode; every part keeps its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    for part, training in modes:
        part.training = training


def trying(module: nn.Module, gradients: bool) -> AbstractContextManager[object]:
    """Run `module` on noise while the context is open: without gradients, or with them where it needs them."""
    return with_gradients(module) if gradients else torch.inference_mode()


@contextmanager
def towards_inputs(model: nn.Module) -> Iterator[None]:
    """Compute gradients of what enters a model or its hooks, not of its weights, while the context is open.

    An outer inference mode is left for the time; tensors that were made in it must be cloned. Afterwards every weight
    wants gradients as before, and no module keeps anything of the passes. On GPUs the backward pass adds up in one
    order, so that the same images give the same bits.
    """
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(same_attributes(model))
        # timm keeps attention biases: those of passes in inference mode cannot be used here, nor ours there
        _empty_caches(model)
        stack.callback(_empty_caches, model)
        if _device(model) == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the backward pass of the others adds atomically
            stack.enter_context(_one_order_of_convolutions())
        for parameter, wanted in kept:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, wanted)
        yield


@contextmanager
def _one_order_of_convolutions() -> Iterator[None]:
    backend: Any = torch.backends.cudnn
    before = backend.deterministic
    backend.deterministic = True
    try:
        yield
    finally:
        backend.deterministic = before


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


NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    # of a GPU's libraries, which take memory beside torch's own
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""Texts of errors for which torch has no class of its own."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory has ended; where torch raises no class of its own for it, the text decides."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(known in text for known in NO_MEMORY)


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
