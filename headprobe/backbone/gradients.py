"""Runs a model whose forward pass needs gradients on noise, so that nothing of it remains in the model.

Code for relevance maps keeps the gradients of attention: `attention.register_hook(...)`, `attention.retain_grad()` or
`torch.autograd.grad(...)` in the forward pass. Such a model fails where gradients are off.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def about_gradients(said: str) -> bool:
    """Return whether an error's text says that gradients are off."""
    return re.search(r"grad|inference (tensor|mode)", said, re.IGNORECASE) is not None


@contextmanager
def with_gradients(model: nn.Module) -> Iterator[None]:
    """Run `model` with gradients on while the context is open; afterwards no parameter has another gradient.

    Its input needs gradients too: the parameters may be frozen. Its output has no history, so that each pass frees what
    it kept.
    """
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _, _ in kept:
        # a backward pass adds to a gradient in place
        parameter.grad = None
    with ExitStack() as stack:
        # a kept map whose hook belongs to its module is a cycle that Python cannot free
        stack.enter_context(same_attributes(model))
        stack.callback(_put_back, kept)
        stack.callback(model.register_forward_pre_hook(_with_history).remove)
        stack.callback(model.register_forward_hook(_without_history).remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Put the attributes of a model's modules back afterwards, and what their lists, dictionaries and sets held.

    A forward pass may keep its attention in an attribute or add it to a list.
    """
    kept = [(module, dict(vars(module))) for module in model.modules()]
    filled = [(box, box.copy()) for _, attributes in kept for box in _boxes(attributes)]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in [name for name in vars(module) if name not in attributes]:
                del vars(module)[name]
            vars(module).update(attributes)
        for box, content in filled:
            box.clear()
            (box.extend if isinstance(box, list) else box.update)(content)


def _boxes(attributes: dict[str, Any]) -> list[Any]:
    """Return the plain lists, dictionaries and sets among a module's own attributes, without those of `nn.Module`."""
    own = vars(nn.Module())
    return [value for name, value in attributes.items() if name not in own and type(value) in (list, dict, set)]


def _put_back(kept: list[tuple[nn.Parameter, Tensor | None, bool]]) -> None:
    for parameter, gradient, required in kept:
        parameter.grad = gradient
        parameter.requires_grad_(required)


def _with_history(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(with_history(arg) for arg in args)


def with_history(value: Any) -> Any:
    """Return a copy of a tensor of floating point numbers that needs gradients and is no leaf; anything else as it is.

    A leaf could not be changed in place.
    """
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_().clone() if floating else value


def _without_history(_: nn.Module, __: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else None
