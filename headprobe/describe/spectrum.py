"""Which image frequencies every head carries."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from headprobe.backbone.capture.layer_facts import CONTRIBUTION, LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import (
    HeadStatistic,
    Observation,
    Role,
    Undefined,
    by_layer_mean,
    by_reason,
    differences,
)
from headprobe.metrics.spectrum.spectra import (
    WITHOUT_SPECTRUM,
    Spectra,
    SpectrumTable,
    head_profiles,
)
from headprobe.units.tree import Arrays, NamedSums

TOO_SMALL = "the diagonal of a grid with no more than two rows or columns carries frequency 0 alone"

HIGHEST = {"head": "high_frequency", "contribution": "contribution_high_frequency"}
"""Series with a column of `heads.csv` for their highest frequency."""


class SpectrumSums(HeadStatistic):
    """Delta log amplitudes of heads and residual stream (see `headprobe.metrics.spectrum.spectra`)."""

    def options(self) -> dict[str, Any]:
        """Return the name; there are no options."""
        return {"name": "spectrum"}

    def empty_sums(self) -> NamedSums:
        """Make empty sums for each model and, where there are two, for their differences image by image."""
        grids = [fact.outputs for fact in self.subject.facts]
        return {role: Spectra(grids, self.subject.layout.heads_per_layer) for role in self.subject.roles}

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Transform the layer's maps."""
        fact = self.subject.facts[observation.layer]
        found = observation.each(lambda record: describe_spectrum(record, fact))
        for model, profiles in zip(self.subject.models, found, strict=True):
            sums[model].update(observation.layer, profiles)
        if len(found) > 1:
            baseline, masked = found
            sums[Role.CHANGE].update(observation.layer, differences(masked, baseline, self.subject.device))

    def tables(self) -> dict[str, SpectrumTable]:
        """Return the profiles.

        Where one of two models has no spectrum, as the masked one of a masked head, there is no change: NaN.
        """
        found: dict[str, SpectrumTable] = {}
        for role in self.subject.roles:
            metric = self.whole[role]
            # Not compute(): it would wait for other processes, and these sums are of all processes already.
            found[role] = metric.table(metric.to_arrays())
        if Role.CHANGE in found:
            baseline, masked, change = found.values()
            silent = np.isnan(baseline.log_amplitude) | np.isnan(masked.log_amplitude)
            found[Role.CHANGE] = change._replace(
                log_amplitude=np.where(silent, np.nan, change.log_amplitude),
                delta_log_amplitude=np.where(silent, np.nan, change.delta_log_amplitude),
                error=np.where(silent, np.nan, change.error),
            )
        return found

    def columns(self) -> dict[str, Arrays]:
        """Return the delta log amplitude at the highest frequency of the diagonal, of output and contribution."""
        return {role: self._highest(table) for role, table in self.tables().items()}

    def _highest(self, table: SpectrumTable) -> Arrays:
        """Return one entry per head, NaN where a layer has no spectrum."""
        first = np.cumsum([0, *self.subject.layout.heads_per_layer])  # of each layer, its first head's number
        columns: Arrays = {}
        for series, name in HIGHEST.items():
            chosen = (table.series == series) & (table.profile == "diagonal")
            # Bins ascend within a head, so a head's last bin stands before one that is no higher, or at the end.
            last = chosen & np.append(table.frequency[1:] <= table.frequency[:-1], True)
            last &= table.frequency > 0  # a grid of one or two rows carries no other frequency on its diagonal
            heads = first[table.layer[last]] + table.head[last]
            for column, values in ((name, table.delta_log_amplitude), (f"{name}_se", table.error)):
                columns[column] = np.full(first[-1], np.nan)
                columns[column][heads] = values[last]
        return columns

    def csv_files(self) -> dict[str, Arrays]:
        """Return `spectrum.csv` and, with a mask, `spectrum_change.csv`."""
        found = self.tables()
        files = {"spectrum.csv": self._file({model: found[model] for model in self.subject.models})}
        if Role.CHANGE in found:
            files["spectrum_change.csv"] = self._file({Role.CHANGE: found[Role.CHANGE]})
        return files

    def _file(self, tables: dict[str, SpectrumTable]) -> Arrays:
        """Return the columns of a file that holds these tables one after the other."""
        masks = [np.full(len(table.layer), self.subject.mask_of(role)) for role, table in tables.items()]
        columns: Arrays = {"mask": np.concatenate(masks)}
        for field in SpectrumTable._fields:
            name = "delta_se" if field == "error" else field
            columns[name] = np.concatenate([getattr(table, field) for table in tables.values()])
        return columns

    def undefined(self) -> Undefined:
        """Return the layers without a spectrum, or without the spectrum of contributions."""
        layers = []
        for fact in self.subject.facts:
            reasons = {}
            if not fact.outputs.on_map:
                reasons = dict.fromkeys(HIGHEST.values(), WITHOUT_SPECTRUM)
            elif min(fact.outputs.grid or (0, 0)) <= 2:
                reasons = dict.fromkeys(HIGHEST.values(), TOO_SMALL)
            elif CONTRIBUTION in fact.undefined:
                reasons = {HIGHEST["contribution"]: fact.undefined[CONTRIBUTION]}
            layers.append(reasons)
        return by_reason(layers)

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean of the highest frequency's delta."""
        heads = self.subject.layout.heads_per_layer
        highest = np.asarray(self._highest(self.tables()[Role.BASELINE])["high_frequency"], dtype=np.float64)
        return {"high freq.": by_layer_mean(np.repeat(np.arange(len(heads)), heads), highest)}


def describe_spectrum(record: LayerRecord, facts: LayerFacts) -> dict[str, Tensor]:
    """Return a layer's frequency profiles by series, for `Spectra.update`; empty where its patches have no grid."""
    grid = facts.outputs
    if not grid.on_map:
        return {}

    weight = None  # [heads, dim, head dim], where what a head adds to the stream is defined
    if facts.projection is not None and CONTRIBUTION not in facts.undefined:
        weight = facts.projection.weight.to(record.projected.device)

    around = {"stream_before": record.stream_before, "stream_after": record.stream_after}
    streams = {name: stream for name, stream in around.items() if stream is not None}
    # One Fourier transform for output and contribution: the projection acts on channels, the transform on places.
    shared = weight if record.projected is record.heads_out else None
    names = ["head", *streams, *(["contribution"] if shared is not None else [])]
    profiles = dict(zip(names, head_profiles(record.heads_out, grid, shared, list(streams.values())), strict=True))
    if weight is not None and shared is None:
        profiles["contribution"] = head_profiles(record.projected, grid, weight)[-1]
    return profiles
