"""Small pieces of sentences that several parts of headprobe print."""

from collections.abc import Sequence
from itertools import groupby


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
