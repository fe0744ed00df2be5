"""Error texts of other libraries, made fit to show: one line, and nothing secret."""

from huggingface_hub import get_token

from headprobe.run.redact import SHORTEST_TOKEN, without_secrets


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
