"""The processes of a run: how they exchange lists, bytes and failures, and how many a launcher has started.

Every function of the first kind is a collective: all processes must call it, in the same order. They are meant for the
start and the end of an epoch, not for every batch. Nothing travels as a pickle: lists are sent as JSON, sums as npz
files.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from headprobe.errors import RunError, UsageError


def gather_lists(trainer: lightning.Trainer, items: list[Any]) -> list[Any]:
    """Return the items of all processes, in the order of their ranks; every item must be a JSON value."""
    if trainer.world_size == 1:
        return items
    device = trainer.strategy.root_device
    text = torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8, device=device)
    lengths = [int(length) for length in _gather(trainer, torch.tensor([len(text)], device=device))]

    # all_gather takes tensors of one size: every text is padded to the longest one.
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = text

    gathered: list[Any] = []
    for row, length in zip(_gather(trainer, padded), lengths, strict=True):
        gathered += json.loads(bytes(row[:length].tolist()).decode())
    return gathered


def broadcast_from(trainer: lightning.Trainer, content: bytes, rank: int, wanted: bool = True) -> bytes:
    """Return the content of process `rank` to all processes.

    Args:
        trainer: Runs the processes; there must be several.
        content: Bytes to send; ignored on every process but `rank`.
        rank: The process that sends.
        wanted: Whether this process keeps what it receives. A process that does not must call this all the same; it
            gets empty bytes.
    """
    device = trainer.strategy.root_device
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, rank)

    tensor = torch.empty(int(length), dtype=torch.uint8, device=device)
    if rank == trainer.global_rank and content:
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    if len(tensor):
        dist.broadcast(tensor, rank)
    return tensor.cpu().numpy().tobytes() if wanted else b""


def from_first(trainer: lightning.Trainer, make: Callable[[], bytes]) -> bytes:
    """Return to all processes what `make` returns on process 0; if it fails there, all processes raise its error.

    Raises:
        UsageError: `make` did.
        RunError: `make` did.
    """
    if trainer.world_size == 1:
        return make()
    failure: dict[str, Any] | None = None
    content = b""
    if trainer.is_global_zero:
        try:
            content = make()
        except (UsageError, RunError) as error:
            failure = _to_json(error)

    # The other processes must learn of a failure before they wait for the content.
    (failure,) = json.loads(broadcast_from(trainer, json.dumps([failure]).encode(), 0))
    if failure is not None:
        raise _from_json(failure)
    return broadcast_from(trainer, content, 0)


def on_all(trainer: lightning.Trainer, act: Callable[[], None]) -> None:
    """Call `act` on every process; if it fails on one of them, all processes raise an error.

    Raises:
        UsageError: `act` did, here or on another process.
        RunError: `act` did, here or on another process.
    """
    failure: UsageError | RunError | None = None
    try:
        act()
    except (UsageError, RunError) as error:
        failure = error

    failures = gather_lists(trainer, [None if failure is None else _to_json(failure)])
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            raise _from_json(other, f"process {rank} of {trainer.world_size} failed: ")


def _gather(trainer: lightning.Trainer, tensor: Tensor) -> list[Tensor]:
    """Return the tensor of every process, on the CPU."""
    tensors = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
    dist.all_gather(tensors, tensor)  # Lightning's own goes through a function that torch has deprecated
    return [each.cpu() for each in tensors]


def _to_json(error: UsageError | RunError) -> dict[str, Any]:
    return {"usage": isinstance(error, UsageError), "message": str(error)}


def _from_json(failure: dict[str, Any], origin: str = "") -> UsageError | RunError:
    kind = UsageError if failure["usage"] else RunError
    return kind(f"{origin}{failure['message']}")


# -- what started them -------------------------------------------------------------------------------------------------


def refuse_lonely_nodes(trainer: lightning.Trainer) -> None:
    """Refuse machines with unknown addresses: Lightning would wait for them forever and print nothing."""
    launched = getattr(trainer.strategy, "cluster_environment", None)
    unknown = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if trainer.num_nodes > 1 and isinstance(launched, LightningEnvironment) and unknown:
        raise UsageError(
            f"--trainer.num_nodes needs the addresses of the other machines: start it with srun or torchrun, or set "
            f"{', '.join(unknown)} on each of them (docs/imagenet.md), got {trainer.num_nodes} nodes"
        )


def from_launcher(options: dict[str, Any]) -> dict[str, int]:
    """Return the number of processes and nodes that torchrun or srun has started, where `devices` is left out.

    Without it Lightning takes one process on CPUs, and all that a launcher started would each do the whole work.
    """
    if options.get("devices") not in (None, "auto"):
        return {}
    processes, nodes = _launched()
    if not processes:
        return {}
    given = options.get("num_nodes") or 1
    return {"devices": processes // nodes, "num_nodes": nodes if given == 1 else given}


def _launched() -> tuple[int, int]:
    """Return how many processes a launcher has started, and on how many nodes; 0 where there is none."""
    if TorchElasticEnvironment.detect():
        processes = int(os.environ["WORLD_SIZE"])
        return processes, processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    # srun sets the numbers of its step; a batch script without srun has one process, whatever the job asked for.
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{name}", 0)) for name in ("TASKS", "NODES"))
    return (tasks, nodes) if SLURMEnvironment.detect() and tasks > 1 and nodes else (0, 1)


def refuse_other_processes(trainer: lightning.Trainer) -> None:
    """Refuse another number of processes than torchrun has started: each would do the whole work, or wait forever."""
    if TorchElasticEnvironment.detect() and trainer.world_size != int(os.environ["WORLD_SIZE"]):
        raise UsageError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes: leave --trainer.devices and "
            f"--trainer.num_nodes out, or give its numbers, got {trainer.world_size} in all"
        )
