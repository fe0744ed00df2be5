"""Which image frequencies every head carries."""

from typing import Any

import numpy as np

from headprobe.backbone.describe import describe_spectrum
from headprobe.metrics.spectrum import Spectra, SpectrumTable
from headprobe.statistics.base import BASELINE, CHANGE, MASKED, HeadStatistic, Part, Seen, differences


class SpectrumSums(HeadStatistic):
    """Delta log amplitudes of heads and residual stream (see `headprobe.metrics.spectrum`)."""

    def describe(self) -> dict[str, Any]:
        """Return the name; there are no options."""
        return {"name": "spectrum"}

    def make_part(self) -> Part:
        """Make empty sums for each model and, where there are two, for their differences image by image."""
        grids = [fact.outputs for fact in self.subject.facts]
        names = self.subject.models + ((CHANGE,) if self.subject.mask is not None else ())
        return {name: Spectra(grids, self.subject.layout.heads_per_layer) for name in names}

    def observe(self, seen: Seen) -> None:
        """Transform the layer's maps."""
        part, fact = self.part(seen.unit), self.subject.facts[seen.layer]
        found = seen.each(lambda record: describe_spectrum(record, fact))
        for name, profiles in zip(self.subject.models, found, strict=True):
            part[name].update(seen.layer, profiles)
        if len(found) > 1:
            baseline, masked = found
            part[CHANGE].update(seen.layer, differences(masked, baseline, self.subject.device))

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
