"""The map of heads, coloured by any column, and the card of each head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.metrics.similarity.measures import MEASURES
from headprobe.report.page.columns import MEASURE_NAMES, HeadColumn, Place, columns_of, places_of
from headprobe.report.page.examples import examples_of
from headprobe.report.page.section import Section
from headprobe.run.load import Columns, RunFiles

NEIGHBOURS = 4
"""How many of the nearest heads a card names."""

FILES = (
    "masks.csv",
    "shapley.csv",
    "scores.csv",
    "heads.csv",
    "similarity.npz",
    "spectrum.csv",
    "offset_maps.npz",
    "examples.npz",
)


def section(runs: Sequence[RunFiles]) -> Section | None:
    """Return the map and the cards of every run's heads; None where no file says anything of single heads."""
    columns = [columns_of(run) for run in runs]
    if not any(columns):
        return None
    return Section(
        key="heads",
        title="Every head",
        short="Heads",
        look_at="A row is a layer, a cell a head (3.1: layer 3, head 1). Choose one to see all that is known of it.",
        definition="Costs are those of the model with one head masked, against the same model on the same images.",
        link="results.md#maskscsv",
        data={"runs": [_of_run(run, own) for run, own in zip(runs, columns, strict=True)]},
        sources=[name for name in FILES if any((run.path / name).is_file() for run in runs)],
        scripts=["examples", "card"],
    )


def _of_run(run: RunFiles, columns: Sequence[HeadColumn]) -> dict[str, Any]:
    """Return what map and cards of one run show."""
    return {
        "heads_per_layer": run.record["model"]["heads_per_layer"],
        "columns": [column.for_page() for column in columns],
        "nearest": _nearest(run),
        "spectra": _spectra(run),
        "offsets": _offset_maps(run),
        "examples": examples_of(run),
    }


# -- what only the cards show --


def _nearest(run: RunFiles) -> list[dict[str, Any]]:
    """Return for each measure the heads that are nearest to each head, the nearest first.

    Each has `of`: per head a list of (number of the other head, similarity, noise floor, whether it is above that).
    """
    found = run.arrays("similarity.npz")
    measures = [measure for measure in MEASURES if measure in found]
    return [
        {"measure": MEASURE_NAMES[measure], "of": _of_measure(found, measure, places_of(run))} for measure in measures
    ]


def _of_measure(found: dict[str, NDArray[Any]], measure: str, places: Sequence[Place]) -> list[list[list[Any]]]:
    values = found[measure]
    floors = found.get(f"{measure}_floor", np.full_like(values, np.nan))
    above = found.get(f"{measure}_above_floor")
    numbers = {place: number for number, place in enumerate(places)}
    # By row of the matrices the number of its head.
    heads = [numbers[Place(int(layer), int(head))] for layer, head in zip(found["layer"], found["head"], strict=True)]
    nearest: list[list[list[Any]]] = [[] for _ in places]
    for row, head in enumerate(heads):
        others = [one for one in np.argsort(-values[row]) if one != row and np.isfinite(values[row, one])]
        nearest[head] = [
            [heads[one], values[row, one], floors[row, one], None if above is None else bool(above[row, one])]
            for one in others[:NEIGHBOURS]
        ]
    return nearest


def _spectra(run: RunFiles) -> list[dict[str, Any]]:
    """Return the spectra of outputs by layer: `frequency` `[bins]`, `heads`, and `values` `[heads, bins]`."""
    table = run.table("spectrum.csv")
    if not table:
        return []
    chosen = (table["mask"] == "none") & (table["series"] == "head") & (table["profile"] == "diagonal")
    own = {name: values[chosen] for name, values in table.items()}
    return [_of_layer(own, layer) for layer in np.unique(own["layer"])]


def _of_layer(table: Columns, layer: int) -> dict[str, Any]:
    here = table["layer"] == layer
    heads = np.unique(table["head"][here])
    frequency = np.unique(table["frequency"][here])
    values = np.full((len(heads), len(frequency)), np.nan)
    at = np.searchsorted(heads, table["head"][here]), np.searchsorted(frequency, table["frequency"][here])
    values[at] = table["delta_log_amplitude"][here]
    return {"layer": layer, "heads": heads, "frequency": frequency, "values": values}


def _offset_maps(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Return by layer the mean attention by offset, each head's map in 255 steps of its own largest weight."""
    maps: dict[str, dict[str, Any]] = {}
    for name, values in run.arrays("offset_maps.npz").items():
        if name.startswith("layer_"):
            most = np.nanmax(values, axis=(1, 2), initial=0.0)
            steps = 255 * np.nan_to_num(values) / np.where(most > 0, most, 1)[:, None, None]
            maps[str(int(name.removeprefix("layer_")))] = {"most": most, "maps": np.round(steps).astype(np.uint8)}
    return maps
