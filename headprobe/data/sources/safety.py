"""A dataset's own description may name files anywhere; only those that belong to the dataset are read."""

from collections.abc import Sequence

from huggingface_hub import get_token

from headprobe.errors import UsageError
from headprobe.redact import SHORTEST_TOKEN, without_secrets


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


# -- Error texts of other libraries, made fit to show: one line, and nothing secret --


def safe_text(error: BaseException) -> str:
    """Return an error's text on one line, without anything that could be a token or a signed address."""
    text = " ".join(str(error).split()).rstrip(".")
    token = _token()
    text = text.replace(token, "...") if len(token) >= SHORTEST_TOKEN else text
    return without_secrets(text) or type(error).__name__


def _token() -> str:
    try:
        return get_token() or ""
    except OSError:  # `hf auth login` keeps it in a file, and HF_HOME may name a place that is no folder
        return ""
