"""What the benchmarks have in common: options that must be at least 1, ratios, a table in Markdown, a JSON file."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def refuse_below_one(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with a message where one of these options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")


def ratios(times: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """Return what a case takes relative to the plain one: ratio of the minima, and median over rounds."""
    return {
        "ratio_of_minima": min(times) / min(plain),
        "median_ratio": median(one / other for one, other in zip(times, plain, strict=True)),
    }


Times = dict[str, list[tuple[float, float]]]
"""Seconds on the clock and CPU seconds of each round, by case."""


def take_turns(runs: dict[str, Callable[[], None]], repeats: int, wait: Callable[[], None] | None = None) -> Times:
    """Return the times of each case and round, after one round to warm up; the order is reversed every round.

    Args:
        runs: What is timed, by case.
        repeats: Rounds.
        wait: Waits until a device has done what was asked of it, where the calls return before.
    """
    times: Times = {name: [] for name in runs}
    order = list(runs)
    for round_ in range(-1, repeats):
        order.reverse()
        for name in order:
            began, began_cpu = time.perf_counter(), time.process_time()
            runs[name]()
            if wait is not None:
                wait()
            spent = time.perf_counter() - began, time.process_time() - began_cpu
            if round_ >= 0:
                times[name].append(spent)
    return times


def compare(times: Times, plain: str) -> list[dict[str, Any]]:
    """Return for each case its least seconds, and its time relative to the plain one's: of the minima, and median."""
    rows = []
    for name, of_case in times.items():
        row: dict[str, Any] = {"case": name, "seconds": min(clock for clock, _ in of_case)}
        for kind, place in (("clock", 0), ("cpu", 1)):
            mine, others = ([one[place] for one in found] for found in (of_case, times[plain]))
            row |= {f"{kind}_{name}": value for name, value in ratios(mine, others).items()}
        rows.append(row)
    return rows


def markdown(setting: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table under a line that says what was measured; all columns but the first are numbers."""
    lines = [", ".join(f"{name} {value}" for name, value in setting.items()), ""]
    lines += [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def publish(text: str, setting: dict[str, Any], cases: Sequence[dict[str, Any]], file: Path | None) -> None:
    """Print the table and, if asked for, write the numbers."""
    print(text)
    if file is not None:
        file.write_text(json.dumps({**setting, "cases": list(cases)}, indent=2) + "\n")
