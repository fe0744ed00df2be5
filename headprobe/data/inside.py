"""A dataset's own description may name files anywhere; only those that belong to the dataset are read."""

from collections.abc import Sequence

from headprobe.errors import UsageError
from headprobe.run.redact import without_secrets


def check_inside(files: Sequence[str], root: str, path: str) -> None:
    """Check that a dataset is made of its own files: its README.md can name others, on this machine or elsewhere.

    Args:
        files: Absolute paths or addresses, as `datasets` resolved them.
        root: What each of them must begin with: the folder, or the dataset's address.
        path: The dataset as the user wrote it.

    Raises:
        UsageError: A file lies somewhere else.
    """
    for file in files:
        steps = file.removeprefix(root).replace("\\", "/").split("/")
        if not file.startswith(root) or ".." in steps or "::" in file:
            raise outside(path)


def outside(path: str) -> UsageError:
    """Return the refusal of a dataset that names files outside of itself."""
    return UsageError(
        f"--data.path names a dataset whose README.md (data_files or data_dir) asks for files outside of it, and these "
        f"are never read: name the place where they lie, got {without_secrets(path)}"
    )
