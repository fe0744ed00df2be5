"""Text that several rooms of headprobe print: counted nouns, ranges, durations; and text without secrets."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Decision:
    """What headprobe decided about a user's model or data where the user did not.

    Every run keeps all of them in run.json, and `--dry-run` prints them (docs/decisions.md).

    Attributes:
        about: What was decided, in a word or two: the key in run.json.
        text: What was chosen and why, with the option that changes it.
        shown: Whether a run prints it before its table: someone may not expect it.
    """

    about: str
    text: str
    shown: bool = False


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where there are several: `1 layer`, `1,371 names`, `2 families`."""
    if noun.endswith("y"):
        several = f"{noun[:-1]}ies"
    elif noun.endswith("s"):
        several = f"{noun}es"
    else:
        several = f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs as ranges: `0-2,5`."""
    texts = []
    # Within a run of consecutive numbers, the number minus its position stays the same.
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        texts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(texts)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters; the name of its class where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, to about two digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST_TOKEN = 8  # a shorter value is no token, and removing it would blot out half of every text


SECRETS = (
    (r"\b(hf|api_org)_[A-Za-z0-9]{12,}", r"\1_..."),
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+", r"\1 ..."),
    (r"(?i)\b(\w*(?:token|password|secret|api_?key))(\s*[=:]\s*)[^\s&]+", r"\1\2..."),
    (r"(\w+://)[^\s/@]+@", r"\1...@"),  # user:password@host
    (r"(\w+://[^\s?]+)\?\S+", r"\1?..."),  # signed addresses carry their key in the query
)
"""Patterns of secrets, each with the text that replaces it."""


def without_secrets(text: str) -> str:
    """Return a text without anything that could be a token, a password or a signed address."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable, "")
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, "...")

    for pattern, shown in SECRETS:
        text = re.sub(pattern, shown, text)
    return text


def safe_command(words: Sequence[str]) -> str:
    """Return a command as one line for a POSIX shell, without secrets."""
    return shlex.join(without_secrets(word) for word in words)
