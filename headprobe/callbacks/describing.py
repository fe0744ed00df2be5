"""The callbacks that describe every head while a test runs, and the files that they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from numpy.typing import ArrayLike

from headprobe.callbacks.identity import statistics_of
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic, Role, Undefined
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.errors import UsageError
from headprobe.metrics.similarity.measures import MEASURES, VARIANCE
from headprobe.module import HeadProbe, data_of
from headprobe.report.table import console, layers_table
from headprobe.run.results import column_rows, head_rows, write_arrays, write_rows
from headprobe.units.tree import Arrays


class HeadCallback(lightning.Callback):
    """Describes heads by one statistic while a test runs; without such a callback no layer is tapped.

    Args:
        statistic: The statistic.
    """

    def __init__(self, statistic: HeadStatistic) -> None:
        self.statistic = statistic

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the model its statistics, before it begins its units.

        Raises:
            UsageError: The same callback is there twice.
        """
        if stage != "test" or not isinstance(pl_module, HeadProbe):
            return
        callbacks: list[lightning.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(type(other) is type(self) for other in callbacks) > 1:
            raise UsageError(f"trainer.callbacks may hold one {type(self).__name__}, got two")
        # The statistics of all callbacks of this trainer, and none that a broken run has left behind.
        pl_module.statistics = tuple(statistics_of(trainer))

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take the statistic away from the model."""
        if isinstance(pl_module, HeadProbe):
            pl_module.statistics = tuple(one for one in pl_module.statistics if one is not self.statistic)


class HeadAttention(HeadCallback):
    """Describes what every head attends to: distance, entropy, sinks and more; see docs/describe_heads.md.

    Args:
        offset_maps: Also write each head's mean attention by offset of key from query, as `offset_maps.npz`.
        examples: Also write so many images with every head's attention, as `examples.npz`; 0 for none.
    """

    def __init__(self, offset_maps: bool = True, examples: int = 4) -> None:
        super().__init__(AttentionSums(offset_maps, examples))

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Also take the names of classes, for the examples."""
        super().setup(trainer, pl_module, stage)
        if stage == "test" and isinstance(pl_module, HeadProbe) and isinstance(self.statistic, AttentionSums):
            data = getattr(data_of(trainer), "class_names", None)
            self.statistic.class_names = tuple(data or pl_module.class_names or ())


class HeadSimilarity(HeadCallback):
    """Writes `similarity.npz`: how similar heads are, with floors and intervals; see docs/describe_heads.md.

    Args:
        scope: Heads that are compared: `within` each layer, `all` of the model, or heads of `pairs` of layers.
        sampling: What a sample is: any of the `tokens`, `patches` (tokens with a place on the image), the `class`
            token, or the `mean` over an image's tokens.
        pairs: Pairs of layers, for the scope `pairs`.
        variance: Share of the sum of squares that SVCCA keeps.
        measures: Which to compute; all of them if not given.
        groups: Groups of images for the intervals, 2 to 16, or 0 for none; 16 within layers if not given.
        noise_floor: Also compare heads on different images: what unrelated images score.
        precision: Number format of the products behind the float64 sums, where samples are tokens or patches:
            `float64`, or `float32` for devices where float64 is slow.
    """

    def __init__(
        self,
        scope: str = "within",
        sampling: str = "tokens",
        pairs: list[tuple[int, int]] | None = None,
        variance: float = VARIANCE,
        measures: list[str] | None = None,
        groups: int | None = None,
        noise_floor: bool = True,
        precision: str = "float64",
    ) -> None:
        # Plain texts, which the statistic checks. With Literal types jsonargparse would answer a wrong choice with the
        # options of all callbacks.
        chosen = tuple(MEASURES if measures is None else measures)
        options: Any = (scope, sampling, pairs or (), variance, chosen, groups, noise_floor, precision)
        super().__init__(SimilaritySums(*options))


class HeadSpectrum(HeadCallback):
    """Writes `spectrum.csv`: log amplitudes of every head's output and of the residual stream, by frequency."""

    def __init__(self) -> None:
        super().__init__(SpectrumSums())


DESCRIBING: tuple[type[HeadCallback], ...] = (HeadAttention, HeadSimilarity, HeadSpectrum)
"""Every kind of description, which a config file names by its class alone."""


# -- files and table, on the first process after the test --------------------------------------------------------------


def write_descriptions(statistics: Sequence[HeadStatistic], directory: Path, images: int) -> None:
    """Write `heads.csv`, `heads_change.csv` and the further files of these statistics.

    Args:
        statistics: All of the same test.
        directory: The run's directory.
        images: Images that were read.
    """
    subject = statistics[0].subject
    heads = subject.layout.heads_per_layer
    found = _columns(statistics)
    for role, columns in found.items():
        found[role] = {"images": np.full(sum(heads), images), **columns}

    models: dict[str, Arrays] = {}  # by the mask's name
    for role in subject.models:
        if role in found:
            models[subject.mask_of(role)] = found[role]
    if models:
        write_rows(directory / "heads.csv", head_rows(heads, models))
    if Role.CHANGE in found:
        change = {subject.mask_of(Role.CHANGE): found[Role.CHANGE]}
        write_rows(directory / "heads_change.csv", head_rows(heads, change))

    for statistic in statistics:
        # A statistic that no layer of the model has leaves no file; run.json says why.
        for name, table in statistic.csv_files().items():
            rows = column_rows(table)
            if rows:
                write_rows(directory / name, rows)
        for name, arrays in statistic.npz_files().items():
            if arrays:
                write_arrays(directory / name, arrays)


def _columns(statistics: Sequence[HeadStatistic]) -> dict[str, Arrays]:
    """Return the columns of all statistics, by role."""
    found: dict[str, Arrays] = {}
    for statistic in statistics:
        for role, columns in statistic.columns().items():
            found.setdefault(role, {}).update(columns)
    return found


def undefined(statistics: Sequence[HeadStatistic]) -> Undefined:
    """Return why some layers do not have a statistic: by statistic and reason, the layers. For `run.json`."""
    found: Undefined = {}
    for statistic in statistics:
        found |= statistic.undefined()
    return found


def print_summary(statistics: Sequence[HeadStatistic]) -> None:
    """Print one line per layer, then the notes of the statistics: which samples and layers the numbers are of."""
    found: dict[str, ArrayLike] = {}
    for statistic in statistics:
        found |= statistic.summary()
    if found:
        console.print()
        console.print(layers_table(statistics[0].subject.layout.heads_per_layer, found))
    for statistic in statistics:
        note = statistic.note()
        if note:
            console.print(note)
