"""One run at a time on a directory.

POSIX record locks, not the `filelock` package: that locks with flock, which forked DataLoader workers inherit and keep
after their parent was killed, so that the same command could not resume. `filelock` serves where there is no fcntl
(Windows), whose workers are spawned and inherit nothing.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headprobe.errors import UsageError
from headprobe.files import cannot_write, now, write_text

HELD = (BlockingIOError, PermissionError)
"""The two errors that POSIX allows where another process holds a lock."""

SECONDS_TO_TRY = 1.0

Release = Callable[[], Any]


class Lock:
    """A lock that ends with its process, however that ends.

    Args:
        path: The lock's file; it stays. Beside it `lock.json` says which process took it last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._release: Release | None = None

    @property
    def taken(self) -> bool:
        """Whether this process holds it."""
        return self._release is not None

    def take(self) -> None:
        """Take the lock, if it is not taken by this process already.

        Raises:
            UsageError: Another process holds it.
            RunError: The file cannot be written.
        """
        if self._release is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            self._release = _acquire(self.path)
        except HELD:
            raise UsageError(
                f"another run is at work on the same units ({describe_holder(self.path)}): wait for it, stop it, or "
                f"change what is asked for; `headprobe status {self.path.parent}` shows how far it is"
            ) from None
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": now()}
        write_text(_holder_file(self.path), json.dumps(holder) + "\n")

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        if self._release is not None:
            self._release()
            self._release = None


def is_held(path: Path) -> bool:
    """Say whether another process holds the lock of this file; works for those who may only read it, too."""
    if not path.is_file():
        return False
    try:
        _acquire(path, shared=True)()
    except HELD:
        return True
    except OSError:
        return False
    return False


def describe_holder(path: Path) -> str:
    """Say which process took a lock last."""
    try:
        holder = json.loads(_holder_file(path).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _acquire(path: Path, shared: bool = False) -> Release:
    """Lock a file and return what unlocks it.

    Args:
        path: The file; it exists.
        shared: Take a lock that only a holder of the other kind refuses; it needs no right to write.

    Raises:
        BlockingIOError: Another process holds it (or PermissionError).
    """
    try:
        import fcntl  # not at module level: Windows has none
    except ImportError:
        return _acquire_elsewhere(path)
    file = path.open("r" if shared else "a+", encoding="utf-8")
    # `is_held` takes a shared lock for a moment, so an exclusive one tries again; a shared one fails at once.
    ends = time.monotonic() + (0.0 if shared else SECONDS_TO_TRY)
    while True:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return file.close
        except HELD:
            if time.monotonic() > ends:
                file.close()
                raise
            time.sleep(0.02)
        except OSError:
            # A file system without locks: two runs at once would waste time, but write the same numbers.
            return file.close


def _acquire_elsewhere(path: Path) -> Release:
    """Lock a file with the `filelock` package."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(str(error)) from error
    return lock.release
