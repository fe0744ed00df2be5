"""`ProbeTrainer`: Lightning's trainer with the standard callbacks of a run of headprobe, in one ordered list.

The command line and Python users start their tests here, so both write the same files.
"""

import copy
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from headprobe.calibration.optimal import warning_of
from headprobe.callbacks.export import WeightsExport
from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.identity import text_of_call
from headprobe.callbacks.precision import EXACT, PrecisionCheck
from headprobe.callbacks.progress import progress_for
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.resume import AUTO, NEVER, Resume
from headprobe.errors import HeadprobeWarning, UsageError
from headprobe.files import make_folders, next_version, shown
from headprobe.module import HeadProbe
from headprobe.probe.calibrating import FittingClassifier
from headprobe.probe.rounds import fitting_of
from headprobe.probe.stages import Stage
from headprobe.processes import from_launcher, refuse_lonely_nodes, refuse_other_processes

OFF = {
    "enable_autolog_hparams": False,  # ResultsWriter logs what differs between runs, with their results
    "enable_model_summary": False,
    "enable_checkpointing": False,  # no checkpoints: they are pickles
}
"""Options that Lightning switches on by itself and that no run of headprobe needs."""

NOISE = (
    r".*LeafSpec.* is deprecated",  # Lightning 2.6 itself calls what torch 2.9 and later rename; it still works
    ".*does not have many workers.*",  # the number is filled in from the cores and the units, unless the user chose it
    "Experiment logs directory .* exists and is not empty",  # this run has just made it, for all of its loggers
)
"""Warnings of Lightning's that a user can do nothing about."""

