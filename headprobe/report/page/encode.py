"""The page's data as JSON that stands safely inside of HTML."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

DIGITS = 5
"""Significant digits of floats: more than any eye can tell, and a third of the bytes of full precision."""

UNSAFE = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
"""What could end a script element, or a line of JavaScript, and the escape that JSON has for it."""


def to_json(value: Any) -> str:
    """Return data as JSON without any character that HTML or JavaScript reads otherwise.

    Args:
        value: Numbers, texts, lists, dicts, numpy arrays and scalars, in one another.

    Raises:
        TypeError: There is anything else in it.
    """
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate, from a path that is no text, cannot be written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8").translate(UNSAFE)


def plain(value: Any) -> Any:
    """Return data with only what JSON knows: floats rounded, NaN and infinity as None, uint8 arrays as base64."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint8:
            return {"shape": list(value.shape), "u8": base64.b64encode(value.tobytes()).decode("ascii")}
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"the page's data hold numbers, texts, lists, dicts and arrays, got {type(value).__name__}")


def rounded(value: float) -> float | int | None:
    """Return a float with five significant digits, a whole one as an integer; None where it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS - 1}e}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short
