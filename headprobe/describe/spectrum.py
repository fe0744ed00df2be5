"""Which image frequencies every head carries."""

from typing import Any

import numpy as np
from torch import Tensor

from headprobe.backbone.capture.layer_facts import CONTRIBUTION, LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import BASELINE, CHANGE, MASKED, HeadStatistic, Observation, differences
from headprobe.metrics.spectrum.spectra import Spectra, SpectrumTable, head_profiles, stream_profiles
from headprobe.units.tree import NamedSums


class SpectrumSums(HeadStatistic):
    """Delta log amplitudes of heads and residual stream (see `headprobe.metrics.spectrum.spectra`)."""

    def options(self) -> dict[str, Any]:
        """Return the name; there are no options."""
        return {"name": "spectrum"}

    def empty_sums(self) -> NamedSums:
        """Make empty sums for each model and, where there are two, for their differences image by image."""
        grids = [fact.outputs for fact in self.subject.facts]
        names = self.subject.models + ((CHANGE,) if self.subject.mask is not None else ())
        return {name: Spectra(grids, self.subject.layout.heads_per_layer) for name in names}

    def observe(self, seen: Observation, sums: NamedSums) -> None:
        """Transform the layer's maps."""
        fact = self.subject.facts[seen.layer]
        found = seen.each(lambda record: describe_spectrum(record, fact))
        for name, profiles in zip(self.subject.models, found, strict=True):
            sums[name].update(seen.layer, profiles)
        if len(found) > 1:
            baseline, masked = found
            sums[CHANGE].update(seen.layer, differences(masked, baseline, self.subject.device))

    def tables(self) -> dict[str, SpectrumTable]:
        """Return the profiles of `baseline` and, with a mask, of `masked` and their `change`.

        Where one of two models has no spectrum, that of a masked head, there is no change: NaN.
        """
        whole = self.whole
        tables: dict[str, SpectrumTable] = {
            # not compute(), which would ask the other processes again
            name: whole[name].table(whole[name].to_arrays())
            for name in (BASELINE, MASKED, CHANGE)
            if name in whole
        }
        if CHANGE in tables:
            silent = np.isnan(tables[BASELINE].log_amplitude) | np.isnan(tables[MASKED].log_amplitude)
            table = tables[CHANGE]
            tables[CHANGE] = table._replace(
                **{
                    name: np.where(silent, np.nan, getattr(table, name))
                    for name in ("log_amplitude", "delta_log_amplitude", "error")
                }
            )
        return tables


def describe_spectrum(record: LayerRecord, facts: LayerFacts) -> dict[str, Tensor]:
    """Return a layer's frequency profiles by series, for `Spectra.update`; empty where its patches have no grid."""
    grid = facts.outputs
    if not grid.on_map:
        return {}
    profiles: dict[str, Tensor] = {}
    weight = None
    if facts.projection is not None and CONTRIBUTION not in facts.undefined:
        weight = facts.projection.weight.to(record.projected.device)
    if weight is not None and record.projected is record.heads_out:  # transformed once for both
        profiles["head"], profiles["contribution"] = head_profiles(record.heads_out, grid, (None, weight))
    else:
        profiles["head"] = head_profiles(record.heads_out, grid)[0]
        if weight is not None:
            profiles["contribution"] = head_profiles(record.projected, grid, (weight,))[0]
    if record.stream_before is not None:
        profiles["stream_before"] = stream_profiles(record.stream_before, grid)
    if record.stream_after is not None:
        profiles["stream_after"] = stream_profiles(record.stream_after, grid)
    return profiles
