"""What a dataset and its libraries may not do: read files outside of the dataset, or show a secret in a message."""

from collections.abc import Sequence

from huggingface_hub import get_token

from headprobe.errors import UsageError
from headprobe.redact import SHORTEST_TOKEN, without_secrets


def check_inside(files: Sequence[str], root: str, path: str) -> None:
    """Check that a dataset is made of its own files: its README.md can name others, on this machine or elsewhere.

    Args:
        files: Absolute paths or addresses with forward slashes, as `datasets` resolved them.
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


def safe_text(error: BaseException) -> str:
    """Return the text of another library's error on one line, without a token or a signed address.

    The name of its class stands for an empty text.
    """
    text = " ".join(str(error).split()).rstrip(".")
    token = _stored_token()
    if len(token) >= SHORTEST_TOKEN:
        text = text.replace(token, "...")
    return without_secrets(text) or type(error).__name__


def _stored_token() -> str:
    try:
        return get_token() or ""
    except OSError:  # `hf auth login` keeps the token in a file, and HF_HOME may name a place that is no folder
        return ""
