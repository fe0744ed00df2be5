"""Which masks are decided while a run is at work: e-BH within each test family, from the units that it has stored."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_tests import log_e_value, p_of_e
from headprobe.metrics.accuracy.scores import why_no_e_value
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.results import largest_q, tests_of
from headprobe.text import counted
from headprobe.units.coverage import COVERAGE, SCORES, Coverage
from headprobe.units.status import read_while_written
from headprobe.units.store import UnitStore, read_store
from headprobe.units.tree import Arrays

LEVEL = 0.05
"""A mask is decided where e-BH rejects at this level that it costs nothing."""


@dataclass(frozen=True)
class Decided:
    """How many masks of a test family are decided, under one ablation; masks of the same heads count once."""

    test_family: str
    ablation: str
    masks: int
    decided: int


def read_decided(directory: Path) -> tuple[list[Decided], str]:
    """Return how many masks of each test family are decided; or none of them, and why that cannot be said.

    Args:
        directory: The units of a run, at work or not.

    Raises:
        RunError: A file is broken.
    """
    content = read_store(directory) or {"sessions": []}
    session: dict[str, Any] = content["sessions"][-1] if content["sessions"] else {}
    families: dict[str, str] = session.get("test_families") or {}
    if content.get("identity", {}).get("model", {}).get("classifier") == "none":
        return [], ""  # nothing is right or wrong
    files = (
        read_while_written(lambda: UnitStore(directory, content["units"]).read(COVERAGE, SCORES)) if families else []
    )
    if not files:
        return [], ""
    coverage = Coverage()
    for file in files:
        coverage.merge(Coverage.from_arrays(file[COVERAGE]))
    why_not = why_no_e_value(coverage.label_sums, complete=len(coverage.rows) == content["units"])
    if why_not:
        return [], why_not
    variants = [(str(digest), str(ablation)) for _, digest, ablation, _ in content["identity"]["variants"]]
    of_variants: list[list[str]] = [[] for _ in variants]
    for family, members in families.items():
        for number in _numbers(members):
            of_variants[number].append(family)
    return _by_family(variants, of_variants, _log_e_values([file[SCORES] for file in files])), ""


def _by_family(
    variants: list[tuple[str, str]], test_families: list[list[str]], log_e_values: FloatArray
) -> list[Decided]:
    found = []
    for (family, ablation), tests in tests_of(variants, test_families).items():
        q_values = largest_q({(family, ablation): tests}, p_of_e(log_e_values))
        decided = sum(bool(q_values[rows[0]] <= LEVEL) for rows in tests.values())
        found.append(Decided(family, ablation, len(tests), decided))
    return found


def _log_e_values(scores: list[Arrays]) -> FloatArray:
    """Return the e-values of all images in files of sums, `[1 + variants]`."""
    flips: list[IntArray] = [
        np.sum([np.asarray(own[name], dtype=np.int64) for own in scores], axis=0)
        for name in ("right_to_wrong", "wrong_to_right")
    ]
    return log_e_value(*flips)


def _numbers(text: str) -> list[int]:
    """Return the numbers of `0-2,5`, as `headprobe.text.ranges` writes them."""
    ends = [part.partition("-") for part in text.split(",")]
    return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]


def decided_in_short(directory: Path) -> str:
    """Return how many masks are decided, for a line of progress; nothing where that cannot be said."""
    decided: list[Decided] = []
    with suppress(RunError):  # files that a busy run replaces again and again: the next line may have it
        decided, _ = read_decided(directory)
    if not decided:
        return ""
    masks = sum(own.masks for own in decided)
    return f"decided {sum(own.decided for own in decided):,} of {counted(masks, 'mask')}"
