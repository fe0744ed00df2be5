"""`HeadAttention`: how far, how sharply and at what every head looks."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from headprobe.callbacks.head_callback import Columns, HeadCallback, by_layer_mean
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import BASELINE, CHANGE, MASKED, prefixed
from headprobe.metrics.attention.offsets import WITHOUT_MAP
from headprobe.metrics.attention.statistics import HeadTable
from headprobe.report.head_figures import by_layer, change_by_layer
from headprobe.report.offset_figures import offset_grid
from headprobe.units.tree import Arrays

UNIFORM = {"attention_distance_px": "attention_distance_ratio", "entropy_nats": "entropy_ratio"}
"""Statistics with a value under uniform attention, and what divides by it."""

DRAWN = {
    "attention_distance_px": ("Mean attention distance", "distance (pixels)"),
    "entropy_nats": ("Attention entropy between patches", "entropy (nats)"),
    "mutual_information": ("Normalised mutual information of query and key", "mutual information"),
    "confidence": ("Confidence: the largest weight of a query", "confidence"),
    "class_mass": ("Attention of patches to the class token", "class mass"),
    "register_mass": ("Attention of patches to registers", "register mass"),
    "self_mass": ("Attention of patches to themselves", "self mass"),
    "sink_mass": ("Largest key's share of attention", "sink mass"),
    "value_weighted_attention": ("Attention weighted by the size of the values", "over uniform attention"),
    "output_norm_ratio": ("Head output relative to the residual stream", "norm ratio"),
}
"""Titles and axes of the figures by layer."""


class HeadAttention(HeadCallback):
    """Describes what every head attends to: distance, entropy, sinks and more; see docs/describe_heads.md.

    Args:
        offset_maps: Also write each head's mean attention by offset of key from query, as `offset_maps.npz`.
    """

    statistic: AttentionSums

    def __init__(self, offset_maps: bool = True) -> None:
        super().__init__(AttentionSums(offset_maps))

    def columns(self) -> dict[str, Columns]:
        """Return every statistic and its standard error."""
        return {model: _columns(table) for model, table in self.statistic.tables().items()}

    def arrays(self) -> dict[str, Arrays]:
        """Return the offset maps."""
        arrays: Arrays = {}
        for model, maps in self.statistic.maps().items():
            of_layers = {f"layer_{n:03d}": values for n, values in enumerate(maps) if values is not None}
            arrays |= {prefixed(model, name): values for name, values in of_layers.items()}
        return {"offset_maps.npz": arrays} if arrays else {}

    def figures(self, about: str) -> dict[str, Figure]:
        """Return dots by layer for every statistic, and the grid of offset maps."""
        tables, figures, subject = self.statistic.tables(), {}, self.statistic.subject
        for name, (title, axis) in DRAWN.items():
            if not np.isfinite(tables[BASELINE].mean[name]).any():
                continue
            figures[f"{name}/by_layer"] = self._by_layer(tables, name, f"{title}\n{about}", axis)
            if CHANGE in tables:
                table, heading = tables[CHANGE], f"{title}: {subject.title(CHANGE)}\n{about}"
                figures[f"{name}/change"] = change_by_layer(
                    table.layer, table.head, table.mean[name], table.error[name], heading, f"change of {axis}"
                )
        for model, maps in self.statistic.maps().items():
            title = f"Where each head looks, by offset: {subject.title(model)}\n{about}"
            figures[f"offset_maps/{model}"] = offset_grid(maps, title)
        return figures

    def _by_layer(self, tables: dict[str, HeadTable], name: str, title: str, axis: str) -> Figure:
        table, masked = tables[BASELINE], tables.get(MASKED)
        return by_layer(
            table.layer,
            table.head,
            table.mean[name],
            table.error[name],
            title,
            axis,
            uniform=_uniform(table, name),
            masked=None if masked is None else masked.mean[name],
            masked_name=self.statistic.subject.mask or "",
        )

    def undefined(self) -> dict[str, dict[str, list[int]]]:
        """Return why cells are empty."""
        found: dict[str, dict[str, list[int]]] = {}
        for layer, reasons in enumerate(self.statistic.reasons()):
            for name, reason in reasons.items():
                found.setdefault(name, {}).setdefault(reason, []).append(layer)
        for maps in self.statistic.maps().values():
            if without := [layer for layer, values in enumerate(maps) if values is None]:
                found["offset_maps"] = {WITHOUT_MAP: without}
        return found

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean distance and entropy."""
        table = self.statistic.tables()[BASELINE]
        return {
            "distance px": by_layer_mean(table.layer, table.mean["attention_distance_px"]),
            "entropy nats": by_layer_mean(table.layer, table.mean["entropy_nats"]),
        }


def _columns(table: HeadTable) -> Columns:
    columns: Columns = {"images": table.images}
    for name, values in table.mean.items():
        columns |= {name: values, f"{name}_se": table.error[name]}
    return columns


def _uniform(table: HeadTable, name: str) -> NDArray[np.float64] | None:
    """Return a statistic's value under uniform attention, from its ratio to it."""
    if name not in UNIFORM:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(table.mean[name] / table.mean[UNIFORM[name]], dtype=np.float64)
