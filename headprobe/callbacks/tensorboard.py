"""Shows a run's files in TensorBoard: curves over layers, indices or numbers of heads, figures, hyperparameters."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from headprobe.files import write_bytes
from headprobe.masks.ablations import ZERO
from headprobe.report.run_figures import run_figures
from headprobe.run.load import SAME, Columns, Row, RunFiles, read_files

CURVE_COLUMNS = ("top1", "top5", "drop_pp", "nll", "nll_rise", "agreement", "feature_cosine", "feature_distance")
BASELINE_COLUMNS = ("top1", "top5", "nll", "feature_cosine", "feature_distance")
"""Of these a run has those that its labels and its model allow."""

_DROP = ("drop_pp", "drop_low_pp", "drop_high_pp")
_RISE = ("nll_rise", "nll_rise_low", "nll_rise_high")
_MOVED = ("feature_cosine", "feature_distance")
"""Columns of `curves.csv`: an estimate and its limits."""


def write_tensorboard(loggers: Sequence[Logger], directory: Path) -> None:
    """Write scalars to every logger, figures to TensorBoard and to `figures/`; all of them from the run's files.

    A mask has a place on its curve, the step: its layer, its index or the number of its heads. The baseline is drawn as
    a constant over the steps of all curves.

    Raises:
        RunError: A file cannot be written.
    """
    run = read_files(directory)
    scalars = _scalars(run)
    for logger in loggers:
        for step, values in sorted(scalars.items()):
            logger.log_metrics(values, step=step)
        if isinstance(logger, TensorBoardLogger):
            if said := run.record.get("decisions", {}).get("calibration"):
                logger.experiment.add_text("calibration", said, global_step=0)
            top1 = {"baseline/top1": float(run.masks[0]["top1"])} if run.labelled else {}
            logger.log_hyperparams(_hyperparameters(run), top1)
    save_figures(loggers, directory, run_figures(run))
    for model, columns in run.described("heads").items():
        suffix = "" if model == "baseline" else f"_{model}"
        _write_head_curves(loggers, columns, suffix)
    for logger in loggers:
        logger.save()


def save_figures(loggers: Sequence[Logger], directory: Path, figures: Iterable[tuple[str, Figure]]) -> None:
    """Write figures to `figures/` and the same pixels to TensorBoard.

    Raises:
        RunError: A file cannot be written.
    """
    boards = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
    for name, figure in figures:
        content = io.BytesIO()
        figure.savefig(content, dpi=150)  # drawn once for both: drawing takes longer than all the rest
        write_bytes(directory / "figures" / f"{name.replace('/', '_')}.png", content.getvalue())
        pixels = np.asarray(Image.open(content).convert("RGB"))  # [height, width, 3]
        for board in boards:
            board.experiment.add_image(name, pixels, global_step=0, dataformats="HWC")


def _scalars(run: RunFiles) -> dict[int, dict[str, float]]:
    """Return for every step the scalars `column/curve`; curves of an ablation other than zero end in its name.

    Those whose constants were fitted on the judged images end in `_same` too.
    """
    scalars: dict[int, dict[str, float]] = {}
    for suffix, rows in _by_variant(run.masks).items():
        places = Counter(run.curves[str(row["mask"])] for row in rows)
        for row in rows:
            curve, step = run.curves[str(row["mask"])]
            if places[curve, step] > 1:
                continue  # pairs of heads, sets of layers: one of many would pass for all
            for column in _there(row, CURVE_COLUMNS):
                scalars.setdefault(step, {})[f"{column}/{curve}{suffix}"] = float(row[column])

    _add_random_orders(run, scalars)
    baseline = {f"{column}/baseline": float(run.masks[0][column]) for column in _there(run.masks[0], BASELINE_COLUMNS)}
    for step in list(scalars) or [0]:
        scalars.setdefault(step, {}).update(baseline)
    return scalars


def _there(row: Row, columns: Sequence[str]) -> list[str]:
    """Return which of these columns a row has, those that are empty for every model left out."""
    return [
        name for name in columns if name in row and not (name.startswith("feature_") and np.isnan(float(row[name])))
    ]


def _add_random_orders(run: RunFiles, scalars: dict[int, dict[str, float]]) -> None:
    """Add the mean of random orders at each number of heads, and its limits in `curves.csv`, beside the single orders.

    They are curves of their own: `random_orders`, `random_orders_low` and `random_orders_high`.
    """
    table = run.table("curves.csv")
    if table is None:
        return
    drawn = [row for row in run.masks if "random_seed_" in run.curves.get(str(row["mask"]), ("",))[0]]
    # of several draws of an ablation it is the mean
    suffixes = {str(rows[0]["ablation"]): end.partition("_draw_")[0] for end, rows in _by_variant([{}, *drawn]).items()}
    for place in np.flatnonzero(table["orders"] > 1).tolist():
        row = {name: values[place] for name, values in table.items()}
        curve = f"{row['order']}_orders{suffixes[str(row['ablation'])]}"
        named = {name: [float(row[f"{name}{end}"]) for end in ("", "_low", "_high")] for name in _MOVED if name in row}
        named |= _scored(run, row) if run.labelled else {}
        step = scalars.setdefault(int(row["heads_removed"]), {})
        for column, values in named.items():
            ends = (f"{column}/{curve}{end}" for end in ("", "_low", "_high"))
            step |= {name: value for name, value in zip(ends, values, strict=True) if np.isfinite(value)}


def _scored(run: RunFiles, row: Row) -> dict[str, list[float]]:
    """Return accuracy and loss of a point with their limits, and the same as drop and rise."""
    top1, nll = float(run.masks[0]["top1"]), float(run.masks[0]["nll"])
    drops, rises = ([float(row[name]) for name in columns] for columns in (_DROP, _RISE))
    # a low accuracy is a high drop
    accuracies = [float(row["top1"]), top1 - drops[2] / 100, top1 - drops[1] / 100]
    losses = [float(row["nll"]), nll + rises[1], nll + rises[2]]
    return {"top1": accuracies, "drop_pp": drops, "nll": losses, "nll_rise": rises}


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of `masks.csv` without the baseline, by what is appended to the names of curves.

    Nothing for the ablation `zero`, and otherwise the ablation and its draw: `_mean`, `_mean_same`,
    `_resample_draw_1`.
    """
    found: dict[str, list[Row]] = {}
    for row in rows[1:]:
        suffix = "" if row["ablation"] == ZERO else f"_{row['ablation']}"
        suffix += f"_{SAME}" if row.get("calibration") == SAME else ""
        suffix += f"_draw_{row['draw']}" if row["draw"] else ""
        found.setdefault(suffix, []).append(row)
    return found


