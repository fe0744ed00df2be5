"""Writes the results of a test: files, TensorBoard, and the table on the terminal."""

import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe.calibration.constants import RESCORED_ORDERS, save_calibration
from headprobe.calibration.scores import score_rows
from headprobe.callbacks.derived import write_derived
from headprobe.callbacks.describing import print_summary, undefined, write_descriptions
from headprobe.callbacks.identity import (
    command_line,
    decisions_of,
    hardware,
    identify,
    run_directory,
    run_key,
    what_counts,
)
from headprobe.callbacks.resume import resume_callback
from headprobe.callbacks.tensorboard import write_tensorboard
from headprobe.errors import RunError, UsageError, was_interrupted
from headprobe.files import now, text_digest
from headprobe.masks.ablations import OPTIMAL
from headprobe.masks.spec import NONE
from headprobe.metrics.features import FeatureScores
from headprobe.mixture import CHECKED
from headprobe.module import AfterBatch, HeadProbe, StepResult, data_of
from headprobe.report.table import agreement_table, console, masks_table
from headprobe.run.ablations import ablation_rows
from headprobe.run.load import Row, calibration_of, read_files
from headprobe.run.results import (
    class_rows,
    group_arrays,
    variant_rows,
    write_arrays,
    write_masks,
    write_record,
    write_rows,
)
from headprobe.text import Decision, counted
from headprobe.units.coverage import Coverage, bad_images_message, check_coverage, images_read


