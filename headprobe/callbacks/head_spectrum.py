"""`HeadSpectrum`: which image frequencies every head carries."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from headprobe.backbone.capture.layer_facts import CONTRIBUTION
from headprobe.callbacks.head_callback import Columns, HeadCallback, by_layer_mean
from headprobe.describe.base import BASELINE, CHANGE, MASKED
from headprobe.describe.spectrum import SpectrumSums
from headprobe.metrics.spectrum.spectra import WITHOUT_SPECTRUM, SpectrumTable
from headprobe.report.spectrum_figures import spectra_by_layer, stream_spectra
from headprobe.run.results import Row

TOO_SMALL = "the grid has no more than two rows or columns, whose diagonal carries frequency 0 alone"


class HeadSpectrum(HeadCallback):
    """Writes `spectrum.csv`: log amplitudes of every head's output and of the residual stream, by frequency."""

    statistic: SpectrumSums

    def __init__(self) -> None:
        super().__init__(SpectrumSums())

    def columns(self) -> dict[str, Columns]:
        """Return the delta log amplitude at the highest frequency of the diagonal, of output and contribution."""
        return {model: self._highest(table) for model, table in self.statistic.tables().items()}

    def tables(self) -> dict[str, list[Row]]:
        """Return `spectrum.csv` and, with a mask, `spectrum_change.csv`."""
        found, subject = self.statistic.tables(), self.statistic.subject
        rows = [row for model in subject.models for row in _rows(subject.title(model), found[model])]
        if CHANGE not in found:
            return {"spectrum.csv": rows}
        return {"spectrum.csv": rows, "spectrum_change.csv": list(_rows(subject.title(MASKED), found[CHANGE]))}

    def figures(self, about: str) -> dict[str, Figure]:
        """Return the spectra of heads, of their contributions and of the stream, for each model."""
        figures: dict[str, Figure] = {}
        for model, table in self.statistic.tables().items():
            whose = self.statistic.subject.title(model)
            if not len(table.layer):
                continue
            ylabel = {"ylabel": "change of delta log amplitude"} if model == CHANGE else {}
            for series, what in (("head", "head outputs"), ("contribution", "contributions of heads after W_O")):
                if not np.isfinite(table.delta_log_amplitude[table.series == series]).any():
                    continue
                title = f"Spectra of {what}: {whose}\n{about}"
                figures[f"spectrum/{series}_{model}"] = spectra_by_layer(table._asdict(), title, series, **ylabel)
            if model != CHANGE:
                title = f"Spectra of the residual stream: {whose}\n{about}"
                figures[f"spectrum/stream_{model}"] = stream_spectra(table._asdict(), title)
        return figures

    def undefined(self) -> dict[str, dict[str, list[int]]]:
        """Return the layers without a spectrum, or without that of contributions."""
        found: dict[str, dict[str, list[int]]] = {}
        for layer, fact in enumerate(self.statistic.subject.facts):
            reasons = {"contribution_high_frequency": fact.undefined.get(CONTRIBUTION, "")}
            if not fact.outputs.on_map:
                reasons = dict.fromkeys(("high_frequency", "contribution_high_frequency"), WITHOUT_SPECTRUM)
            elif min(fact.outputs.grid or (0, 0)) <= 2:
                reasons = dict.fromkeys(("high_frequency", "contribution_high_frequency"), TOO_SMALL)
            for name, reason in reasons.items():
                if reason:
                    found.setdefault(name, {}).setdefault(reason, []).append(layer)
        return found

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean of the highest frequency's delta."""
        heads = self.statistic.subject.layout.heads_per_layer
        highest = self._highest(self.statistic.tables()[BASELINE])["high_frequency"]
        return {"high freq.": by_layer_mean(np.repeat(np.arange(len(heads)), heads), highest.astype(np.float64))}

    def _highest(self, table: SpectrumTable) -> Columns:
        """Return one entry per head, NaN where a layer has no spectrum."""
        heads = self.statistic.subject.layout.heads_per_layer
        first = np.cumsum([0, *heads])
        columns: Columns = {}
        for series, name in (("head", "high_frequency"), ("contribution", "contribution_high_frequency")):
            chosen = (table.series == series) & (table.profile == "diagonal")
            last = chosen & np.append(table.frequency[1:] <= table.frequency[:-1], True)  # bins ascend within a head
            last &= table.frequency > 0  # a grid of one or two rows carries no other frequency on its diagonal
            places = first[table.layer[last]] + table.head[last]
            for column, values in ((name, table.delta_log_amplitude), (f"{name}_se", table.error)):
                columns[column] = np.full(first[-1], np.nan)
                columns[column][places] = values[last]
        return columns


def _rows(model: str, table: SpectrumTable) -> Iterator[Row]:
    columns = [column.tolist() for column in table]
    names = [*table._fields[:-1], "delta_se"]
    for cells in zip(*columns, strict=True):
        yield {"model": model, **dict(zip(names, cells, strict=True))}
