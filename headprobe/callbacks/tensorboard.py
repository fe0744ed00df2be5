"""Shows a run's masks in TensorBoard: curves over layers, indices or numbers of heads, a heat map, hyperparameters."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from headprobe.files import write_bytes
from headprobe.module import HeadProbe
from headprobe.report.figures import drop_curve, head_heat_map
from headprobe.run.results import Row

SIGNIFICANT_Q = 0.05
"""False discovery rate below which a head's drop gets a ring in the heat map."""

CURVE_COLUMNS = ("top1", "top5", "drop_pp", "nll", "nll_rise", "agreement")


def write_tensorboard(
    loggers: Sequence[Logger], directory: Path, rows: Sequence[Row], probe: HeadProbe, data: dict[str, Any]
) -> None:
    """Write scalars to every logger, figures to TensorBoard and to `figures/`.

    A mask is a point of its curve at its own step (its layer, its index, the number of its heads); the baseline is
    drawn as a constant over the steps of all curves.
    """
    scalars = _points(rows, probe)
    for logger in loggers:
        for step, values in sorted(scalars.items()):
            logger.log_metrics(values, step=step)
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(_hyperparameters(probe, data), {"baseline/top1": float(rows[0]["top1"])})
    save_figures(loggers, directory, _figures(rows, probe))


def save_figures(loggers: Sequence[Logger], directory: Path, figures: Mapping[str, Figure]) -> None:
    """Write figures to `figures/` and the same pixels to TensorBoard.

    Raises:
        RunError: A file cannot be written.
    """
    boards = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, dpi=150)  # drawn once for both: drawing takes longer than all the rest
        write_bytes(directory / "figures" / f"{name.replace('/', '_')}.png", content.getvalue())
        pixels = np.asarray(Image.open(content).convert("RGB"))
        for board in boards:
            board.experiment.add_image(name, pixels, global_step=0, dataformats="HWC")
    for logger in loggers:
        logger.save()


def _points(rows: Sequence[Row], probe: HeadProbe) -> dict[int, dict[str, float]]:
    """Return for every step the scalars `column/curve`."""
    points: dict[int, dict[str, float]] = {}
    for named, row in zip([variant.mask for variant in probe.variants], rows[1:], strict=True):
        for column in CURVE_COLUMNS:
            points.setdefault(named.step, {})[f"{column}/{named.curve}"] = float(row[column])
    for step in points or {0: {}}:
        for column in ("top1", "top5", "nll"):
            points.setdefault(step, {})[f"{column}/baseline"] = float(rows[0][column])
    return points


def _figures(rows: Sequence[Row], probe: HeadProbe) -> dict[str, Figure]:
    """Return the figures that these masks allow: a heat map of single heads, drops over layers and indices."""
    about = f"{probe.source.name}, {rows[0]['images']:,} images, zero ablation"
    figures: dict[str, Figure] = {}
    heads = _single_heads(rows, probe, "drop_pp")
    if np.isfinite(heads).sum() > 1:
        figures["drop_pp/heads"] = head_heat_map(
            heads,
            f"Top-1 drop when one head is masked (ring: q < {SIGNIFICANT_Q})\n{about}",
            "drop (percentage points)",
            ringed=_single_heads(rows, probe, "bh_q") < SIGNIFICANT_Q,
        )
    for curve, axis in (("by_layer", "layer masked"), ("by_index", "head index masked in every layer")):
        points = [
            (named.step, row)
            for named, row in zip([variant.mask for variant in probe.variants], rows[1:], strict=True)
            if named.curve == curve
        ]
        if len(points) > 1:
            columns = ([float(row[name]) for _, row in points] for name in ("drop_pp", "drop_low_pp", "drop_high_pp"))
            drops, lows, highs = columns
            title = f"Top-1 drop with its paired 95% interval\n{about}"
            figures[f"drop_pp/{curve}"] = drop_curve([step for step, _ in points], drops, lows, highs, axis, title)
    return figures


def _single_heads(rows: Sequence[Row], probe: HeadProbe, column: str) -> NDArray[np.float64]:
    """Return a column of the masks of exactly one head as `[layers, max heads]`, NaN where none was scored."""
    shape = probe.layout.heads_per_layer
    values = np.full((len(shape), max(shape)), np.nan)
    for named, row in zip([variant.mask for variant in probe.variants], rows[1:], strict=True):
        if named.mask.count == 1:
            (head,) = named.mask.masked
            values[head] = float(row[column])
    return values


def _hyperparameters(probe: HeadProbe, data: dict[str, Any]) -> dict[str, Any]:
    families = {variant.mask.test_family or variant.mask.name for variant in probe.variants}
    return {
        "model": probe.source.name,
        "weights": probe.source.weights or ("pretrained" if probe.source.pretrained else "random"),
        "masks": ", ".join(sorted(families)) or "none",
        "ablation": ", ".join(sorted({variant.ablation for variant in probe.variants})) or "none",
        "data": str(data.get("path")),
        "split": str(data.get("split")),
    }
