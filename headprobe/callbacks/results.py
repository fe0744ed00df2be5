"""Writes what a test run found: files, TensorBoard, and the table on the terminal."""

import shlex
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe.callbacks.descriptions import print_summary, undefined, write_descriptions
from headprobe.callbacks.directory import run_directory
from headprobe.callbacks.gather import gather_lists
from headprobe.callbacks.heads import head_callbacks
from headprobe.callbacks.tensorboard import write_tensorboard
from headprobe.errors import RunError
from headprobe.module import HeadProbe
from headprobe.report.table import console, masks_table
from headprobe.run.record import hardware, run_key, versions
from headprobe.run.results import Row, class_rows, mask_rows, write_masks, write_record, write_rows


class ResultsWriter(lightning.Callback):
    """Checks that every image was counted once, then writes the run's files and its TensorBoard events.

    Args:
        table: Print the table at the end.
    """

    def __init__(self, table: bool = True) -> None:
        self.table = table
        self._bad: list[dict[str, Any]] = []
        self._record: dict[str, Any] = {}
        self._began = 0.0
        self._directory = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer)

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin the run's record, now that the forward passes are planned, so that a broken run says what it was."""
        self._bad, self._began = [], time.perf_counter()
        if trainer.is_global_zero:
            self._record = _describe_run(trainer, _probe(pl_module))
            write_record(self._directory, self._record)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember rows that could not be used."""
        self._bad += [
            {"unit": bad.unit, "row": bad.row, "source": bad.source, "reason": bad.reason} for bad in batch.bad
        ]

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Bring the unusable rows of all processes together."""
        self._bad = sorted(gather_lists(trainer, self._bad), key=lambda bad: (bad["unit"], bad["row"]))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the count, write the results and print the table.

        Raises:
            RunError: Images are missing or counted twice, or some could not be read; the message lists them.
        """
        probe = _probe(pl_module)
        if probe.scores is None:
            raise RunError("the test ended before its results were added up")
        _check_count(int(probe.scores.images[0]), len(self._bad), trainer.datamodule)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._write(trainer, probe, mask_rows(probe.masks, probe.scores, probe.ablation))
        if self._bad:
            raise RunError(_bad_images_message(self._bad, self._directory))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Note in the record how the run ended."""
        if trainer.is_global_zero and self._record and self._record["status"] == "running":
            self._finish("interrupted" if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) else "failed")
            with suppress(RunError):  # on a full disk the first error is the one to show
                write_record(self._directory, self._record)

    @rank_zero_only
    def _write(self, trainer: lightning.Trainer, probe: HeadProbe, rows: list[Row]) -> None:
        directory = self._directory
        write_rows(directory / "masks.csv", rows)
        write_masks(directory / "masks.json", probe.masks)
        if probe.scores is not None and probe.per_class:
            classes = _scored_classes(trainer, probe)
            write_rows(directory / "classes.csv", class_rows(probe.masks, probe.scores, classes))
        if self._bad:
            write_rows(directory / "bad_images.csv", self._bad)
        describing = head_callbacks(trainer)
        if self.table:
            _print(rows, probe)
            print_summary(describing, probe)
            console.print(f"\nResults: {directory / 'masks.csv'}  (all files: {directory})", soft_wrap=True)
            if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
                console.print(f"Look at: tensorboard --logdir {directory.parent}", soft_wrap=True)
        write_tensorboard(trainer.loggers, directory, rows, probe, self._record["data"])
        if describing:
            write_descriptions(describing, trainer.loggers, directory, probe, int(rows[0]["images"]))
            self._record["undefined"] = undefined(describing)
        self._finish("failed" if self._bad else "done")
        self._record["row_plan"] = probe.plan.to_json() if probe.plan else None
        write_record(directory, self._record)

    def _finish(self, status: str) -> None:
        self._record |= {
            "status": status,
            "ended": _now(),
            "seconds": round(time.perf_counter() - self._began, 3),
            "bad_images": len(self._bad),
        }


def _probe(module: lightning.LightningModule) -> HeadProbe:
    if not isinstance(module, HeadProbe):
        raise TypeError(f"ResultsWriter works with HeadProbe, got {type(module).__name__}")
    return module


def _describe_run(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, Any]:
    """Return what `run.json` holds from the start on: enough to run the same again."""
    numbers = {
        "model": probe.describe(),
        "data": trainer.datamodule.describe(),  # type: ignore[attr-defined]
        "masks": {named.name: named.mask.digest for named in probe.masks},
        "ablation": probe.ablation,
        "statistics": ["paired_accuracy"] + ["per_class"] * probe.per_class + [s.describe() for s in probe.statistics],
        "precision": str(trainer.precision),
        "row_plan": probe.plan.to_json() if probe.plan else None,
        "versions": versions(),
    }
    return {
        "status": "running",
        "key": run_key(_without_places(numbers)),
        **numbers,
        "command": shlex.join(["headprobe", *sys.argv[1:]]),
        "processes": trainer.world_size,
        "hardware": hardware(),
        "began": _now(),
    }


def _without_places(numbers: dict[str, Any]) -> dict[str, Any]:
    """Leave out of the key where the weights lie: their digest says what they are."""
    model = {name: value for name, value in numbers["model"].items() if name != "weights"}
    return {**numbers, "model": model}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _scored_classes(trainer: lightning.Trainer, probe: HeadProbe) -> list[tuple[int, str]]:
    """Return the number in the model and the name of every class that was scored; the number where it has no name."""
    valid = probe.valid_classes
    numbers: list[int] = list(range(probe.num_classes)) if valid is None else valid.tolist()
    names = getattr(trainer.datamodule, "class_names", None) or []  # type: ignore[attr-defined]
    return [(number, names[number] if number < len(names) else str(number)) for number in numbers]


def _check_count(images: int, bad: int, datamodule: Any) -> None:
    """Compare the images counted with the data set's own number."""
    expected = datamodule.expected_images
    if expected is not None and images + bad != expected:
        raise RunError(
            f"{images} images were scored and {bad} could not be, but the data set has {expected}; "
            "nothing was written, since these numbers would be wrong"
        )
    if images == 0:
        raise RunError(f"no image was scored ({bad} could not be read); check --data.path and --data.split")


def _bad_images_message(bad: list[dict[str, Any]], directory: Path) -> str:
    lines = [f"  {item['source']}, row {item['row']}: {item['reason']}" for item in bad[:20]]
    more = [f"  ... and {len(bad) - 20} more"] if len(bad) > 20 else []
    return "\n".join(
        [
            f"{len(bad)} images could not be used; the results in {directory} are of the others only:",
            *lines,
            *more,
            f"all are listed in {directory / 'bad_images.csv'}",
        ]
    )


def _print(rows: list[Row], probe: HeadProbe) -> None:
    """Print the table, and what could not be trusted."""
    console.print()
    console.print(masks_table(rows, probe.source.name))
    broken = [str(row["mask"]) for row in rows if row["nonfinite"]]
    if broken:
        console.print(f"[yellow]NaN or infinite logits under {', '.join(broken[:5])}: counted as wrong[/yellow]")
