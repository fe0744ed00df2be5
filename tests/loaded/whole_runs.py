"""Writes a run with every table and array that can be read, by hand: nothing is scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headprobe.callbacks.records import IMAGES
from headprobe.masks.tables import SCORES
from headprobe.run.importance import importance_of
from headprobe.run.load import Row, load_files
from headprobe.run.results import write_arrays, write_rows
from tests.run.small_runs import HEADS, write_heads, write_run
from tests.run.small_runs import IMAGES as COUNT

SPECS = ("each:layer", "each:index", "each:head", "subsets:layer", "grow:random:0-4", "one-per-layer:0-1", "head:2.1")

PLACES = [(layer, head) for layer, count in enumerate(HEADS) for head in range(count)]

TOTAL = len(PLACES)

AWKWARD = np.array([0.1, np.nan, 1e-300, -2.5, 1 / 3, np.inf, 5e-324])
"""Numbers that a careless reader rounds, or takes for missing."""


def write_whole_run(folder: Path, **record: Any) -> Path:
    """Write every table and array of a run under two ablations."""
    write_run(folder, SPECS, ["zero", "mean"], **record)
    columns = {
        "attention_distance_px": np.linspace(3, 9, TOTAL),
        "attention_distance_px_se": np.linspace(0.1, 0.2, TOTAL),
        "rank": np.array([3, 4, np.nan, 5, 6, 7, 8]),
        "mine": AWKWARD,
    }
    write_heads(folder, columns)
    write_heads(folder, {"mine": AWKWARD}, name="heads_change.csv")
    scores = [
        {"layer": layer, "head": head, "images": 9, **dict.fromkeys(SCORES, 0.5 + place + layer)}
        for place, (layer, head) in enumerate(PLACES)
    ]
    write_rows(folder / "scores.csv", scores)
    write_rows(folder / "importance.csv", importance_of(load_files(folder)))
    _write_similarity(folder)
    _write_spectrum(folder)
    key: Row = {"mask": "none", "ablation": "none", "draw": 0}
    names = ["NA", "none", "nan", 'a "quoted", name', ""]
    classes: list[Row] = [
        {"class": n, "name": name, "images": 2, "top1_count": 1, "drop_pp": 0.0} for n, name in enumerate(names)
    ]
    write_rows(folder / "classes.csv", [{**key, **row} for row in classes])
    images = [
        {"unit": 0, "row": 0, "source": "a.png", "label": 3, "reason": None},
        {"unit": 0, "row": 1, "source": "b.png", "label": None, "reason": "no image"},
    ]
    pq.write_table(pa.Table.from_pylist(images, schema=IMAGES), folder / "images.parquet")
    return folder


def _write_similarity(folder: Path) -> None:
    layer, head = np.array(PLACES).T
    values = np.where(layer[:, None] == layer, 0.5, np.nan)
    np.fill_diagonal(values, 1)
    about = {"samples": np.full(TOTAL, 9), "images": np.asarray(COUNT), "mask": np.asarray("")}
    arrays = {"layer": layer, "head": head, "svcca": values, "svcca_floor": values / 5, "cca": values / 2, **about}
    write_arrays(folder / "similarity.npz", {**arrays, "sampling": np.asarray("tokens")})
    write_arrays(folder / "offset_maps.npz", {"layer_000": np.full((2, 3, 3), 1 / 9)})


def _write_spectrum(folder: Path) -> None:
    series = [("head", 0), ("head", 1), ("contribution", 0), ("stream_before", -1)]
    numbers = [(layer, name, head, step) for layer in range(len(HEADS)) for name, head in series for step in range(3)]
    rows: list[Row] = [
        {
            "mask": "none",
            "layer": layer,
            "series": name,
            "head": head,
            "profile": "diagonal",
            "frequency": step / 3,
            "images": COUNT,
            "log_amplitude": -step - layer / 7,
            "delta_log_amplitude": -float(step),
            "delta_se": 0.1,
        }
        for layer, name, head, step in numbers
    ]
    write_rows(folder / "spectrum.csv", rows)
