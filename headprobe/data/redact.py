"""Error texts of other libraries, made fit to show: one line, and nothing secret."""

import re


def safe_text(error: BaseException) -> str:
    """Return an error's text on one line, without anything that could be a token or a signed address."""
    text = " ".join(str(error).split()).rstrip(".")
    text = re.sub(r"hf_\w+", "hf_...", text)
    text = re.sub(r"(?i)\b(bearer|token)([ =:]+)\S+", r"\1\2...", text)
    return re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1?...", text) or type(error).__name__