PROFILERS: dict[Any, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
"""Profilers of Lightning's that write to its log, which `test` and `fit` keep quiet, unless they have a file."""


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
        kwargs |= from_launcher(kwargs)
        if kwargs.get("default_root_dir") is not None:
            kwargs["default_root_dir"] = _local(kwargs["default_root_dir"])
        callbacks = _listed(kwargs.get("callbacks"))
        silent = kwargs.get("enable_progress_bar") is False or kwargs.get("barebones")
        if not silent and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks = [progress_for(sys.stderr), *callbacks]
        kwargs["callbacks"] = callbacks
        kwargs |= {name: off for name, off in OFF.items() if kwargs.get(name) is None}
        if kwargs.get("logger") in (None, True):
            kwargs["logger"] = not kwargs.get("barebones") and _logger(kwargs.get("default_root_dir"))
        if kwargs.get("profiler") in PROFILERS:
            kwargs["profiler"] = PROFILERS[kwargs["profiler"]](filename="profile")
        try:
            super().__init__(*args, **kwargs)
        # The errors of Lightning for options that do not fit together or this machine.
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            raise UsageError(f"Lightning cannot use these --trainer options: {error}") from error
        refuse_lonely_nodes(self)
        refuse_other_processes(self)
        self.command = ""  #: what started the run: the words of the command line, or the text of the call
        self._runs = 0
        self._folder: Path | None = None  # known to the first process; the others get it from there
        self._unused_loggers = [_copied(logger) for logger in self.loggers]

    @property
    def log_dir(self) -> str | None:
        """The run's folder, whatever the logger. As Lightning's, it must be read on every process."""
        if not self._runs:
            return super().log_dir
        folder: str = self.strategy.broadcast(str(self._folder))
        return folder

    @property
    def folder(self) -> Path | None:
        """The folder of the last run, on the first process, which made it; None on the others."""
        return self._folder

    def test(self, *args: Any, resume: str = AUTO, records: bool = False, **kwargs: Any) -> Any:
        """Score a model with and without chosen attention heads, on the same images, in one pass.

        The files go to `lightning_logs/version_N` below `default_root_dir`, a folder that no other run has.

        Args:
            *args: As Lightning's.
            resume: auto: continue with units that the same command has finished before; never: score all again; or the
                directory of a run or of its units, to continue with them.
            records: Also write one row per image and variant (Parquet).
            **kwargs: As Lightning's.

        Raises:
            UsageError: An option would score a part of the images; or a logger names a folder that is there already.
            RunError: The run's folder cannot be made.
        """
        limits = (self.limit_test_batches, self.overfit_batches, self.limit_val_batches)  # type: ignore[attr-defined]
        refuse_limits(self.fast_dev_run, *limits)  # type: ignore[attr-defined]  # options of Lightning's
        _refuse_changed_batches(self)
        frame = inspect.currentframe()
        if not self.command.startswith("headprobe "):
            self.command = text_of_call(frame.f_back if frame else None)
        with self._own_folder():
            self._calibrate(resume, *args, **kwargs)
            self._use_callbacks(_before(self, resume, records), after=[ResultsWriter()])
            return super().test(*args, **kwargs)

    def calibrate(self, probe: HeadProbe, data: Any, resume: str = AUTO) -> None:
        """Fit and score what a model's masks need and judge nothing: `probe.calibration` is there afterwards.

        Args:
            probe: The model with its masks.
            data: The data module.
            resume: auto or never, as in `test`.

        Raises:
            UsageError: As `test` does.
        """
        with self._own_folder():
            self._calibrate(resume, probe, datamodule=data)

    @staticmethod
    def split_data(probe: HeadProbe, data: Any) -> None:
        """Keep images that are judged apart from images that fit, and donors together; before the data are opened."""
        if not probe.labelled:
            data.without_labels()
        if probe.classifier is not None:
            _ = probe.outputs  # a head of another width is refused by it, not by its number of classes
        given = probe.given_calibration
        fitted_on = None if given is None or not probe.fits else given.about["data"]
        data.split_off(probe.fits and given is None, fitted_on)
        data.keep_together(probe.rows_together)

    def _calibrate(self, resume: str, model: Any = None, dataloaders: Any = None, *args: Any, **kwargs: Any) -> None:
        """Fit what the ablations of a test need, on images of their own: Lightning's validate stage."""
        data: Any = kwargs.get("datamodule")
        if not isinstance(model, HeadProbe) or not hasattr(data, "split_off"):
            return
        self.split_data(model, data)
        model.calibration = model.given_calibration
        if model.classifying is not None:
            self._leave_out(model, data, [] if model.takes_classes else model.classifying.unseen)
        if not data.fits:
            model.judge()
            return
        # A run to resume by its name is the judged one: a calibration is found by its own key.
        self._use_callbacks(_before(self, resume if resume == NEVER else AUTO, records=False), after=[])
        if model.classifying is not None and model.takes_classes:
            self._go_over(FittingClassifier(model, model.classifying), model, data)
            self._leave_out(model, data, model.classifying.unseen)
        if model.fitted_kinds or model.score_heads:
            for stage in fitting_of(model):
                self._go_over(stage, model, data)
        model.judge()
        if model.calibration is not None and (warning := warning_of(model.calibration)):
            lightning.pytorch.utilities.rank_zero_warn(warning, category=HeadprobeWarning)

    @staticmethod
    def _leave_out(model: HeadProbe, data: Any, classes: Sequence[int]) -> None:
        """Leave classes out that the classifier has seen no image of."""
        if classes:
            data.bind_to(model)  # a given classifier may come before the data are opened
        data.leave_out(classes)

    def _go_over(self, stage: Stage, model: HeadProbe, data: Any) -> None:
        """Run a stage that fits, over the images that calibrate."""
        model.begin_stage(stage)
        self.validate(model, datamodule=data, verbose=False)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train a model from nothing on a small data set; how the bundled models were made.

        A trial with `fast_dev_run` writes nothing.
        """
        if self.fast_dev_run:  # type: ignore[attr-defined]  # an option of Lightning's
            return super().fit(*args, **kwargs)
        self._use_callbacks([], after=[WeightsExport()])
        with self._own_folder():
            return super().fit(*args, **kwargs)

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Make the run's folder and those of its loggers, before anything is written; no other run has them.

        A run that is refused before it begins leaves none of them behind.
        """
        self._runs += 1
        _refuse_mixing(self.loggers, self._runs)
        made = self._claim() if self.is_global_zero else []
        try:
            with warnings.catch_warnings():
                for message in NOISE:
                    warnings.filterwarnings("ignore", message=message)
                yield
        finally:
            if made and not self.global_step and _remove_unused(made[0]):
                for folder in made[1:]:
                    _remove_unused(folder)

    def _claim(self) -> list[Path]:
        """Return the folders that were made: the run's first, then those that its loggers name.

        Raises:
            UsageError: A logger names a folder that is there already.
        """
        root = shown(Path(self.default_root_dir)) / "lightning_logs"
        in_the_way = None
        for loggers in chain([self.loggers], self._more_loggers()):
            named = {Path(logger.log_dir or ""): logger for logger in loggers if _has_folder(logger)}
            # A logger's folder that is a version of the same lightning_logs is the run's.
            shared = [folder for folder in named if folder.resolve().parent == root.resolve()]
            self._folder = shared[0] if shared else next_version(root)
            wanted = list({folder.resolve(): folder for folder in (self._folder, *named)}.values())
            taken = make_folders(wanted)
            if taken is None:
                self.loggers = loggers
                return wanted
            if taken in named and taken == in_the_way:
                kind = type(named[taken]).__name__
                raise UsageError(
                    f"{kind} would write into a folder that is there already, among the files of another run; give "
                    f"--trainer.logger another version or save_dir, or leave its version out, got {str(taken)!r}"
                )
            in_the_way = taken  # another run was faster, or a logger was used before: its next version may be free
        raise RuntimeError("unreachable: there are always more loggers")

    def _more_loggers(self) -> Iterator[list[Logger]]:
        """Yield the loggers as they were given, again and again: each takes the next version when it is first read."""
        while True:
            yield [_copied(logger) for logger in self._unused_loggers]

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


def _local(root: str | Path) -> str:
    """Return the root of runs with `~` and `$NAME` replaced, as TensorBoard's logger does in its own folder's name."""
    if "://" in str(root):
        raise UsageError(f"--trainer.default_root_dir must be a folder of this machine, got {root}")
    return os.path.expandvars(os.path.expanduser(root))


def _logger(root: Any) -> TensorBoardLogger:
    """Return the logger of a run, by which its directory is the next `lightning_logs/version_N` below `root`.

    Named here and not left to Lightning, which falls back to CSV files where TensorBoard is missing.
    """
    return TensorBoardLogger(root or ".", name="lightning_logs", default_hp_metric=False)


def _has_folder(logger: Logger) -> bool:
    """Return whether a logger writes files of its own into a folder of this machine that it names by itself."""
    return isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in str(logger.save_dir)


def _copied(logger: Logger) -> Logger:
    """Return a copy of a logger of files, which has chosen no version yet; any other logger itself."""
    return copy.copy(logger) if isinstance(logger, (TensorBoardLogger, CSVLogger)) else logger


UNUSED = ("config.yaml", "hparams.yaml")
"""Files that are there before a run begins, beside TensorBoard's."""


def _remove_unused(folder: Path) -> bool:
    """Remove a folder that was made for a run that never began, and return whether it was one: it holds no result."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    if any(file.name not in UNUSED and not file.name.startswith("events.out.tfevents") for file in files):
        return False
    with suppress(OSError):
        for file in files:
            file.unlink()
        folder.rmdir()
    return True


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


def refuse_limits(
    fast_dev_run: Any, limit_test_batches: Any, overfit_batches: Any, limit_val_batches: Any = None
) -> None:
    """Refuse Lightning's ways to end a test or its calibration early: they count batches and would break units.

    Args:
        fast_dev_run: Lightning's option of this name: a number of batches, or true for one.
        limit_test_batches: The same: all batches are 1.0 or None; the whole number 1, equal to it, is a single batch.
        overfit_batches: The same; it limits the batches of a training.
        limit_val_batches: The same; the images that calibrate are Lightning's validation.

    Raises:
        UsageError: One of them is given.
    """
    of_test = "a test scores whole units of the data, each image once; leave it out and use --data.max_images instead"
    of_fitting = (
        "what is fitted before a test takes whole units of the data; leave it out and use --data.calibration_images "
        "instead"
    )
    limits = (
        ("fast_dev_run", fast_dev_run, bool(fast_dev_run), of_test),
        ("overfit_batches", overfit_batches, bool(overfit_batches), of_test),
        ("limit_test_batches", limit_test_batches, not _everything(limit_test_batches), of_test),
        ("limit_val_batches", limit_val_batches, not _everything(limit_val_batches), of_fitting),
    )
    for name, got, limits_something, instead in limits:
        if limits_something:
            raise UsageError(f"--trainer.{name} counts batches of a process, and {instead}, got {got}")


def _everything(limit: Any) -> bool:
    return limit is None or (isinstance(limit, float) and limit == 1)


def _refuse_changed_batches(trainer: lightning.Trainer) -> None:
    """Refuse a callback that tries other batch sizes on a test's first batches: they are part of the run's key."""
    if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UsageError(
            "--trainer.callbacks: BatchSizeFinder would score the first batches again and again; leave it out: what "
            "does not fit into memory is tried again with fewer rows (--model.row_budget), got BatchSizeFinder"
        )


def _refuse_mixing(loggers: Sequence[Logger], runs: int) -> None:
    """Refuse a second run of a trainer whose logger has one place for all: the curves of both would be mixed."""
    for logger in loggers if runs > 1 else ():
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
            raise UsageError(
                "this trainer has run before, and its logger would mix the curves of both runs; make another "
                f"ProbeTrainer for each run, or leave logger out, got {type(logger).__name__}"
            )