class ResultsWriter(AfterBatch):
    """Checks that every image was counted once, then writes the run's files and its TensorBoard events.

    Args:
        table: Print the table at the end.
    """

    writes_results = True  # by which HeadProbe notices a Trainer that writes nothing

    def __init__(self, table: bool = True) -> None:
        self.table = table
        self._record: dict[str, Any] = {}
        self._opened = self._fetched = self._began = self._counted = 0.0
        self._directory = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory.

        Raises:
            UsageError: It holds results already: a plain Trainer gives its runs no folder of their own.
        """
        self._directory = run_directory(trainer)
        there = [name for name in ("run.json", "masks.csv", "masks.json") if (self._directory / name).exists()]
        if there and trainer.is_global_zero:
            raise UsageError(
                f"the folder of results holds {there[0]} already; headprobe.ProbeTrainer gives each run a folder of "
                f"its own, got {str(self._directory)!r}"
            )
        self._opened = time.perf_counter()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note when the data was open: Lightning has fetched the first batch, and the proofs begin."""
        self._fetched = time.perf_counter()

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin the run's record, now that the forward passes are planned: a broken run has one too."""
        self._began = self._counted = time.perf_counter()
        if trainer.is_global_zero:
            self._record = _describe_run(trainer, _probe(pl_module), self._directory)
            write_record(self._directory, self._record)

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Note when the last batch was counted."""
        self._counted = time.perf_counter()

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the count, write the results and print the table.

        Raises:
            RunError: Images are missing or counted twice, or some could not be read; the message lists them.
        """
        probe = _probe(pl_module)
        if (probe.scores is None and probe.labelled) or probe.coverage is None:
            raise RunError("the test ended before its results were added up")
        data = data_of(trainer)
        check_coverage(probe.coverage, data)
        if trainer.is_global_zero:
            self._write(trainer, probe, probe.coverage)
        # Process 0 alone fails: the others do not wait until it has written everything.
        if trainer.is_global_zero and probe.coverage.bad and data.on_bad_image == "error":
            raise RunError(bad_images_message(probe.coverage.bad, self._directory))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Note in the record how the run ended."""
        if trainer.is_global_zero and self._record and self._record["status"] == "running":
            stopped = was_interrupted(exception) or isinstance(exception, SIGTERMException)
            self._finish("interrupted" if stopped else "failed")
            with suppress(RunError):  # on a full disk the first error is the one to show
                write_record(self._directory, self._record)

    @rank_zero_only
    def _write(self, trainer: lightning.Trainer, probe: HeadProbe, coverage: Coverage) -> None:
        """Write all files of the run, in an order: figures and what is derived are made from files."""
        rows, compared = self._write_tables(trainer, probe, coverage)
        self._write_heads(probe, coverage)
        derived = list(write_derived(read_files(self._directory))) if len(probe.variants) > 1 else []
        if self.table:
            self._print(trainer, probe, coverage, rows, [agreement_table(compared)] if compared else [], derived)
        write_tensorboard(trainer.loggers, self._directory)
        self._end_record(trainer, probe, coverage)

    def _write_tables(
        self, trainer: lightning.Trainer, probe: HeadProbe, coverage: Coverage
    ) -> tuple[list[Row], list[Row]]:
        """Write what follows from the scores and the calibration; return the rows of masks.csv and ablations.csv."""
        directory, scores, features = self._directory, probe.scores, probe.feature_scores
        calibration = calibration_of(self._record)
        rows = variant_rows(probe.variants, scores, calibration, not probe.why_no_e_value, features)
        write_rows(directory / "masks.csv", rows)
        groups = group_arrays(rows, scores, features)
        write_arrays(directory / "groups.npz", groups)
        compared = ablation_rows(rows, groups, calibration) if len(probe.ablations) > 1 else []
        if compared:
            write_rows(directory / "ablations.csv", compared)
        write_masks(directory / "masks.json", probe.variants)
        if probe.calibration is not None:
            parts = {} if probe.classifying is None else probe.classifying.saved()
            save_calibration(replace(probe.calibration, classifier=parts), directory)
            scored = score_rows(probe.calibration.layers, int(probe.calibration.about["images"]))
            if scored:
                write_rows(directory / "scores.csv", scored)
        if probe.per_class and scores is not None:
            classes = _scored_classes(trainer, probe)
            write_rows(directory / "classes.csv", class_rows(probe.variants, scores, classes))
        if coverage.bad:
            write_rows(directory / "bad_images.csv", coverage.bad)
        return rows, compared

    def _write_heads(self, probe: HeadProbe, coverage: Coverage) -> None:
        """Write what describes heads, and note in the record which of its cells are empty, with the reasons."""
        unscored = {} if probe.calibration is None else probe.calibration.about.get("undefined_scores", {})
        if probe.statistics:
            write_descriptions(probe.statistics, self._directory, images_read(coverage))
        unread = _unread_feature(probe)
        if probe.statistics or unscored or unread:
            self._record["undefined"] = {**undefined(probe.statistics), **unscored, **unread}
            write_record(self._directory, self._record)  # figures are made from files, this one included

    def _print(
        self,
        trainer: lightning.Trainer,
        probe: HeadProbe,
        coverage: Coverage,
        rows: list[Row],
        compared: list[Any],
        derived: list[Any],
    ) -> None:
        """Print the results: what was decided, the tables, and where the files are.

        Args:
            trainer: Has run the test.
            probe: The model with its masks.
            coverage: The rows that were counted.
            rows: Those of masks.csv.
            compared: The table that compares ablations, where there are several.
            derived: What is printed of the tables that follow from the files.
        """
        bad, policy = len(coverage.bad), data_of(trainer).on_bad_image
        _print_masks(rows, probe, [one for one in decisions_of(trainer, probe) if one.shown])
        for table in compared:
            console.print()
            console.print(table)
        for printed in derived:
            console.print()
            console.print(printed, soft_wrap=isinstance(printed, str), markup=False)
        if bad and policy != "error":
            console.print(_accepted(bad, policy, int(rows[0]["images"])), style="yellow", soft_wrap=True)
        if probe.statistics:
            print_summary(probe.statistics)
        console.print(f"\nResults: {self._directory / 'masks.csv'}  (all files: {self._directory})", soft_wrap=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                console.print(f"Look at: tensorboard --logdir {Path(logger.log_dir).parent}", soft_wrap=True)

    def _end_record(self, trainer: lightning.Trainer, probe: HeadProbe, coverage: Coverage) -> None:
        """Write the record of a run that is done, or that fails for its bad images."""
        bad, policy = len(coverage.bad), data_of(trainer).on_bad_image
        self._finish("failed" if bad and policy == "error" else "done")
        self._record |= {
            **self._seconds_by_part(),
            "row_plan": probe.plan.to_json() if probe.plan else None,
            # some are only known when all images were scored
            "decisions": _decisions(trainer, probe),
            # fewer rows than the plan's where memory ended: those units' last bits differ from an undisturbed run's
            "units_by_row_budget": dict(sorted(Counter(coverage.budgets.values()).items())),
            "bad_images": bad,
            "on_bad_image": policy,
            # by which a reader notices tables of another run, and those that were cut off
            "results": {name: text_digest(self._directory / name) for name in CHECKED if self._has(name)},
        }
        write_record(self._directory, self._record)

    def _has(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def _finish(self, status: str) -> None:
        self._record |= {
            "status": status,
            "ended": now(),
            "seconds": round(time.perf_counter() - self._began, 3),
        }

    def _seconds_by_part(self) -> dict[str, float]:
        """Return the seconds since `setup`, by part; opening the data and its first batch belong to the loop."""
        parts = {
            "seconds_setup": self._began - self._fetched,
            "seconds_loop": self._fetched - self._opened + self._counted - self._began,
            "seconds_writing": time.perf_counter() - self._counted,
        }
        return {name: round(seconds, 3) for name, seconds in parts.items()}


def _probe(module: lightning.LightningModule) -> HeadProbe:
    if not isinstance(module, HeadProbe):
        raise TypeError(f"ResultsWriter works with HeadProbe, got {type(module).__name__}")
    return module


def _describe_run(trainer: lightning.Trainer, probe: HeadProbe, directory: Path) -> dict[str, Any]:
    """Return the record that `run.json` holds from the start on: enough to run the same again."""
    resume = resume_callback(trainer)
    # Not computed twice: reading all weights for their digest takes seconds for a large model.
    identity = resume.identity if resume is not None and resume.identity else identify(trainer, probe)
    store = resume.store if resume is not None else None
    return {
        "status": "running",
        "key": run_key(what_counts(identity, trainer)),
        **identity,
        "specs": sorted({spec for one in probe.variants for spec in one.mask.test_families or (one.mask.name,)}),
        "row_plan": probe.plan.to_json() if probe.plan else None,
        "units": None if store is None else os.path.relpath(store.directory, directory),
        "optimal": None if probe.calibration is None else probe.calibration.about.get(OPTIMAL),
        "rescored": None if probe.calibration is None else probe.calibration.about.get(RESCORED_ORDERS),
        "units_resumed": len(resume.finished.rows) if resume is not None else 0,
        "classifier": None if probe.classifying is None else probe.classifying.about(),
        "calibration_images": None if probe.calibration is None else probe.calibration.about["images"],
        "decisions": _decisions(trainer, probe),
        "command": command_line(trainer),
        "processes": trainer.world_size,
        "hardware": hardware(),
        "began": now(),
    }


def _decisions(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, str]:
    return {decision.about: decision.text for decision in decisions_of(trainer, probe)}


def _scored_classes(trainer: lightning.Trainer, probe: HeadProbe) -> list[tuple[int, str]]:
    """Return number in the model and name of every class that was scored; a class without a name has its number."""
    valid = probe.valid_classes
    numbers: list[int] = list(range(probe.num_classes)) if valid is None else valid.tolist()
    names = getattr(data_of(trainer), "class_names", None) or []
    return [(number, names[number] if number < len(names) else str(number)) for number in numbers]


def _unread_feature(probe: HeadProbe) -> dict[str, dict[str, list[int]]]:
    """Return by column of features why it is empty, of all layers: nothing where the feature was read."""
    layers = list(range(len(probe.layout.layers)))
    reason = probe.outputs.reason
    return {key: {reason: layers} for key in ("feature_cosine", "feature_distance")} if reason else {}


def _accepted(bad: int, policy: str, images: int) -> str:
    """Return the sentence about images that could not be used: how they count."""
    if policy == "wrong":
        return f"{counted(bad, 'image')} could not be used and count as wrong, under every mask; {images:,} in all"
    return f"{counted(bad, 'image')} could not be used and were skipped; all numbers are of the other {images:,}"


def _print_masks(rows: list[Row], probe: HeadProbe, decisions: list[Decision]) -> None:
    """Print what was decided and may surprise, the table, and a warning of NaN or infinite logits."""
    console.print()
    for decision in decisions:
        console.print(f"{decision.about}: {decision.text}", soft_wrap=True, markup=False)
    console.print(masks_table(rows, probe.title))
    broken = [_name(row) for row in rows if row["nonfinite"]]
    if broken:
        what = "logits under {}: counted as wrong" if probe.labelled else "features under {}: left out of the means"
        console.print(f"[yellow]NaN or infinite {what.format(', '.join(broken[:5]))}[/yellow]")
    if probe.labelled and (said := _left_out(rows, probe.feature_scores)):
        console.print(f"[yellow]{said}[/yellow]", soft_wrap=True)


def _name(row: Row) -> str:
    """Return the mask of a row as the table calls it."""
    return "baseline" if row["mask"] == NONE else str(row["mask"])


def _left_out(rows: list[Row], features: FeatureScores | None) -> str:
    """Return which rows' features lack images, in words: `nonfinite` of a labelled run counts logits alone."""
    counts = [] if features is None else features.nonfinite.tolist()
    broken = [_name(row) for row, count in zip(rows, counts or [0] * len(rows), strict=True) if count]
    if not broken:
        return ""
    return (
        f"features without a cosine or a distance (NaN, infinite, or of zeros in the whole model) under "
        f"{', '.join(broken[:5])}: at most {counted(max(counts), 'image')} left out of their means"
    )
