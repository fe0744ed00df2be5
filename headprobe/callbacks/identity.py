"""What a run is, as plain data: all that changes its numbers, from which its key follows."""

import sys
from typing import Any

import lightning

from headprobe.callbacks.heads import head_callbacks
from headprobe.module import HeadProbe
from headprobe.run.record import versions
from headprobe.run.redact import safe_command


def identify(trainer: lightning.Trainer, probe: HeadProbe, records: bool) -> dict[str, Any]:
    """Return all that changes the numbers of a test, known before its first image.

    The row plan follows from the masks, the batch size and the row budget that was asked for.

    Args:
        trainer: Runs the test.
        probe: The model with its masks.
        records: Whether a row per image is kept beside the sums.
    """
    statistics = [callback.statistic.describe() for callback in head_callbacks(trainer)]
    device = trainer.strategy.root_device
    return {
        "model": probe.describe(),
        "data": trainer.datamodule.describe(),  # type: ignore[attr-defined]  # set by Lightning where there is one
        # a list: the sums have the masks' order
        "masks": [[named.name, named.mask.digest] for named in probe.masks],
        "ablation": probe.ablation,
        "statistics": ["paired_accuracy", *["per_class"] * probe.per_class, *["records"] * records, *statistics],
        "precision": str(trainer.precision),
        "device": device.type,
        "batch_size": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        "row_budget": probe.budget_on(device),
        "versions": versions(),
    }


def without_places(numbers: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the weights lie: their digest says what they are."""
    return {**numbers, "model": {name: value for name, value in numbers["model"].items() if name != "weights"}}


def command_line() -> str:
    """Return the command that this process was started with, without anything secret."""
    return safe_command(["headprobe", *sys.argv[1:]])
