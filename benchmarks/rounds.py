"""Contestants take turns, round by round, are held to the same counts, and become a table."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestant import Contestant, ContestantError, Round
from benchmarks.report import markdown, ratios

MOST_DIFFERENT = 1
"""Images that counts may differ by: rounding may move one whose two largest logits are equal."""
NLL_TOLERANCE = 1e-4
"""Nats that mean NLLs may differ by, and relative to those above 1: the rounding of float32."""


@dataclass(frozen=True)
class Comparison:
    """Some contestants and what they are compared in.

    Attributes:
        title: Heading of its table.
        setting: What was measured, by name.
        contestants: The first is the one that ratios are to.
        same_work: Whether all of them score the same masks, so that their counts must agree.
        notes: Lines under the table.
    """

    title: str
    setting: dict[str, Any]
    contestants: tuple[Contestant, ...]
    same_work: bool = True
    notes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a comparison.

    Attributes:
        rounds: By contestant.
        absent: Why a contestant has no rounds, by name.
        refused: Why no ratio may be printed.
    """

    rounds: dict[str, list[Round]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def compete(comparison: Comparison, repeats: int, say: Callable[[str], None]) -> Outcome:
    """Run all contestants `repeats` times, interleaved; who begins changes with every round."""
    outcome = Outcome()
    running = [one for one in comparison.contestants if _there(one, outcome)]
    for round_ in range(repeats):
        first = round_ % len(running) if running else 0
        for one in [*running[first:], *running[:first]]:
            if one.name in outcome.absent:
                continue
            say(f"{comparison.title}: round {round_ + 1} of {repeats}, {one.name}")
            try:
                outcome.rounds.setdefault(one.name, []).append(one.run())
            except ContestantError as error:
                outcome.absent[one.name] = f"failed: {error}"
                outcome.rounds.pop(one.name, None)
    if comparison.same_work:
        outcome.refused = differences(comparison.contestants, outcome.rounds)
    if comparison.contestants[0].name in outcome.absent:
        outcome.refused.append(f"{comparison.contestants[0].name}, which ratios are to, did not run")
    return outcome


def _there(one: Contestant, outcome: Outcome) -> bool:
    """Return whether the package that a contestant needs is installed."""
    if one.needs is None or importlib.util.find_spec(one.needs):
        return True
    outcome.absent[one.name] = f"skipped: {one.needs} is not installed"
    return False


def differences(contestants: Sequence[Contestant], rounds: dict[str, list[Round]]) -> list[str]:
    """Return which contestants' numbers differ from headprobe's, or without it from the first's: other work.

    Contestants that do not compute in float32 are left out.
    """
    exact = [one for one in contestants if one.exact and one.name in rounds]
    if not exact:
        return []
    judge = next((one.name for one in exact if one.ours), exact[0].name)
    expected = rounds[judge][0]
    found = ((one.name, _difference(run, expected)) for one in exact for run in rounds[one.name])
    return sorted({f"{name} {difference} {judge}" for name, difference in found if difference})


def _difference(run: Round, expected: Round) -> str:
    """Return in words how a run's numbers differ from another's, up to the other's name; empty where they do not."""
    odd = sorted(run.counts.keys() ^ expected.counts.keys())
    if odd:
        return f"scored other masks ({', '.join(odd[:3])}) than"
    for mask, count in run.counts.items():
        if abs(count - expected.counts[mask]) > MOST_DIFFERENT:
            return f"counts {count} right under {mask}, not {expected.counts[mask]} as"
    for mask, nll in run.nll.items():
        other = expected.nll.get(mask, nll)
        if not abs(nll - other) <= NLL_TOLERANCE * max(1.0, abs(other)):  # NaN is a difference too
            return f"has a mean NLL of {nll:.5f} under {mask}, not {other:.5f} as"
    return ""


COLUMNS = (
    "case",
    "loop, s",
    "ratio of minima",
    "median ratio",
    "command, s",
    "ratio of minima",
    "median ratio",
    "CPU, s",
    "ratio of minima",
    "peak, MB",
)


def text(comparison: Comparison, outcome: Outcome) -> str:
    """Return what is printed of a comparison: its table, or why there is none."""
    lines = [f"## {comparison.title}", ""]
    if outcome.refused:
        lines += ["No ratios, for contestants did other work:", "", *(f"- {reason}" for reason in outcome.refused)]
    else:
        lines.append(markdown(comparison.setting, COLUMNS, [_cells(row) for row in rows(comparison, outcome)]))
    notes = [f"{name} {why}" for name, why in outcome.absent.items()] + list(comparison.notes)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""] if notes else [*lines, ""])


def rows(comparison: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """Return for each contestant what it took, least and relative to the first."""
    first = outcome.rounds[comparison.contestants[0].name]
    found = []
    for name, mine in outcome.rounds.items():
        row: dict[str, Any] = {"case": name, "peak": median(one.peak for one in mine)}
        for kind in ("loop", "wall", "cpu"):
            times, plain = ([getattr(one, kind) for one in each] for each in (mine, first))
            row[kind] = min(times)
            row |= {f"{kind}_{key}": value for key, value in ratios(times, plain).items()}
        found.append(row)
    order = [one.name for one in comparison.contestants]
    return sorted(found, key=lambda row: order.index(row["case"]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = [row["case"]]
    for kind in ("loop", "wall", "cpu"):
        cells.append(f"{row[kind]:.2f}")
        cells += [f"{row[f'{kind}_{key}']:.3f}" for key in ("ratio_of_minima", "median_ratio")]
    return (*cells[:-1], f"{row['peak']:.0f}")


def as_json(comparison: Comparison, outcome: Outcome) -> dict[str, Any]:
    """Return all single times of a comparison, and its ratios unless they were refused."""
    return {
        "title": comparison.title,
        "setting": comparison.setting,
        "notes": list(comparison.notes),
        "absent": outcome.absent,
        "refused": outcome.refused,
        "rows": [] if outcome.refused else rows(comparison, outcome),
        "commands": {one.name: [nameless(word) for word in one.words] for one in comparison.contestants},
        "rounds": {name: [asdict(one) for one in each] for name, each in outcome.rounds.items()},
    }


def nameless(word: str) -> str:
    """Return a word of a command without the folders of this machine."""
    return Path(word).name if Path(word).is_absolute() else word
