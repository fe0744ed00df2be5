"""One run at a time on a directory."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from headprobe.errors import UsageError
from headprobe.files import cannot_write, now

HELD = (BlockingIOError, PermissionError)
"""The two answers that POSIX allows where another process holds a lock."""


SECONDS_TO_ASK = 1.0


class Lock:
    """A lock that ends with its process, however that ends.

    It is the process's own (POSIX): worker processes do not inherit it, and would else keep it after a crash.

    Args:
        path: The lock's file; it stays, empty of meaning without a holder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    @property
    def taken(self) -> bool:
        """Whether this process holds it."""
        return self._file is not None

    def take(self) -> None:
        """Take the lock, if it is not taken by this process already.

        Raises:
            UsageError: Another process holds it.
            RunError: The file cannot be written.
        """
        if self._file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            _lock_exclusively(file)
        except HELD:
            holder = describe_holder(self.path)
            file.close()
            raise UsageError(
                f"another run is at work on the same units ({holder}): wait for it, stop it, or change what is asked "
                f"for; `headprobe status {self.path.parent}` shows how far it is"
            ) from None
        except OSError:
            pass  # a file system without locks: two runs at once would waste time, but write the same numbers
        self._file = file
        _write_holder(file)

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def is_held(path: Path) -> bool:
    """Say whether another process holds the lock of this file; those who may only read it may ask too."""
    try:
        file = path.open(encoding="utf-8")
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except HELD:
            return True
        except OSError:
            return False  # a file system without locks
    return False


def _lock_exclusively(file: IO[str]) -> None:
    """Lock a file, trying again for a moment: `is_held` takes a lock as long as it asks."""
    end = time.monotonic() + SECONDS_TO_ASK
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except HELD:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def describe_holder(path: Path) -> str:
    """Say who took a lock last."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _write_holder(file: IO[str]) -> None:
    file.truncate(0)
    json.dump({"process": os.getpid(), "machine": socket.gethostname(), "since": now()}, file)
    file.flush()
