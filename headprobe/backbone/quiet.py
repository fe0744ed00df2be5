"""Silences the hooks that a model carries while headprobe tries it on noise.

They belong to whoever holds the model: fed with noise, they would collect it as data. PyTorch has no public way to set
hooks aside, so this file reads the dictionaries it keeps them in; a test fails if they are renamed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where `torch.nn.Module` keeps them."""


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Set aside the forward hooks of `model` and its parts, and put them back in their order afterwards."""
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
