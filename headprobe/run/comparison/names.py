"""What a comparison calls its runs: by what tells them apart, model or data, else by their folders."""

from collections import Counter
from collections.abc import Sequence

from headprobe.run.load import RunFiles


def names_of_runs(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run, no two the same."""
    names = [
        " on ".join(filter(None, parts)) for parts in zip(*map(_telling, (_models(runs), _data(runs))), strict=True)
    ]
    tails = _tails(runs)
    often = Counter(names)
    full = [
        name if name and often[name] == 1 else f"{name} ({tail})" if name else tail
        for name, tail in zip(names, tails, strict=True)
    ]
    times: Counter[str] = Counter()
    for place, name in enumerate(full):  # the same run twice
        times[name] += 1
        full[place] = name if times[name] == 1 else f"{name}, {times[name]}"
    return full


def _telling(texts: list[str]) -> list[str]:
    """Return texts where they differ, else empty ones."""
    return texts if len(set(texts)) > 1 else [""] * len(texts)


def _models(runs: Sequence[RunFiles]) -> list[str]:
    models = [run.record["model"] for run in runs]
    return [str(model.get("title", model["name"])) for model in models]


def _data(runs: Sequence[RunFiles]) -> list[str]:
    """Return the data of each run; with the split where that differs."""
    data = [run.record.get("data") or {} for run in runs]
    paths = [str(one.get("path", "unknown data")) for one in data]
    splits = _telling([str(one.get("split") or "") for one in data])
    return [f"{path} {split}".strip() for path, split in zip(paths, splits, strict=True)]


def _tails(runs: Sequence[RunFiles]) -> list[str]:
    """Return the parts of each run's path that tell it from the others, from the end on; of equal paths the folder."""
    paths = [run.path.resolve().parts for run in runs]
    deepest = min(map(len, paths))
    tails: list[tuple[str, ...]] = [()] * len(runs)
    for place in range(1, deepest + 1):
        parts = [path[-place] for path in paths]
        if len(set(parts)) > 1:
            tails = [(part, *tail) for part, tail in zip(parts, tails, strict=True)]
        if len(set(tails)) == len(set(paths)):
            break
    return ["/".join(tail) or path[-1] for tail, path in zip(tails, paths, strict=True)]
