"""Small pieces of sentences that several parts of headprobe print."""

from collections.abc import Sequence
from itertools import groupby


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where there are several: `1 layer`, `1,371 names`, `2 families`."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs as ranges: `0-2,5`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut where it is long; its class's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def duration(seconds: float) -> str:
    """Return a duration in words, to two digits or so."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
