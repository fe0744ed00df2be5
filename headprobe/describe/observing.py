"""Brings the taps of a forward pass to the statistics: a layer's baseline record together with the masked model's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.describe.base import HeadStatistic, Observation
from headprobe.units.tree import NamedSums

SumsOfStatistics = Mapping[str, NamedSums]
"""The sums of an open unit, by the statistic's name."""


class Observing:
    """Connects statistics to the forward passes of a model.

    Args:
        statistics: What observes.
        growing: Runs the model.
        variant: Number of the variant that is described beside the baseline, None for the baseline alone.
    """

    def __init__(self, statistics: Sequence[HeadStatistic], growing: GrowingPass, variant: int | None) -> None:
        self.statistics, self.growing, self.variant = tuple(statistics), growing, variant
        self.began = False  #: whether the statistics have observed layers of the pass under way
        self._sums: SumsOfStatistics = {}
        self._unit = 0
        self._rows = torch.empty(0, dtype=torch.int64)
        self._baseline: LayerRecord | None = None

    def taps(self, sums: SumsOfStatistics, unit: int, rows: Tensor) -> tuple[Tap, ...]:
        """Return the taps of the next forward pass.

        Args:
            sums: The sums of the unit, to which the statistics add.
            unit: The unit that the images belong to.
            rows: `[images]`, their rows inside the unit.
        """
        self._sums, self._unit, self._rows, self.began = sums, unit, rows, False
        baseline = Tap(self._take_baseline, self.growing.rows_of())
        if self.variant is None:
            return (baseline,)
        return (baseline, Tap(self._take_masked, self.growing.rows_of(self.variant)))

    def rehearsal(self, images: int) -> tuple[Tap, ...]:
        """Return the taps of a pass over images that do not count: its sums are thrown away."""
        sums = {statistic.name: statistic.open(0) for statistic in self.statistics}
        return self.taps(sums, 0, torch.arange(images))

    def end_rehearsal(self) -> None:
        """Forget the pass that did not count."""
        self._sums, self.began = {}, False

    def _take_baseline(self, record: LayerRecord) -> None:
        if self.variant is None:
            self._observe((record,))
        else:
            self._baseline = record  # the masked model's record of this layer comes next

    def _take_masked(self, record: LayerRecord) -> None:
        baseline, self._baseline = self._baseline, None
        if baseline is not None and self.variant is not None:
            # Before the mask's first layer the masked model has no rows of its own: it is the baseline.
            self._observe((baseline, record if self.growing.parted(self.variant) else baseline))

    def _observe(self, records: tuple[LayerRecord, ...]) -> None:
        self.began = True
        observation = Observation(self._unit, self._rows, records)
        for statistic in self.statistics:
            statistic.observe(observation, self._sums[statistic.name])
