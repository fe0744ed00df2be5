"""Writes files in one step, so that a reader never finds half of one; makes folders and locks for one run at a time."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from headprobe.errors import RunError, UsageError

# Seconds to wait between tries to rename over a file. Windows refuses that while another process has the old file open,
# and readers close it after a moment; other systems never refuse for that reason.
RENAME_PAUSES: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0) if os.name == "nt" else ()


def now() -> str:
    """Return the time in UTC, in the form that files hold."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8; bytes of file names that are no text become escapes.

    Raises:
        RunError: As `write_bytes` does.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a crash leaves the old file or the new one, never a piece.

    Raises:
        RunError: As `writing` does.
    """
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write to; when the context ends, its content is on the disk and it becomes `path` in one step.

    Raises:
        RunError: The file cannot be written (disk full, directory read-only); the old one is untouched.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename_over(partial, path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def partial_path(path: Path) -> Path:
    """Return the name of a file while it is written; each process has its own, even on a disk that machines share."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def cannot_write(path: Path, error: OSError) -> RunError:
    """Return the message for a file that cannot be written."""
    return RunError(
        f"cannot write {str(path)!r} ({error.strerror or error}); make room or choose another directory with "
        "--trainer.default_root_dir, then run the same command again to resume; finished files are complete"
    )


def _rename_over(partial: Path, path: Path) -> None:
    for pause in RENAME_PAUSES:
        try:
            partial.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    partial.replace(path)


def _sync_directory(directory: Path) -> None:
    """Write the directory's new entry to the disk too, where the system can.

    Windows and some network file systems refuse to open a directory; these network file systems rename synchronously.
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def text_digest(path: Path) -> str:
    """Return the SHA-256 of a text file, the same whatever ends its lines: git and editors may change that."""
    return hashlib.sha256(b"\n".join(path.read_bytes().splitlines())).hexdigest()


# -- folders that no other run has ------------------------------------------------------------------------------------


def source_digest() -> str:
    """Return 12 hex digits of the SHA-256 of this package's code: between releases it changes under one version."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def shown(path: Path) -> Path:
    """Return a path as a user would write it here: relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def next_version(root: Path) -> Path:
    """Return `root/version_N`, N being one more than the largest there."""
    names = [path.name for path in root.glob("version_*")]
    numbers = [int(name.removeprefix("version_")) for name in names if name.removeprefix("version_").isdecimal()]
    return root / f"version_{max(numbers, default=-1) + 1}"


def make_folders(folders: Iterable[Path]) -> Path | None:
    """Make all of these folders, none of which may exist; two processes never make the same one.

    Returns:
        None, or the folder that exists already; then those that were made before it are removed again.

    Raises:
        RunError: A folder cannot be made.
    """
    made: list[Path] = []
    for folder in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder.parent, error) from error
        try:
            folder.mkdir()
        except FileExistsError:
            for other in reversed(made):
                other.rmdir()
            return folder
        except OSError as error:
            raise cannot_write(folder, error) from error
        made.append(folder)
    return None


# -- one run at a time -----------------------------------------------------------------------------------------------
#
# POSIX record locks, not the `filelock` package: that uses flock, which forked DataLoader workers inherit and keep
# after their parent was killed, so that the same command could not resume. `filelock` serves where there is no fcntl
# (Windows), where workers are spawned and inherit nothing.

HELD = (BlockingIOError, PermissionError)
"""The two errors that POSIX allows where another process holds a lock."""

SECONDS_TO_TRY = 1.0

Release = Callable[[], Any]


class Lock:
    """A lock that ends with its process, however that ends.

    Args:
        path: The lock's file; it stays. Beside it `lock.json` names the process that took it last.
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
                f"change the options; `headprobe status {self.path.parent}` shows how far it is"
            ) from None
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": now()}
        write_text(_holder_file(self.path), json.dumps(holder) + "\n")

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        if self._release is not None:
            self._release()
            self._release = None


def is_held(path: Path) -> bool:
    """Return whether another process holds the lock of this file; the right to read the file is enough."""
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
    """Return which process took a lock last, in words."""
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
