"""Ends all processes of a test when one fails, with the message of that one alone.

Without this, process 0 would print that it lost process 1 and bury the reason; on GPUs it would wait forever in a
collective. So a process that fails writes its failure into a key-value store, which every process reads between
batches. Collectives begin only when all processes have arrived.
"""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe.errors import RunError, UsageError, was_interrupted

SECONDS_TO_HAND_OVER = 600.0  # process 0 may be in the middle of a long batch
SECONDS_TO_LEAVE = 5.0


class FailTogether(lightning.Callback):
    """Ends all processes of a test when one fails; does nothing in a run of one process."""

    def __init__(self) -> None:
        self._store: Any = None
        self._ended = False
        self._before: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Open the store, on the machine of process 0."""
        if trainer.world_size == 1 or stage not in ("test", "validate"):
            return
        served = _store(0, serve=True) if trainer.is_global_zero else None
        port = trainer.strategy.broadcast(served.port if served is not None else 0)
        self._store = served or _store(port, serve=False)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note SIGTERM until the next batch: Lightning would begin a collective, which most processes never join."""
        self._ended = False
        if self._store is not None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._end)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do the same where images calibrate."""
        self.on_test_start(trainer, pl_module)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Fail if another process has failed."""
        self._raise_failure()

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all processes."""
        self.on_test_epoch_end(trainer, pl_module)

    def _end(self, number: int, frame: object) -> None:
        self._ended = True

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Fail if another process has failed."""
        self._raise_failure()

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all processes, so that none begins the coming collectives alone."""
        if self._store is None:
            return
        self._store.add("arrived", 1)
        while self._store.add("arrived", 0) < trainer.world_size:
            self._raise_failure()
            time.sleep(0.01)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Write the failure to the store. Process 0 goes on and shows the message; the others end here, silently."""
        store = self._store
        self._restore_signal()
        if store is None:
            return
        try:
            store.compare_set("failed", "", json.dumps(_failure(exception, trainer)))  # the first failure stays
            if trainer.is_global_zero:
                store.set("taken", "")
                _wait(lambda: store.add("left", 0) == trainer.world_size - 1, SECONDS_TO_LEAVE)
                return
            if not _wait(lambda: store.check(["taken"]), SECONDS_TO_HAND_OVER):
                return  # process 0 is stuck: better two messages than none
            _let_save(trainer, pl_module, exception)
            store.add("left", 1)
        except dist.DistError:  # process 0, which keeps the store, has shown its message and ended
            _let_save(trainer, pl_module, exception)
        # Code 0: after any other code of a child, Lightning would kill process 0 before it shows its message. At once:
        # tearing down would wait for processes that have ended.
        os._exit(0)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Note that this process has left, so that process 0 does not wait for it if it fails later; drop the store."""
        self._restore_signal()
        if self._store is not None and not trainer.is_global_zero:
            with suppress(dist.DistError):
                self._store.add("left", 1)
        self._store = None

    def _restore_signal(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _raise_failure(self) -> None:
        """Raise the failure of another process, if there is one."""
        if self._ended:
            raise SIGTERMException
        if self._store is None or not self._store.check(["failed"]):
            return
        failure = json.loads(self._store.get("failed"))
        if failure["interrupted"]:
            raise KeyboardInterrupt
        if failure["ended"]:
            raise SIGTERMException
        raise (UsageError if failure["usage"] else RunError)(failure["message"])


def _let_save(trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
    """Let all other callbacks save what they have, before this process ends."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # documented
        if not isinstance(callback, FailTogether):
            callback.on_exception(trainer, pl_module, exception)


def _store(port: int, *, serve: bool) -> Any:
    """Open a key-value store at the address of the process group; port 0 takes any free one."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch documents it, but does not list it as exported
        os.environ["MASTER_ADDR"],
        port,
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=SECONDS_TO_HAND_OVER),
    )


def _failure(exception: BaseException, trainer: lightning.Trainer) -> dict[str, Any]:
    """Return an exception as plain data; one that is no message for users keeps its traceback."""
    known = isinstance(exception, (UsageError, RunError))
    text = str(exception) if known else "".join(traceback.format_exception(exception))
    return {
        "interrupted": was_interrupted(exception),
        "ended": isinstance(exception, SIGTERMException),
        "usage": isinstance(exception, UsageError),
        "message": text if known else f"process {trainer.global_rank} of {trainer.world_size} failed:\n{text}",
    }


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition and return whether it came true in time."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
