"""`run.plot`: figures of a run, each as `(fig, ax)`, or drawn into axes of yours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headprobe.errors import UsageError
from headprobe.loaded.tables import not_there
from headprobe.metrics.arrays import FloatArray
from headprobe.report.curve_figures import AXES, axes_of, orders_figure
from headprobe.report.figures import head_heat_map
from headprobe.report.importance_figures import correlations
from headprobe.report.mask_figures import MAPS, drops_along, drops_of_masks, head_map, largest_change
from headprobe.report.run_figures import SPECTRA, about_heads, about_model, measures_of, similarity, statistic
from headprobe.report.spectrum_figures import spectra_by_layer
from headprobe.report.style import FIGURES, figure_of
from headprobe.run.ablations import main_quantity
from headprobe.run.columns import unit_of
from headprobe.run.load import Columns, Row, RunFiles
from headprobe.run.results import column_rows
from headprobe.text import counted

Drawn = tuple[Figure, Any]
"""A figure and its axes; where it has several panels, an array of them."""

MOST_NAMED = 60
"""Masks that have room beside each other with their names."""

BY = {"layer": "by_layer", "index": "by_index", "mask": ""}
"""What drops can be drawn along, and the curve of `masks.json`."""

NO_COLUMNS = ("mask", "layer", "head", "images")
"""Columns of tables of heads that describe no head."""

T = TypeVar("T")


class Plots:
    """Draws a run from its files.

    Every method returns `(fig, ax)`. Figures are pyplot's, so notebooks show them; `plt.close(fig)` frees one. With
    `ax` the method draws into these axes, with a short title and without the caption below. A figure of several panels
    gives an array of axes, and takes `ax` once it is narrowed to one panel.

    Args:
        files: The files of the run.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def drops(self, ax: Axes | None = None, *, by: str | None = None, ablation: str | None = None) -> Drawn:
        """Draw top-1 drops with their paired 95% intervals.

        Args:
            ax: Axes to draw into.
            by: `layer`, `index`, or `mask`: every mask by its name, of more than 60 the largest drops. The first of
                them that the run has if not given.
            ablation: The first of the run if not given.

        Raises:
            UsageError: The run has no such masks.
        """
        rows = self._rows(ablation)
        curves = {self._files.curves[str(row["mask"])][0] for row in rows}
        ways = [way for way, curve in BY.items() if not curve or curve in curves]
        way = _choice("by", by, ways)
        with _shown():
            figure = drops_along(self._files, rows, BY[way], _checked(ax)) if BY[way] else None
            return _drawn(figure or drops_of_masks(self._files, rows, MOST_NAMED, _checked(ax)), ax)

    def heads_map(self, ax: Axes | None = None, *, column: str | None = None, ablation: str | None = None) -> Drawn:
        """Draw a map of layers and heads.

        Args:
            ax: Axes to draw into.
            column: `nll_rise`, `drop_pp` or `feature_distance` of masks of one head; or a column of `scores.csv` or of
                the baseline's rows of `heads.csv`. The first of these that the run has if not given.
            ablation: Of the masks; the first of the run if not given.

        Raises:
            UsageError: There is no such column, or fewer than two heads were masked alone.
        """
        quantities = {one.column: one for one in MAPS if one.column in self._files.masks[0]}
        column = column or next(iter(quantities))
        if column not in quantities:
            return self._map_of_column(column, list(quantities), _checked(ax))
        rows = self._rows(ablation)
        limit = largest_change(self._files, [self._rows(kind) for kind in self._ablations], column)
        with _shown():
            figure = head_map(self._files, rows, quantities[column], limit, _checked(ax))
        if figure is None:
            raise UsageError(
                f"a map of {column} needs two masks of one head or more: a test with --mask-spec each:head makes them, "
                f"got {str(self._files.path)!r}"
            )
        return _drawn(figure, ax)

    def distance(self, ax: Axes | None = None, *, column: str = "attention_distance_px") -> Drawn:
        """Draw how far every head looks, over the layers: figure 7 of the ViT paper (Dosovitskiy et al., 2021).

        Args:
            ax: Axes to draw into.
            column: Another column of `heads.csv` to draw in the same way.

        Raises:
            UsageError: The run has no `heads.csv`, or no such column in it.
        """
        heads = self._files.described("heads")
        if not heads:
            raise self._missing("heads.csv")
        columns = [name for name in heads["baseline"] if name not in NO_COLUMNS]
        _choice("column", column, [name for name in columns if not name.endswith("_se")])
        with _shown():
            return _drawn(statistic(heads, column, about_heads(self._files), _checked(ax)), ax)

    def similarity(self, ax: Axes | None = None, *, measure: str | None = None, layer: int | None = None) -> Drawn:
        """Draw how similar heads are: a matrix of all heads, or where only heads of a layer were compared one a layer.

        Args:
            ax: Axes to draw into; with `layer` where there is a matrix for each.
            measure: Such as `svcca`; the first of the file if not given.
            layer: Of this layer alone.

        Raises:
            UsageError: The run has no `similarity.npz`, no such measure or layer, or `ax` has no room for all panels.
        """
        arrays = self._files.arrays("similarity.npz")
        if not arrays:
            raise self._missing("similarity.npz")
        chosen = _choice("measure", measure, measures_of(arrays))
        layers = _layers(arrays["layer"], layer)
        between = np.isfinite(arrays[chosen][arrays["layer"][:, None] != arrays["layer"]]).any()
        _refuse_panels(ax, 1 if between else len(layers), "layer=")
        with _shown():
            return _drawn(similarity(arrays, chosen, layers, about_heads(self._files), _checked(ax)), ax)

    def spectra(self, ax: Axes | None = None, *, series: str = "head", layer: int | None = None) -> Drawn:
        """Draw the frequencies that heads carry, a panel for each layer.

        Args:
            ax: Axes to draw into, with `layer`.
            series: `head`, the outputs of heads, or `contribution`, what they add to the stream.
            layer: Of this layer alone.

        Raises:
            UsageError: The run has no `spectrum.csv`, no such series or layer, or `ax` has no room for all panels.
        """
        described = self._files.described("spectrum")
        if not described:
            raise self._missing("spectrum.csv")
        table = described["baseline"]
        _choice("series", series, list(SPECTRA))
        layers = _layers(table["layer"], layer)
        _refuse_panels(ax, len(layers), "layer=")
        shown = _where(table, np.isin(table["layer"], layers))
        title = f"Spectra of {SPECTRA[series]}: baseline\n{about_heads(self._files)}"
        with _shown():
            return _drawn(spectra_by_layer(shown, title, series, given=_checked(ax)), ax)

    def curves(self, ax: Axes | None = None, *, quantity: str | None = None, ablation: str | None = None) -> Drawn:
        """Draw accuracy and NLL against the heads removed, in each order: a panel for each quantity and ablation.

        Args:
            ax: Axes to draw into, with `quantity`, and with `ablation` where there are several.
            quantity: `top1`, `nll`, `feature_cosine` or `feature_distance` alone; without labels the last two.
            ablation: Of this ablation alone.

        Raises:
            UsageError: The run has no `curves.csv`, no such ablation, or `ax` has no room for all panels.
        """
        table = self._table("curves.csv")
        kinds = _narrowed("ablation", ablation, list(dict.fromkeys(table["ablation"].tolist())))
        every = [name for name in AXES if name in table]
        quantities = axes_of(self._files) if quantity is None else _narrowed("quantity", quantity, every)
        wanted = [name for name, left in (("quantity=", quantities), ("ablation=", kinds)) if len(left) > 1]
        _refuse_panels(ax, len(kinds) * len(quantities), " and ".join(wanted))
        with _shown():
            return _drawn(orders_figure(self._files, table, kinds, quantities, _checked(ax)), ax)

    def importance(self, ax: Axes | None = None, *, ablation: str | None = None) -> Drawn:
        """Draw how well each score predicts the NLL rise without a head, a panel for each ablation.

        Args:
            ax: Axes to draw into, with `ablation` where there are several.
            ablation: Of this ablation alone.

        Raises:
            UsageError: The run has no `importance.csv`, no such ablation, or `ax` has no room for all panels.
        """
        table = column_rows(self._table("importance.csv"))
        main = main_quantity({row["target"] for row in table})
        rows = [row for row in table if row["target"] == main]
        kinds = _narrowed("ablation", ablation, list(dict.fromkeys(str(row["ablation"]) for row in rows)))
        _refuse_panels(ax, len(kinds), "ablation=")
        with _shown():
            chosen = [row for row in rows if row["ablation"] in kinds]
            return _drawn(correlations(self._files, chosen, _checked(ax)), ax)

    # -- what is drawn --

    @property
    def _ablations(self) -> list[str]:
        return list(dict.fromkeys(str(row["ablation"]) for row in self._files.masks[1:]))

    def _rows(self, ablation: str | None) -> list[Row]:
        """Return the rows of one ablation, of all draws."""
        if len(self._files.masks) < 2:
            raise UsageError(f"the run scored the baseline alone, so there is no drop, got {str(self._files.path)!r}")
        kind = _choice("ablation", ablation, self._ablations)
        return [row for row in self._files.masks[1:] if row["ablation"] == kind]

    def _table(self, name: str) -> Columns:
        table = self._files.table(name)
        if table is None:
            raise self._missing(name)
        return table

    def _missing(self, name: str) -> UsageError:
        return not_there(name, str(self._files.path))

    def _map_of_column(self, column: str, others: Sequence[str], ax: Axes | None) -> Drawn:
        """Draw a column of `scores.csv` or of the baseline's rows of `heads.csv`."""
        scores = self._files.table("scores.csv") or {}
        heads = self._files.described("heads").get("baseline", {})
        columns = [name for name in [*scores, *heads] if name not in NO_COLUMNS and not name.endswith("_se")]
        _choice("column", column, [*others, *columns])
        table = scores if column in scores else heads
        of_calibration = ", those that calibrate" if table is scores else ""
        title = f"{column}\n{about_model(self._files)}, {counted(int(table['images'][0]), 'image')}{of_calibration}"
        label = f"{column} ({unit_of(column)})" if unit_of(column) else column
        with _shown():
            return _drawn(head_heat_map(self._grid(table, column), title, label, given=ax, diverging=False), ax)

    def _grid(self, table: Columns, column: str) -> FloatArray:
        """Return a column of a table of heads as `[layers, most heads]`, NaN where a layer has no such head."""
        heads_per_layer = self._files.record["model"]["heads_per_layer"]
        grid = np.full((len(heads_per_layer), max(heads_per_layer)), np.nan)
        grid[table["layer"].astype(np.int64), table["head"].astype(np.int64)] = table[column]
        return grid


