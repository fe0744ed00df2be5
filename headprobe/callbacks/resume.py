"""Keeps finished units on disk while a test runs, and continues with them when the same test is started again."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe.backbone.proofs.kept import KeptProofs, Proven
from headprobe.callbacks.identity import command_line, hardware, identify, kept_proofs, run_key, what_counts
from headprobe.errors import RunError, was_interrupted
from headprobe.files import shown
from headprobe.module import AfterBatch, HeadProbe, StepResult, data_of
from headprobe.processes import from_first
from headprobe.report.table import console
from headprobe.run.results import families_in_words
from headprobe.text import counted
from headprobe.units.mismatch import refuse_differences
from headprobe.units.store import FinishedUnits, UnitStore, find_units
from headprobe.units.unit_sums import UnitSums

AUTO, NEVER = "auto", "never"


class Resume(AfterBatch):
    """Writes the sums of finished units to `lightning_logs/units/<key>/` and continues where an earlier run ended.

    Args:
        resume: `auto` continues with the units of the same run, if there are any, and takes over what was proven of the
            same model; `never` deletes the units, starts over and proves all; anything else is the directory of units
            (or of results) to continue with.
    """

    calibrates = True

    def __init__(self, resume: str = AUTO) -> None:
        self.resume = resume
        self.store: UnitStore | None = None
        self.finished = FinishedUnits()  #: the units that were finished before
        self.identity: dict[str, Any] = {}  #: of this run (see `identify`), on the first process
        self._sums: UnitSums | None = None
        self._proofs: KeptProofs | None = None  # on the first process

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the store of this run, lock it, and leave its finished units out of the data.

        Raises:
            UsageError: Another run works on it, or `resume` names another run's units.
            RunError: It cannot be written or read.
        """
        if stage not in ("test", "validate") or not isinstance(pl_module, HeadProbe):
            return
        data = data_of(trainer)
        self.store = self._sums = None  # sums of an earlier test must never come into this store
        found = json.loads(from_first(trainer, lambda: self._open(trainer, pl_module).encode()))
        self.finished = FinishedUnits.from_json(found["finished"])
        if found["proven"] is None:
            pl_module.known = None
        else:
            pl_module.known = Proven.from_json(found["proven"], pl_module.backbone, Path(found["proven_in"]))
        if self.store is None:
            self.store = UnitStore(Path(found["directory"]), data.units)
        data.continue_after(self.finished)
        pl_module.continue_after(self.finished)

    def _open(self, trainer: lightning.Trainer, probe: HeadProbe) -> str:
        """Open the store, on the first process; return its directory and finished units as JSON, for the others."""
        data = data_of(trainer)
        if self._proofs is None or not probe.round_name:  # a digest of all weights for each round would take long
            self._proofs = kept_proofs(trainer, probe)
        probe.known = None if self.resume == NEVER else self._proofs.read()
        self.identity = identify(trainer, probe)
        counts = what_counts(self.identity, trainer)
        root = shown(Path(trainer.default_root_dir)) / "lightning_logs" / "units"
        directory = (root / probe.round_name) / run_key(counts)  # rounds are many and small: they lie together
        if self.resume not in (AUTO, NEVER):
            directory = find_units(Path(self.resume))
            refuse_differences(directory, counts)
        store = UnitStore(directory, data.units)
        if self.resume == NEVER:
            store.forget()

        about = {"data": self.identity["data"]["path"], "images": data.expected_images}
        about["test_families"] = families_in_words(probe.variants_now)
        session = {"command": command_line(trainer), "processes": trainer.world_size, "hardware": hardware()}
        finished = store.open(counts, session | about)
        self.store = store
        if finished.rows and not probe.round_name:
            console.print(_resuming(finished, data, directory), soft_wrap=True, markup=False, highlight=False)
        found = {"directory": str(directory), "finished": asdict(finished), "proven_in": str(self._proofs.file)}
        return json.dumps(found | {"proven": None if probe.known is None else probe.known.to_json()})

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the sums of finished units; the first process holds them from now on."""
        if self.store is None or not isinstance(pl_module, HeadProbe) or pl_module.unit_sums is None:
            return
        self._sums = pl_module.unit_sums
        if self._proofs is not None and pl_module.proven is not None:
            self._proofs.write(pl_module.proven)
        # The nodes found at `setup`, not those that other processes have stored meanwhile.
        for node in self.finished.nodes if trainer.is_global_zero else ():
            try:
                self._sums.add_node(node, self.store.load(node))
            except ValueError as error:
                raise self.store.broken(node, error) from None

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the sums of finished units of the images that calibrate."""
        self.on_test_epoch_start(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Store the sum of all units that calibrate."""
        self.on_test_end(trainer, pl_module)

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Store a unit that has just been finished, unless the last write was a moment ago."""
        if step.last and self.store is not None and self._sums is not None:
            self.store.save_in_time(self._sums.nodes)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Store the sum of all units, which replaces all other files, those of other processes too."""
        if trainer.is_global_zero and self.store is not None:
            self._save()
            self.store.tidy()
            self.store.end("done")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Store the units that are finished."""
        if self.store is None:
            return
        stopped = was_interrupted(exception) or isinstance(exception, SIGTERMException)
        with suppress(RunError):  # on a full disk the first error is the one to show
            self._save()
        with suppress(RunError):
            self.store.end("interrupted" if stopped else "failed")
        self._release(trainer, pl_module)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Release the units, so that another run can work on them."""
        self._release(trainer, pl_module)

    def _release(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.store is None:
            return
        self.store.close()
        self.store = self._sums = None
        # Another test scores all again.
        trainer.datamodule.continue_after(None)  # type: ignore[attr-defined]
        if isinstance(pl_module, HeadProbe):
            pl_module.continue_after(None)

    def _save(self) -> None:
        if self.store is not None and self._sums is not None:
            self.store.save(self._sums.nodes)


def _resuming(finished: FinishedUnits, data: Any, directory: Path) -> str:
    images, expected = sum(finished.rows.values()), data.expected_images
    of_all = counted(images, "image") if expected is None else f"{images:,} of {counted(expected, 'image')}"
    what = f"{len(finished.rows):,} of {counted(data.units, 'unit')} ({of_all})"
    if len(finished.rows) == data.units:
        return f"All of it was scored before; adding up {directory} (--resume never scores again)"
    return f"Resuming: {what} were scored before, in {directory} (--resume never starts over)"


def resume_callback(trainer: Any) -> Resume | None:
    """Return the `Resume` of a trainer, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Resume)), None)
