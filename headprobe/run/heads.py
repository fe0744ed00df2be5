"""The description of heads as files: `heads.csv`, `heads_change.csv`, and arrays as npz."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.run.files import write_bytes
from headprobe.run.results import Cell, Row


def head_rows(heads_per_layer: Sequence[int], models: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> list[Row]:
    """Return a row per model, layer and head.

    Args:
        heads_per_layer: Heads of each layer.
        models: By the model's name its columns, one entry per head in the order of (layer, head).
    """
    places = [(layer, head) for layer, heads in enumerate(heads_per_layer) for head in range(heads)]
    rows: list[Row] = []
    for name, columns in models.items():
        for number, (layer, head) in enumerate(places):
            cells: dict[str, Cell] = {column: values[number].item() for column, values in columns.items()}
            rows.append({"model": name, "layer": layer, "head": head, **cells})
    return rows


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write arrays as a compressed npz file, in one step."""
    out, content = io.BytesIO(), dict[str, Any](arrays)
    np.savez_compressed(out, **content)
    write_bytes(path, out.getvalue())
