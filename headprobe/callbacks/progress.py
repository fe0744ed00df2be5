"""Progress in images: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from headprobe.callbacks.resume import resume_callback
from headprobe.module import AfterBatch, HeadProbe, StepResult
from headprobe.run.decided import decided_in_short
from headprobe.text import counted, duration

LINE_EVERY_SHARE = 0.1
LINE_EVERY_SECONDS = 600.0
LEAST_SECONDS = 10.0
"""A log gets a line after each tenth of the images or after ten minutes, but never two within ten seconds."""


def progress_for(stream: Any) -> ProgressBar:
    """Return a bar for a terminal; lines for anything else, where a bar would become one endless line."""
    return ImageProgress() if stream.isatty() else LogProgress()


class ImageProgress(AfterBatch, TQDMProgressBar):
    """A bar that counts images while testing, those of all processes together; elsewhere it is Lightning's own."""

    def init_test_tqdm(self) -> Tqdm:
        """Make the bar: images done, of how many, images per second, time left."""
        total = getattr(self.trainer.datamodule, "images_to_do", None)  # type: ignore[attr-defined]
        self._looked = time.monotonic()
        return Tqdm(
            desc="Scoring",
            total=total,
            unit=" images",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0.05,
        )

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the bar moves at the end of a batch."""

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Move the bar on by the images of this batch."""
        bar = self.test_progress_bar
        moved = _images(batch, trainer)
        bar.update(moved if bar.total is None else min(moved, bar.total - bar.n))
        now = time.monotonic()
        if not bar.disable and now - self._looked >= LEAST_SECONDS:
            self._looked = now
            bar.set_postfix_str(_decided(trainer).removeprefix(", "))


class LogProgress(AfterBatch, ProgressBar):
    """Lines for a log: few, each complete in itself."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._done = 0
        self._began = self._written = 0.0
        self._written_done = 0

    def disable(self) -> None:
        """Write nothing: Lightning calls this on all processes but the first."""
        self._enabled = False

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start counting."""
        self._done = self._written_done = 0
        self._began = self._written = time.monotonic()

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Write a line if one is due."""
        total = getattr(trainer.datamodule, "images_to_do", None)  # type: ignore[attr-defined]
        self._done += _images(batch, trainer)
        now = time.monotonic()
        since = now - self._written
        moved = total is not None and self._done - self._written_done >= LINE_EVERY_SHARE * total
        if not self._enabled or since < LEAST_SECONDS or not (moved or since >= LINE_EVERY_SECONDS):
            return
        self._written, self._written_done = now, self._done
        rate = self._done / max(now - self._began, 1e-9)
        if total is None:
            self._write(f"scored {counted(self._done, 'image')}, {rate:.3g} a second{_decided(trainer)}")
            return
        done = min(self._done, total)
        left = (total - done) / rate
        so_far = f"scored {done:,} of {counted(total, 'image')}, {rate:.3g} a second, about {duration(left)} left"
        self._write(so_far + _decided(trainer))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write a line for an epoch of `fit`, if one is due."""
        now = time.monotonic()
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if last or now - self._written >= LEAST_SECONDS:
            self._written = now
            metrics = self.get_metrics(trainer, pl_module)
            values = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
            self._write(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {', '.join(values)}")

    def _write(self, line: str) -> None:
        if self._enabled:
            sys.stderr.write(f"headprobe: {line}\n")
            sys.stderr.flush()


def _decided(trainer: lightning.Trainer) -> str:
    """Return how many masks the stored units of all processes decide, behind a comma; nothing where none can be."""
    resume = resume_callback(trainer)
    text = "" if resume is None or resume.store is None else decided_in_short(resume.store.directory)
    return text and f", {text}"


def _images(batch: Any, trainer: lightning.Trainer) -> int:
    """Return the images of a batch, times the processes that work beside this one."""
    return (len(batch.labels) + len(batch.bad)) * trainer.world_size
