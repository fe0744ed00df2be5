"""Removes tokens, passwords and signed addresses from every text that is shown or kept."""

import os
import re
import shlex
from collections.abc import Sequence

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


SHORTEST_TOKEN = 8  # a shorter value is no token, and removing it would blot out half of every text


# Patterns of secrets, and their replacements.
HIDDEN = (
    (r"\b(hf|api_org)_[A-Za-z0-9]{12,}", r"\1_..."),
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+", r"\1 ..."),
    (r"(?i)\b(\w*(?:token|password|secret|api_?key))(\s*[=:]\s*)[^\s&]+", r"\1\2..."),
    (r"(\w+://)[^\s/@]+@", r"\1...@"),  # user:password@host
    (r"(\w+://[^\s?]+)\?\S+", r"\1?..."),  # signed addresses carry their key in the query
)


def without_secrets(text: str) -> str:
    """Return a text without anything that could be a token, a password or a signed address."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "")
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, "...")

    for pattern, shown in HIDDEN:
        text = re.sub(pattern, shown, text)
    return text


def safe_command(words: Sequence[str]) -> str:
    """Return a command as one line for a POSIX shell, without secrets."""
    return shlex.join(without_secrets(word) for word in words)
