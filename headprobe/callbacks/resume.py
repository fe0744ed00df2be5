"""Keeps finished units on disk while a test runs, and takes them over when the same test is started again."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe.callbacks.identity import command_line, identify, what_counts
from headprobe.errors import RunError, UsageError
from headprobe.module import HeadProbe
from headprobe.processes import from_first
from headprobe.report.table import console
from headprobe.run.record import hardware, run_key
from headprobe.text import counted
from headprobe.units.mismatch import refuse_differences
from headprobe.units.store import Finished, Ledger, find_units
from headprobe.units.tree import Node
from headprobe.units.unit_sums import UnitBook

AUTO, NEVER = "auto", "never"


class UnitLedger(lightning.Callback):
    """Writes the sums of finished units to `lightning_logs/units/<key>/` and goes on where an earlier run ended.

    Args:
        resume: `auto` goes on with the units of the same run, if there are any; `never` deletes them and starts over;
            anything else is the directory of units (or of results) that must be gone on with.
    """

    def __init__(self, resume: str = AUTO) -> None:
        self.resume = resume
        self.ledger: Ledger | None = None
        self.taken_over = 0  #: units that were finished before
        self.numbers: dict[str, Any] = {}  #: what the run is (see `identify`), on the first process
        self._found: tuple[Node, ...] = ()
        self._book: UnitBook | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the ledger of this run, lock it, and leave its finished units out of what is to do.

        Raises:
            UsageError: Another run works on it, or `resume` names another run's.
            RunError: It cannot be written or read.
        """
        if stage != "test" or not isinstance(pl_module, HeadProbe):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning where there is one
        if data is None:
            raise UsageError("UnitLedger needs a data module, whose units it can leave out: test(datamodule=...)")
        self.ledger = None
        self._found = ()  # the first process finds them
        self._book = None  # a book of an earlier test must never come into this ledger
        found = json.loads(from_first(trainer, lambda: self._open(trainer, pl_module).encode()))
        if self.ledger is None:
            self.ledger = Ledger(Path(found["directory"]), data.units)
        done = set(found["done"])
        data.todo = [unit for unit in range(data.units) if unit not in done]
        pl_module.most_rows = found["budget"]
        self.taken_over = len(done)

    def _open(self, trainer: lightning.Trainer, probe: HeadProbe) -> str:
        """Open the ledger, on the first process, and say what the others must know of it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.numbers = identify(trainer, probe)
        describe = what_counts(self.numbers, trainer)
        directory = _shown(Path(trainer.default_root_dir)) / "lightning_logs" / "units" / run_key(describe)
        if self.resume not in (AUTO, NEVER):
            directory = find_units(Path(self.resume))
            refuse_differences(directory, describe)
        ledger = Ledger(directory, data.units)
        if self.resume == NEVER:
            ledger.forget()
        about = {"data": self.numbers["data"]["path"], "images": data.expected_images}
        session = {"command": command_line(), "processes": trainer.world_size, "hardware": hardware()}
        finished = ledger.open(describe, session | about)
        self.ledger, self._found = ledger, finished.nodes
        if finished.rows:
            console.print(_resuming(finished, data, directory), soft_wrap=True, markup=False, highlight=False)
        found = {"directory": str(directory), "done": sorted(finished.rows), "budget": finished.least_budget}
        return json.dumps(found)

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the sums of finished units; the first process holds them from now on."""
        if self.ledger is None or not isinstance(pl_module, HeadProbe) or pl_module.book is None:
            return
        self._book = pl_module.book
        for node in self._found:  # not what other processes have stored meanwhile
            try:
                self._book.add_node(node, self.ledger.load(node))
            except ValueError as error:
                raise self.ledger.broken(node, error) from None

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store a unit that has just been finished, unless the last write was a moment ago."""
        if batch.last and self.ledger is not None and self._book is not None:
            self.ledger.save_in_time(self._book.nodes)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Store the whole, which replaces all parts of it, those of other processes too."""
        if trainer.is_global_zero and self.ledger is not None:
            self._save()
            self.ledger.tidy()
            self.ledger.end("done")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Store what is finished."""
        if self.ledger is None:
            return
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        with suppress(RunError):  # on a full disk the first error is the one to show
            self._save()
        with suppress(RunError):
            self.ledger.end("interrupted" if stopped else "failed")
        self._let_go(trainer, pl_module)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Let others work on these units."""
        self._let_go(trainer, pl_module)

    def _let_go(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.ledger is None:
            return
        self.ledger.close()
        self.ledger = self._book = None
        trainer.datamodule.todo = None  # type: ignore[attr-defined]  # another test scores all again
        if isinstance(pl_module, HeadProbe):
            pl_module.most_rows = None

    def _save(self) -> None:
        if self.ledger is not None and self._book is not None:
            self.ledger.save(self._book.nodes)


def _shown(path: Path) -> Path:
    """Return a path as a user would write it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _resuming(finished: Finished, data: Any, directory: Path) -> str:
    images, expected = sum(finished.rows.values()), data.expected_images
    of = f" of {expected:,}" if expected is not None else ""
    what = f"{len(finished.rows):,} of {counted(data.units, 'unit')} ({images:,}{of} images)"
    if len(finished.rows) == data.units:
        return f"All of it was scored before; adding up {directory} (--resume never scores again)"
    return f"Resuming: {what} were scored before, in {directory} (--resume never starts over)"


def unit_ledger(trainer: Any) -> UnitLedger | None:
    """Return the ledger callback of a trainer, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, UnitLedger)), None)
