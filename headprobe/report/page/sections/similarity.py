"""How similar heads are: a matrix within each layer, or of the whole model where it was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.measures import MEASURES, Measure, samples_in_words, title
from headprobe.report.matrices import cluster
from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import SCRIPTS, of_runs
from headprobe.run.load import RunFiles

Arrays = Mapping[str, NDArray[Any]]

DIGITS = 1000
"""Similarities stand as whole thousandths, which takes half of the letters."""

OF_ALL_HEADS = ("svcca", "cka_unbiased")
"""Measures that the page holds of the whole model, where the matrices are large; the others are in the file."""

MOST_PAIRS = 3000
"""So many pairs of heads at most are shown by every measure."""

PREFIXES = {"baseline": "", "masked": "masked_", "change": "change_"}


def similarity(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the matrices, from `similarity.npz`."""
    found = of_runs(runs, _similarity)
    if found is None:
        return None
    return Section(
        key="similarity",
        title="How similar heads are",
        short="Similarity",
        look_at=(
            "Blocks of similar heads, which may stand in for each other; pale cells are no more similar than the same "
            "heads on different images."
        ),
        definition=(
            "Outputs of two heads on the same images, compared by the measure chosen; the floor is what the same heads "
            "score on different images. Clustered: average linkage of 1 - similarity."
        ),
        link="describe_heads.md#similaritynpz",
        data={"runs": found},
        sources=("similarity.npz",),
        scripts=SCRIPTS,
    )


def _similarity(run: RunFiles) -> dict[str, Any] | None:
    arrays = run.arrays("similarity.npz")
    measures = sorted((name for name in MEASURES if name in arrays), key=list(arrays).index)
    if not measures:
        return None
    sampling, mask = str(arrays["sampling"]), str(arrays["mask"])
    pairs = _pairs(arrays, measures)
    if not len(pairs):
        return None
    shown = [name for name in measures if name in OF_ALL_HEADS] or measures[:1]
    shown = shown if len(pairs) > MOST_PAIRS else measures
    layer = arrays["layer"]
    return {
        "layer": layer,
        "head": arrays["head"],
        "mask": mask,
        "note": samples_in_words(arrays["samples"], int(arrays["images"]), sampling),
        "left_out": [title(name, sampling) for name in measures if name not in shown],
        "pairs": pairs.T if str(arrays["scope"]) == "pairs" else None,  # else all of a layer, or all
        "within": bool((layer[pairs[:, 0]] == layer[pairs[:, 1]]).all()),
        "measures": [_measure(arrays, name, sampling, pairs, mask) for name in shown],
    }


def _pairs(arrays: Arrays, measures: Sequence[str]) -> NDArray[np.int64]:
    """Return the pairs of different heads that were compared, `[pairs, 2]`, the smaller number first.

    Of scope `within` all pairs of a layer and of scope `all` all pairs, also those without a value, so that who draws
    them knows them without a list.
    """
    layer, scope = arrays["layer"], str(arrays["scope"])
    known = np.zeros((len(layer), len(layer)), dtype=bool)
    if scope == "pairs":
        for name in measures:
            known |= np.isfinite(arrays[name]) | np.isfinite(arrays[name]).T
    else:
        known = (layer[:, None] == layer) | (scope == "all")
    return np.argwhere(np.triu(known, 1))


def _measure(arrays: Arrays, name: Measure, sampling: str, pairs: NDArray[np.int64], mask: str) -> dict[str, Any]:
    """Return a measure of every pair, of the baseline and with a mask of the masked model and the change."""
    models = {}
    for model, prefix in PREFIXES.items() if mask else (("baseline", ""),):
        if prefix + name in arrays:
            models[model] = _model(arrays, prefix + name, pairs)
    return {"name": name, "title": title(name, sampling), "models": models}


def _model(arrays: Arrays, name: str, pairs: NDArray[np.int64]) -> dict[str, Any]:
    values, (first, second) = arrays[name], pairs.T
    found: dict[str, Any] = {"value": _thousandths(values[first, second])}
    if name == "pwcca" or name.endswith("_pwcca"):  # not symmetric
        found["mirrored"] = _thousandths(values[second, first])
    for end in ("floor", "low", "high"):
        limits = arrays.get(f"{name}_{end}")
        if limits is not None and np.isfinite(limits[first, second]).any():
            found[end] = _thousandths(limits[first, second])
    if not name.startswith("change_"):
        found["order"] = _clustered(values, arrays["layer"])
    return found


def _thousandths(values: FloatArray) -> list[int | None]:
    return [round(DIGITS * value) if np.isfinite(value) else None for value in values.tolist()]


def _clustered(values: FloatArray, layer: NDArray[np.int64]) -> list[int]:
    """Return rows of the matrix with similar heads side by side: of the model, or layer by layer."""
    if np.isfinite(values[layer[:, None] != layer]).any():
        return [int(row) for row in cluster(values).order]
    order: list[int] = []
    for number in np.unique(layer):
        own = np.flatnonzero(layer == number)
        order += own[cluster(values[np.ix_(own, own)]).order].tolist()
    return order
