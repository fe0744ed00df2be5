"""When one process of several fails, all end at once, with its message and nobody else's.

Without this a failure of process 1 would be buried under process 0's complaint that it lost its peer or, on GPUs, end
in a hang: the others wait for it in a collective. So failures go through a key-value store that every process looks at
between batches, and collectives begin only when all processes have arrived.
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

from headprobe.errors import RunError, UsageError

SECONDS_TO_HAND_OVER = 600.0  # process 0 may be in the middle of a long batch
SECONDS_TO_LEAVE = 5.0


class FailTogether(lightning.Callback):
    """Ends all processes of a test when one fails; does nothing where there is one only."""

    def __init__(self) -> None:
        self._store: Any = None
        self._ended = False
        self._before: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Open the store, on the machine of process 0."""
        if trainer.world_size == 1 or stage != "test":
            return
        served = _store(0, serve=True) if trainer.is_global_zero else None
        port = trainer.strategy.broadcast(served.port if served is not None else 0)
        self._store = served or _store(port, serve=False)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note SIGTERM for the next batch: Lightning would ask all processes, most of which will never answer."""
        self._ended = False
        if self._store is not None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, frame: object) -> None:
        self._ended = True

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Fail where another process has."""
        self._look()

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all processes, so that none meets the coming collectives alone."""
        if self._store is None:
            return
        self._store.add("arrived", 1)
        while self._store.add("arrived", 0) < trainer.world_size:
            self._look()
            time.sleep(0.01)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others. The first process goes on to show the message, every other one ends here, without a word."""
        store = self._store
        self._let_signals_go()
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
        except dist.DistError:  # process 0, which keeps the store, has gone and has said why
            _let_save(trainer, pl_module, exception)
        # Code 0: finding a child that ended otherwise, Lightning would kill process 0 before it has said why. And at
        # once, since tearing down would wait for peers that are gone.
        os._exit(0)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Let go of the store; process 0 may yet fail, and need not wait for this one then."""
        self._let_signals_go()
        if self._store is not None and not trainer.is_global_zero:
            with suppress(dist.DistError):
                self._store.add("left", 1)
        self._store = None

    def _let_signals_go(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _look(self) -> None:
        """Raise what another process has failed with, if one has."""
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
    """Let all other callbacks of a process that is about to end keep what they have."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # documented
        if not isinstance(callback, FailTogether):
            callback.on_exception(trainer, pl_module, exception)


def _store(port: int, *, serve: bool) -> Any:
    """Open a key-value store at the address that the process group was given; port 0 takes any free one."""
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
        "interrupted": isinstance(exception, KeyboardInterrupt),
        "ended": isinstance(exception, SIGTERMException),
        "usage": isinstance(exception, UsageError),
        "message": text if known else f"process {trainer.global_rank} of {trainer.world_size} failed:\n{text}",
    }


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition and say whether it came true in time."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