def _hyperparameters(run: RunFiles) -> dict[str, Any]:
    """Return what may differ between runs, for TensorBoard's table of runs."""
    model, data = run.record["model"], run.record["data"]
    ablations = sorted({str(row["ablation"]) for row in run.masks[1:]})
    return {
        "model": model["name"],
        "weights": model["weights"] or ("pretrained" if model["pretrained"] else "random"),
        "masks": ", ".join(run.record["specs"]) or "none",
        "ablation": ", ".join(ablations) or "none",
        "calibration": run.calibration or "none",
        "data": str(data.get("path")),
        "split": str(data.get("split")),
    }


def _write_head_curves(loggers: Sequence[Logger], columns: Columns, suffix: str) -> None:
    """Log every head's numbers as curves over layers, such as `attention_distance_px/head_07`, and as histograms.

    Args:
        loggers: Where to.
        columns: `heads.csv` of one model, or `heads_change.csv`.
        suffix: What the names of its curves end in: nothing for the baseline, `_masked`, `_change`.
    """
    shown = [name for name in columns if name not in ("mask", "layer", "head", "images") and not name.endswith("_se")]
    for layer in np.unique(columns["layer"]).tolist():
        here = columns["layer"] == layer
        heads = columns["head"][here]
        scalars: dict[str, float] = {}
        for name in shown:
            values = columns[name][here]  # [heads of the layer]
            finite = np.isfinite(values)
            for head, value in zip(heads[finite].tolist(), values[finite].tolist(), strict=True):
                scalars[f"{name}{suffix}/head_{head:02d}"] = value
            _log_histogram(loggers, f"{name}{suffix}", values[finite], layer)
        for logger in loggers:
            logger.log_metrics(scalars, step=layer)


def _log_histogram(loggers: Sequence[Logger], name: str, values: Any, layer: int) -> None:
    for logger in loggers if len(values) else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, global_step=layer)
