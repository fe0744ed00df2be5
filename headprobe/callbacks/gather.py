"""Brings lists and sums of all processes together, at the end of an epoch only."""

import io
import json
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.distributed import all_gather, broadcast

from headprobe.statistics.base import Arrays, HeadStatistic, Part


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


def gather_nodes(trainer: lightning.Trainer, statistic: HeadStatistic) -> None:
    """Bring the sums that other processes have finished to process 0, one at a time; every process must call this."""
    if trainer.world_size == 1:
        return
    nodes = statistic.nodes
    for rank, *key in gather_lists(trainer, [[trainer.global_rank, *key] for key in nodes]):
        if rank == 0:
            continue
        tree, level, index = key
        own = nodes.get((tree, level, index)) if rank == trainer.global_rank else None
        packed = _broadcast(trainer, b"" if own is None else pack(own), rank)
        if packed is not None:
            statistic.add_node((tree, level, index), unpack(packed))


def pack(part: Part) -> bytes:
    """Return the arrays of metrics as one npz file."""
    out = io.BytesIO()
    arrays = {f"{name}/{key}": array for name, metric in part.items() for key, array in metric.to_arrays().items()}
    np.savez(out, **arrays)
    return out.getvalue()


def unpack(packed: bytes) -> dict[str, Arrays]:
    """Return the arrays that `pack` was given, by metric and name."""
    parts: dict[str, Arrays] = {}
    with np.load(io.BytesIO(packed), allow_pickle=False) as file:
        for place in file.files:
            name, key = place.split("/")
            parts.setdefault(name, {})[key] = file[place]
    return parts


def _broadcast(trainer: lightning.Trainer, content: bytes, rank: int) -> bytes | None:
    """Return what process `rank` has to the first process, None to the others; all must call this."""
    device = trainer.strategy.root_device
    length = torch.tensor([len(content)], device=device)
    broadcast(length, rank)
    tensor = torch.empty(int(length), dtype=torch.uint8, device=device)
    if rank == trainer.global_rank:
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    broadcast(tensor, rank)
    return tensor.cpu().numpy().tobytes() if trainer.is_global_zero else None
