"""The oracle of pruning: a masked model by plain hooks on its output projections; none of headprobe's own masking."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stand:
    """What stands for the masked heads of one layer: `z_S = B z_K + c`."""

    heads: int
    masked: frozenset[int]
    constants: np.ndarray[Any, Any]
    """c of every channel `[heads * head_dim]`; those of kept heads are not read."""
    slopes: np.ndarray[Any, Any] | None = None
    """B `[masked channels, kept channels]`."""


@contextmanager
def hooked(model: nn.Module, stands: Mapping[str, Stand]) -> Iterator[None]:
    """Fill masked slots at the input of each layer's `proj`, whose heads lie one after the other."""
    handles = [model.get_submodule(f"{name}.proj").register_forward_pre_hook(hook_of(stand))
               for name, stand in stands.items()]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_of(stand: Stand) -> Any:
    gone = np.repeat([head in stand.masked for head in range(stand.heads)], len(stand.constants) // stand.heads)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        slots = args[0].clone()  # [..., heads * head_dim]
        values = torch.from_numpy(stand.constants[gone]).to(slots).expand(*slots.shape[:-1], -1)
        if stand.slopes is not None:
            values = values + slots[..., torch.from_numpy(~gone)] @ torch.from_numpy(stand.slopes).to(slots).T
        slots[..., torch.from_numpy(gone)] = values
        return (slots,)

    return hook
