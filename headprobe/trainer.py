"""`ProbeTrainer`: Lightning's trainer with the standard callbacks of a run of headprobe, in one ordered list.

The command line and Python users start their tests here, so both write the same files.
"""

import os
import sys
from typing import Any

import lightning
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from headprobe.callbacks.export import WeightsExport
from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.precision import EXACT, PrecisionCheck
from headprobe.callbacks.progress import progress_for
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.resume import AUTO, Resume
from headprobe.errors import UsageError

OFF = {
    "enable_autolog_hparams": False,  # ResultsWriter logs what differs between runs, with their results
    "enable_model_summary": False,
    "enable_checkpointing": False,  # no checkpoints: they are pickles
}
"""Options that Lightning switches on by itself and that no run of headprobe needs."""


class ProbeTrainer(lightning.Trainer):
    """Runs tests and trainings of headprobe. Takes every option of Lightning's Trainer.

    ```python
    probe = headprobe.HeadProbe("digits_vit")
    probe.choose_masks("each:layer")
    headprobe.ProbeTrainer().test(probe, datamodule=headprobe.ImageNetDataModule())
    ```

    Raises:
        UsageError: The options do not fit together or this machine.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        progress = [] if kwargs.get("enable_progress_bar") is False else [progress_for(sys.stderr)]
        kwargs["callbacks"] = [*progress, *_listed(kwargs.get("callbacks"))]
        kwargs |= {name: off for name, off in OFF.items() if kwargs.get(name) is None}
        self._own_logger = kwargs.get("logger") in (None, True)
        self._tests = 0
        if self._own_logger:
            kwargs["logger"] = _logger(kwargs.get("default_root_dir"))
        try:
            super().__init__(*args, **kwargs)
        # The errors of Lightning for options that do not fit together or this machine.
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            raise UsageError(f"Lightning cannot use these --trainer options: {error}") from error
        _refuse_lonely_nodes(self)

    def test(self, *args: Any, resume: str = AUTO, records: bool = False, **kwargs: Any) -> Any:
        """Score a model with and without chosen attention heads, on the same images, in one pass.

        Args:
            *args: As Lightning's.
            resume: auto: continue with units that the same command has finished before; never: score all again; or the
                directory of a run or of its units, to continue with them.
            records: Also write one row per image and variant (Parquet).
            **kwargs: As Lightning's.

        Raises:
            UsageError: An earlier test of this trainer has written its results where this one would.
        """
        _refuse_limits(self)
        self._begin_directory()
        self._use_callbacks(_before(self, resume, records), after=[ResultsWriter()])
        return super().test(*args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train a model from nothing on a small data set; how the bundled models were made."""
        self._use_callbacks([], after=[WeightsExport()])
        return super().fit(*args, **kwargs)

    def _begin_directory(self) -> None:
        """Give every test after the first a directory of its own: two runs in one would mix their files."""
        self._tests += 1
        if self._tests == 1:
            return
        if not self._own_logger:
            raise UsageError(
                "this trainer has run a test before, and its logger would mix the files of both; make another "
                f"ProbeTrainer for each test, or leave logger out, got {type(self.logger).__name__}"
            )
        self.logger = _logger(self.default_root_dir)

    def _use_callbacks(self, before: list[lightning.Callback], after: list[lightning.Callback]) -> None:
        """Put the standard callbacks around the user's; one of the user's replaces the standard one of its kind."""
        # An earlier `test` or `fit` of this trainer has left its own standard callbacks.
        earlier = {id(callback) for callback in getattr(self, "_standard", ())}
        given = [callback for callback in self.callbacks if id(callback) not in earlier]  # type: ignore[has-type]
        kinds = {type(callback) for callback in given}
        before = [callback for callback in before if type(callback) not in kinds]
        after = [callback for callback in after if type(callback) not in kinds]
        self._standard = [*before, *after]

        bars = [callback for callback in given if isinstance(callback, ProgressBar)]
        others = [callback for callback in given if not isinstance(callback, ProgressBar)]
        self.callbacks = [*before, *bars, *others, *after]


def _logger(root: Any) -> TensorBoardLogger:
    """Return the logger of a run, by which its directory is the next `lightning_logs/version_N` below `root`.

    Named here and not left to Lightning, which falls back to CSV files where TensorBoard is missing.
    """
    return TensorBoardLogger(root or ".", name="lightning_logs", default_hp_metric=False)


def _before(trainer: lightning.Trainer, resume: str, records: bool) -> list[lightning.Callback]:
    """Return the callbacks of a test that stand before the user's, in their order.

    `FailTogether` comes first, to stop before anything else runs on. Records come before `Resume`: a unit is finished
    only with its records.
    """
    callbacks: list[lightning.Callback] = [FailTogether()] if trainer.world_size > 1 else []
    if records:
        callbacks.append(RecordsWriter())
    callbacks.append(Resume(resume))
    if trainer.precision not in EXACT:
        callbacks.append(PrecisionCheck())
    return callbacks


def _listed(callbacks: Any) -> list[lightning.Callback]:
    """Return callbacks as a list; Lightning takes None, one or several."""
    if callbacks is None:
        return []
    return [callbacks] if isinstance(callbacks, lightning.Callback) else list(callbacks)


def _refuse_lonely_nodes(trainer: lightning.Trainer) -> None:
    """Refuse machines with unknown addresses: Lightning would wait for them forever and print nothing."""
    launched = getattr(trainer.strategy, "cluster_environment", None)
    unknown = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if trainer.num_nodes > 1 and isinstance(launched, LightningEnvironment) and unknown:
        raise UsageError(
            f"--trainer.num_nodes needs the addresses of the other machines: start it with srun or torchrun, or set "
            f"{', '.join(unknown)} on each of them (docs/imagenet.md), got {trainer.num_nodes} nodes"
        )


def _refuse_limits(trainer: lightning.Trainer) -> None:
    """Refuse Lightning's ways to end a test early: they count batches per process and would break units."""
    if trainer.limit_test_batches != 1.0:
        raise UsageError(
            "--trainer.limit_test_batches and --trainer.fast_dev_run would score parts of units; use --data.max_images "
            f"instead, got {trainer.limit_test_batches}"
        )
