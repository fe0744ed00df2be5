"""What the callbacks that describe every head have in common; `ResultsWriter` writes what they found."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from headprobe.describe.base import HeadStatistic
from headprobe.errors import UsageError
from headprobe.module import HeadProbe
from headprobe.run.results import Row
from headprobe.units.tree import Arrays

Columns = dict[str, NDArray[np.generic]]
"""Columns of `heads.csv`, one entry per head in the order of (layer, head)."""


class HeadCallback(lightning.Callback):
    """Collects one kind of statistic while a test runs; without such a callback nothing is captured.

    Args:
        statistic: What is collected.
    """

    def __init__(self, statistic: HeadStatistic) -> None:
        self.statistic = statistic

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Let the model know who listens.

        Raises:
            UsageError: The same callback is there twice.
        """
        if stage != "test" or not isinstance(pl_module, HeadProbe):
            return
        mine = head_callbacks(trainer)
        if sum(type(other) is type(self) for other in mine) > 1:
            raise UsageError(f"trainer.callbacks may hold one {type(self).__name__}, got two")
        # all of this trainer's, and none that a broken run has left behind
        pl_module.statistics = tuple(callback.statistic for callback in mine)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        if isinstance(pl_module, HeadProbe):
            pl_module.statistics = tuple(one for one in pl_module.statistics if one is not self.statistic)

    # What was found, asked for on process 0 after the test -------------------------------------------------------

    def columns(self) -> dict[str, Columns]:
        """Return columns of `heads.csv` for `baseline` and `masked`, of `heads_change.csv` for `change`."""
        return {}

    def tables(self) -> dict[str, list[Row]]:
        """Return further tables by file name."""
        return {}

    def arrays(self) -> dict[str, Arrays]:
        """Return further arrays by file name."""
        return {}

    def figures(self, about: str) -> dict[str, Figure]:
        """Return figures by name.

        Args:
            about: Model and images, for titles.
        """
        return {}

    def undefined(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Return for every statistic that some layers do not have the reasons, and the layers."""
        return {}

    def summary(self) -> dict[str, ArrayLike]:
        """Return one number per layer for the table on the terminal, by heading."""
        return {}

    def note(self) -> str:
        """Return in a few words what the numbers were taken over; empty for nothing worth a line."""
        return ""


def head_callbacks(trainer: Any) -> list[HeadCallback]:
    """Return those callbacks of a trainer that describe heads."""
    return [callback for callback in trainer.callbacks if isinstance(callback, HeadCallback)]


def by_layer_mean(layer: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over each layer's heads of values `[heads of the model]`, leaving out NaN."""
    finite = np.isfinite(values)
    count = np.bincount(layer, finite, minlength=int(layer.max()) + 1)
    total = np.bincount(layer, np.where(finite, values, 0), minlength=int(layer.max()) + 1)
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0), dtype=np.float64)
