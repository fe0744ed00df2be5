"""Writes a run's files so that a reader never meets half of one."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from headprobe.errors import RunError

# Seconds to wait between tries to rename over a file. Windows refuses that while another process has the old file open,
# and readers close it after a moment; other systems never refuse for that reason.
RENAME_PAUSES: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0) if os.name == "nt" else ()


def now() -> str:
    """Return the time in UTC, in the form that files hold."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8.

    Raises:
        RunError: As `write_bytes` does.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a crash leaves the old file or the new one, never a part.

    Raises:
        RunError: As `writing` does.
    """
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write to; when the context ends, its content is on the disk and it becomes `path` in one step.

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
    """Return the name of a file while it is written: each process has its own, also on a disk that machines share."""
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
    """Bring the directory's new entry to the disk too, where the system can.

    Windows and some network file systems refuse to open a directory; these network file systems rename synchronously.
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
