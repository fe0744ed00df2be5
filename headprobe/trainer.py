"""`ProbeTrainer`: Lightning's trainer with everything that a test needs to write its results."""

import os
import sys
from typing import Any

import lightning
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.progress import progress_for
from headprobe.errors import UsageError


class ProbeTrainer(lightning.Trainer):
    """Where and how to run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        progress = [] if kwargs.get("enable_progress_bar") is False else [progress_for(sys.stderr)]
        kwargs["callbacks"] = [FailTogether(), *progress, *(kwargs.get("callbacks") or [])]
        if kwargs.get("logger") in (None, True):
            # named here and not left to Lightning, which falls back to CSV files where TensorBoard is missing
            root = kwargs.get("default_root_dir") or "."
            kwargs["logger"] = TensorBoardLogger(root, name="lightning_logs", default_hp_metric=False)
        try:
            super().__init__(*args, **kwargs)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            # what Lightning raises for options that do not fit together or this machine
            raise UsageError(f"Lightning cannot use these --trainer options: {error}") from error
        _refuse_lonely_nodes(self)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Score a model with and without chosen attention heads, on the same images, in one pass."""
        return super().test(*args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train a model from nothing on a small data set; how the bundled models were made."""
        return super().fit(*args, **kwargs)


def _refuse_lonely_nodes(trainer: lightning.Trainer) -> None:
    """Refuse to wait for other machines of which nothing is known: Lightning would, without a word and without end."""
    launched = getattr(trainer.strategy, "cluster_environment", None)
    unknown = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if trainer.num_nodes > 1 and isinstance(launched, LightningEnvironment) and unknown:
        raise UsageError(
            f"--trainer.num_nodes needs to know the other machines: start it with srun or torchrun, or set "
            f"{', '.join(unknown)} on each of them (docs/imagenet.md), got {trainer.num_nodes} nodes"
        )
