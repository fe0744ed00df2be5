"""Writes what the callbacks found out about every head: tables, arrays, figures, TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from headprobe.callbacks.head_callback import Columns, HeadCallback
from headprobe.callbacks.tensorboard import save_figures
from headprobe.describe.base import BASELINE, CHANGE, MASKED
from headprobe.module import HeadProbe
from headprobe.report.table import console, layers_table
from headprobe.run.results import head_rows, write_arrays, write_rows


def write_descriptions(
    callbacks: Sequence[HeadCallback], loggers: Sequence[Logger], directory: Path, probe: HeadProbe, images: int
) -> None:
    """Write `heads.csv` and all other files of these callbacks, and show them in TensorBoard."""
    heads, subject = probe.layout.heads_per_layer, callbacks[0].statistic.subject
    seen = np.full(sum(heads), images)
    columns = {model: {"images": seen, **of_model} for model, of_model in merged_columns(callbacks).items()}
    models = {subject.title(model): columns[model] for model in subject.models if model in columns}
    if models:
        write_rows(directory / "heads.csv", head_rows(heads, models))
    if CHANGE in columns:
        write_rows(directory / "heads_change.csv", head_rows(heads, {subject.title(MASKED): columns[CHANGE]}))
    for callback in callbacks:
        # a model none of whose layers has a statistic leaves no file of it; run.json says why
        for name, rows in callback.tables().items():
            if table := list(rows):
                write_rows(directory / name, table)
        for name, arrays in callback.arrays().items():
            if arrays:
                write_arrays(directory / name, arrays)
    about = f"{probe.source.name}, {images:,} images"
    for callback in callbacks:
        save_figures(loggers, directory, callback.figures(about))
    write_head_curves(loggers, heads, columns)


def merged_columns(callbacks: Sequence[HeadCallback]) -> dict[str, Columns]:
    """Return the columns of all callbacks by model: `baseline`, `masked` and `change`."""
    merged: dict[str, Columns] = {}
    for callback in callbacks:
        for model, columns in callback.columns().items():
            merged.setdefault(model, {}).update(columns)
    return merged


def undefined(callbacks: Sequence[HeadCallback]) -> dict[str, dict[str, list[int]]]:
    """Return for every statistic that some layers do not have the reasons, with the layers; for `run.json`."""
    found: dict[str, dict[str, list[int]]] = {}
    for callback in callbacks:
        for name, reasons in callback.undefined().items():
            found[name] = {reason: list(layers) for reason, layers in reasons.items()}
    return found


def print_summary(callbacks: Sequence[HeadCallback], probe: HeadProbe) -> None:
    """Print one line per layer, and what the numbers were taken over."""
    found = {heading: values for callback in callbacks for heading, values in callback.summary().items()}
    if found:
        console.print()
        console.print(layers_table(probe.layout.heads_per_layer, found))
    for note in filter(None, (callback.note() for callback in callbacks)):
        console.print(f"Similarity: {note}")


def write_head_curves(loggers: Sequence[Logger], heads: Sequence[int], columns: Mapping[str, Columns]) -> None:
    """Log every head's numbers as curves over layers, such as `attention_distance_px/head_07`, and as histograms.

    Curves of the masked model end in `_masked`, those of the differences in `_change`.
    """
    first = np.cumsum([0, *heads])
    for model, of_model in columns.items():
        suffix = "" if model == BASELINE else f"_{model}"
        shown = {name: values.astype(float) for name, values in of_model.items() if _is_shown(name)}
        for layer in range(len(heads)):
            points: dict[str, Any] = {}
            for name, values in shown.items():
                own = values[first[layer] : first[layer + 1]]
                points |= {f"{name}{suffix}/head_{n:02d}": value for n, value in enumerate(own) if np.isfinite(value)}
                _histogram(loggers, f"{name}{suffix}", own[np.isfinite(own)], layer)
            for logger in loggers:
                logger.log_metrics(points, step=layer)
    for logger in loggers:
        logger.save()


def _is_shown(name: str) -> bool:
    return name != "images" and not name.endswith("_se")


def _histogram(loggers: Sequence[Logger], name: str, values: Any, layer: int) -> None:
    for logger in loggers if len(values) else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, global_step=layer)
