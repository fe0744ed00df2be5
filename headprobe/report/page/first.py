"""The first screen: model and data in a line, the answer in sentences, a table of what was measured."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from headprobe.run.load import RunFiles


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: its model, and its directory where several have the same."""
    titles = [model_of(run) for run in runs]
    often = Counter(titles)
    return [
        f"{title} ({run.path.name})" if often[title] > 1 else title for title, run in zip(titles, runs, strict=True)
    ]


def model_of(run: RunFiles) -> str:
    """Return what titles call a run's model. Runs of before have only a name."""
    model = run.record["model"]
    return str(model.get("title", model["name"]))


def first_screen(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return for each run what the first screen and the end of the page write."""
    return [_first(run) for run in runs]


def _first(run: RunFiles) -> dict[str, Any]:
    """Return one run's texts."""
    data = run.record.get("data") or {}
    return {
        "model": model_of(run),
        "data": f"{data.get('path', 'data')}, {data.get('split', '')}",
        "sentences": [],
        "notices": [],
        "provenance": [("directory", str(run.path))],
        "command": str(run.record.get("command", "")),
        "facts": [],
    }
