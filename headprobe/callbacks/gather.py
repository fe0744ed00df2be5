"""Brings small plain data from all processes together, at the end of an epoch only."""

import json
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed import all_gather


def gather_lists(trainer: lightning.Trainer, items: list[Any]) -> list[Any]:
    """Return the items of all processes, in the order of their ranks; every process must call this.

    Items travel as JSON and never as pickles.
    """
    if trainer.world_size == 1:
        return items
    device = trainer.strategy.root_device
    text = torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8, device=device)
    lengths = [int(length) for length in _gather(trainer, torch.tensor([len(text)], device=device))]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    rows = [bytes(row[:length].tolist()) for row, length in zip(_gather(trainer, padded), lengths, strict=True)]
    return [item for row in rows for item in json.loads(row.decode())]


def _gather(trainer: lightning.Trainer, tensor: Tensor) -> list[Tensor]:
    """Return the tensor of every process, on the CPU."""
    tensors = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
    all_gather(tensors, tensor)  # Lightning's own goes through a function that torch has deprecated
    return [each.cpu() for each in tensors]
