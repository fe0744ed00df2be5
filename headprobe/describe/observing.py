"""Hands what taps hear to the statistics: a layer's baseline record together with the masked model's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.describe.base import HeadStatistic, Seen, Subject


class Listening:
    """Connects statistics to the forward passes of a model.

    Args:
        statistics: Who listens.
        subject: The model.
        growing: Runs it.
        mask: Number of the mask whose model is described too, None for the baseline alone.
    """

    def __init__(
        self, statistics: Sequence[HeadStatistic], subject: Subject, growing: GrowingPass, mask: int | None
    ) -> None:
        self.statistics, self.subject, self.growing, self.mask = tuple(statistics), subject, growing, mask
        self.heard = False  #: whether the statistics were given layers of the pass under way
        self._unit = 0
        self._rows = torch.empty(0, dtype=torch.int64)
        self._baseline: LayerRecord | None = None
        self.begin()

    def begin(self) -> None:
        """Let all statistics forget what they have heard."""
        self.heard = False
        for statistic in self.statistics:
            statistic.begin(self.subject)

    def taps(self, unit: int, rows: Tensor) -> tuple[Tap, ...]:
        """Return the taps of the next forward pass, over images in these rows of a unit."""
        self._unit, self._rows, self.heard = unit, rows, False
        baseline = Tap(self._hear_baseline, self.growing.rows_of())
        if self.mask is None:
            return (baseline,)
        return (baseline, Tap(self._hear_masked, self.growing.rows_of(self.mask)))

    def _hear_baseline(self, record: LayerRecord) -> None:
        if self.mask is None:
            self._tell((record,))
        else:
            self._baseline = record  # the masked model's record of this layer is next

    def _hear_masked(self, record: LayerRecord) -> None:
        baseline, self._baseline = self._baseline, None
        if baseline is not None and self.mask is not None:
            self._tell((baseline, record if self.growing.joined(self.mask) else baseline))

    def _tell(self, records: tuple[LayerRecord, ...]) -> None:
        self.heard = True
        seen = Seen(self._unit, self._rows, records)
        for statistic in self.statistics:
            statistic.observe(seen)
