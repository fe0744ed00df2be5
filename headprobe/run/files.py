"""Writes a run's files so that a reader never meets half of one."""

import os
from pathlib import Path

from headprobe.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8.

    Raises:
        RunError: As `write_bytes` does.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a crash leaves the old file or the new one, never a part.

    Raises:
        RunError: The file cannot be written (disk full, directory read-only); the old one is untouched.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {str(path)!r} ({error.strerror or error}); make room or choose another directory with "
            "--trainer.default_root_dir, then run the same command again; finished files are complete"
        ) from error