# -- what is wanted, and where --


@contextmanager
def _shown() -> Iterator[None]:
    """Make figures by pyplot meanwhile."""
    import matplotlib.pyplot as plt

    before = FIGURES.set(plt.figure)
    try:
        yield
    finally:
        FIGURES.reset(before)


def _drawn(figure: Figure, ax: Axes | None) -> Drawn:
    """Return a figure and its axes without colour bars and places that stayed empty."""
    if ax is not None:
        return figure_of(ax), ax
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.axison]
    return figure, panels[0] if len(panels) == 1 else np.array(panels, dtype=object)


def _checked(ax: Axes | None) -> Axes | None:
    if ax is not None and not isinstance(ax, Axes):
        raise UsageError(f"ax must be one of matplotlib's Axes, such as plt.subplots()[1], got {type(ax).__name__}")
    return ax


def _refuse_panels(ax: Axes | None, panels: int, wanted: str) -> None:
    """Refuse one axes for several panels."""
    if _checked(ax) is not None and panels > 1:
        raise UsageError(f"this figure has {panels} panels: choose one by {wanted}, or leave ax out, got one axes")


def _choice(name: str, given: object, choices: Sequence[T]) -> T:
    """Return the choice that was given, or the first one."""
    if given is None and choices:
        return choices[0]
    for choice in choices:
        if choice == given:
            return choice
    raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, got {given!r}")


def _narrowed(name: str, given: object, choices: Sequence[T]) -> list[T]:
    """Return all choices, or the one that was given."""
    return list(choices) if given is None else [_choice(name, given, choices)]


def _layers(of_rows: Any, given: int | None) -> list[int]:
    return _narrowed("layer", given, np.unique(of_rows).tolist())


def _where(table: Columns, rows: Any) -> Columns:
    return {name: values[rows] for name, values in table.items()}
