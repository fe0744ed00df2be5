"""How tables of a run stand in the page's data: by column, few letters, numbers as the files have them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.run.load import Columns, Row, RunFiles

SCRIPTS = ("figures",)
"""What the drawings of figures have in common, in `assets/`."""

QUANTITIES = {
    "nll_rise": {"name": "NLL rise", "unit": "nats"},
    "drop_pp": {"name": "top-1 drop", "unit": "percentage points"},
    "feature_distance": {"name": "feature distance", "unit": "of the feature's length"},
}
"""What is lost, and its unit; the first one uses every image, the last one needs no labels."""

LIMITS = {
    "nll_rise": ("nll_rise_low", "nll_rise_high"),
    "drop_pp": ("drop_low_pp", "drop_high_pp"),
    "feature_distance": ("feature_distance_low", "feature_distance_high"),
}
"""Columns of the limits of each quantity."""

WITHOUT_LABELS = "feature_distance"

LOSSES = [column for quantity, limits in LIMITS.items() for column in (quantity, *limits)]


def of_runs(runs: Sequence[RunFiles], of_run: Callable[[RunFiles], dict[str, Any] | None]) -> list[Any] | None:
    """Return what a section shows of each run, None for a run without it; None where no run has any."""
    found = [of_run(run) for run in runs]
    return found if any(one is not None for one in found) else None


def columns_of(table: Columns, names: Iterable[str], rows: NDArray[Any] | None = None) -> dict[str, Any]:
    """Return some columns of a table, those that it has, and of them some rows; texts are coded."""
    chosen = {name: table[name] if rows is None else table[name][rows] for name in names if name in table}
    return {name: coded(values) if values.dtype.kind == "U" else values for name, values in chosen.items()}


def short(values: Any, digits: int = 4) -> Any:
    """Return numbers rounded to so many significant digits: a large table need not have more than a figure shows."""
    numbers = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.floor(np.log10(np.abs(numbers)))
    unit = 10.0 ** (digits - 1 - np.where(np.isfinite(size), size, 0))
    return np.round(numbers * unit) / unit


def coded(values: Iterable[Any]) -> dict[str, Any]:
    """Return texts as the different ones, in their order, and where each stands among them."""
    listed = [str(value) for value in values]
    different = {text: place for place, text in enumerate(dict.fromkeys(listed))}
    return {"of": list(different), "at": [different[text] for text in listed]}


def by_column(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Return rows of `masks.csv` by column."""
    table = {name: np.array([row[name] for row in rows]) for name in names if rows and name in rows[0]}
    return columns_of(table, table)


def rows_of_masks(run: RunFiles) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of `masks.csv` by ablation and mask: one, or as many as draws."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in run.masks[1:]:
        found.setdefault((str(row["ablation"]), str(row["mask"])), []).append(row)
    return found


def losses_of(of_masks: Sequence[Sequence[Row]], limits: bool = True) -> dict[str, list[float]]:
    """Return the losses of masks by column, NaN of a mask without rows: not every mask is scored under every ablation.

    Args:
        of_masks: The rows of each mask; of several draws losses are means, without limits.
        limits: Whether to return the limits too.
    """
    found: dict[str, list[float]] = {}
    labelled = all("nll_rise" in row for rows in of_masks for row in rows)
    for quantity, ends in LIMITS.items():
        if labelled == (quantity == WITHOUT_LABELS):  # of a family of many masks the page has what it draws
            continue
        found[quantity] = [float(np.mean([row[quantity] for row in rows])) if rows else np.nan for rows in of_masks]
        for end in ends if limits else ():
            found[end] = [float(rows[0][end]) if len(rows) == 1 else np.nan for rows in of_masks]
    return found


def kinds_of(run: RunFiles) -> list[str]:
    """Return the ablations of a run, in the order of `masks.csv`."""
    return list(dict.fromkeys(str(row["ablation"]) for row in run.masks[1:]))


def head_name(layer: int, head: int) -> str:
    """Return what the page calls a head, such as `3.1`."""
    return f"{int(layer)}.{int(head)}"


def names_of_heads(table: Mapping[str, Any]) -> list[str]:
    """Return the page's names of the heads of a table with `layer` and `head`."""
    return [head_name(layer, head) for layer, head in zip(table["layer"], table["head"], strict=True)]
