"""What processes tell each other: lists, sums and verdicts. Every function is a collective, for an epoch's ends only.

Nothing travels as a pickle: texts are JSON, sums are npz files.
"""

import json
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed import all_gather, broadcast

from headprobe.errors import RunError, UsageError


def gather_lists(trainer: lightning.Trainer, items: list[Any]) -> list[Any]:
    """Return the items of all processes, in the order of their ranks."""
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


def from_first(trainer: lightning.Trainer, make: Callable[[], bytes]) -> bytes:
    """Return to all processes what process 0 makes; what it fails with, all fail with.

    Raises:
        UsageError: Process 0 did.
        RunError: Process 0 did.
    """
    if trainer.world_size == 1:
        return make()
    failure: dict[str, Any] | None = None
    content = b""
    if trainer.is_global_zero:
        try:
            content = make()
        except (UsageError, RunError) as error:
            failure = _told(error)
    (failure,) = json.loads(broadcast_from(trainer, json.dumps([failure]).encode(), 0))
    if failure is not None:
        raise _heard(failure)
    return broadcast_from(trainer, content, 0)


def on_all(trainer: lightning.Trainer, act: Callable[[], None]) -> None:
    """Do something on every process; what one of them fails with, all fail with.

    Raises:
        UsageError: A process did.
        RunError: A process did.
    """
    failure: UsageError | RunError | None = None
    try:
        act()
    except (UsageError, RunError) as error:
        failure = error
    failures = gather_lists(trainer, [None if failure is None else _told(failure)])
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            raise _heard(other, f"process {rank} of {trainer.world_size} failed: ")


def _told(error: UsageError | RunError) -> dict[str, Any]:
    """Return an error as plain data."""
    return {"usage": isinstance(error, UsageError), "message": str(error)}


def _heard(failure: dict[str, Any], whose: str = "") -> UsageError | RunError:
    """Return the error that another process has told of."""
    return (UsageError if failure["usage"] else RunError)(f"{whose}{failure['message']}")


def broadcast_from(trainer: lightning.Trainer, content: bytes, rank: int, wanted: bool = True) -> bytes:
    """Return what process `rank` has; nothing to a process that does not want it, which must call this all the same."""
    device = trainer.strategy.root_device
    length = torch.tensor([len(content)], device=device)
    broadcast(length, rank)
    tensor = torch.empty(int(length), dtype=torch.uint8, device=device)
    if rank == trainer.global_rank and content:
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    if len(tensor):
        broadcast(tensor, rank)
    return tensor.cpu().numpy().tobytes() if wanted else b""
