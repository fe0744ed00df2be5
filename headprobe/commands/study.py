"""`study`: a `test` with the masks, ablations and statistics of the whole study, and its page at the end."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from headprobe.callbacks.describing import DESCRIBING
from headprobe.commands import test_and_fit
from headprobe.commands.dry.run import print_dry_run
from headprobe.commands.test_and_fit import TestCLI
from headprobe.errors import UsageError
from headprobe.experiments.study import PARTS, Study, study_of
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import NONE
from headprobe.report.table import console
from headprobe.run.load import load_files

ABLATIONS = "zero,mean,linear"

REPORT = "report.html"

BUNDLED, BUNDLED_IMAGES = "digits", 400
"""Of the bundled images a study takes so many, to be done in five minutes on two cores."""

SECONDS_OF_WRITING = 30.0
"""Tables, figures and the page, of 24 or 36 heads on one core. Measured."""


class StudyCLI(TestCLI):
    """`study`: the options of `test` with other defaults, and `--skip`."""

    study: Study

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keep the words as they were typed: below, a study is Lightning's subcommand `test`."""
        super().parse_arguments(parser, args)
        self.words = ["study", *self.words[1:]]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--skip`, and the study's defaults to options of `test`."""
        super().add_arguments_to_parser(parser)
        parser.prog = "headprobe study"
        parser.add_argument(
            "--skip", type=str, default="", help=f"Parts of the study to leave out, with commas: {', '.join(PARTS)}."
        )
        described = [{"class_path": callback.__name__} for callback in DESCRIBING]
        parser.set_defaults({"ablation": Ablations(ABLATIONS), "trainer.callbacks": described})

    def before_instantiate_classes(self) -> None:
        """Refuse unknown parts before anything is built or fetched."""
        super().before_instantiate_classes()
        self._skipped = [name.strip() for name in self.config["test"].skip.split(",") if name.strip()]
        strange = [name for name in self._skipped if name not in PARTS]
        if strange:
            raise UsageError(f"--skip must be some of {', '.join(PARTS)}, joined with commas, got {strange[0]!r}")
        data = self.config["test"].data
        if data.path == BUNDLED and data.max_images is None:
            data.max_images = BUNDLED_IMAGES

    def choose_masks(self) -> None:
        """Choose the study's masks, for this model."""
        config = self.config["test"]
        more = [str(spec) for spec in config.mask_spec if spec.canonical != NONE]
        self.study = study_of(self.model, config.ablation, self._skipped, more)
        self.study.choose(self.model)

    def before_test(self) -> None:
        """Check the data and print what the study does and costs; with --dry-run stop there."""
        self.open_data()
        about = self.study.lines()
        rank_zero_only(print_dry_run)(self.trainer, self.model, self.datamodule, about, SECONDS_OF_WRITING)
        if self.config["test"].dry_run:
            raise SystemExit(0)

    def test(self, **options: Any) -> None:
        """Run the study, then make its page from its files."""
        super().test(**options)
        folder: Path | None = self.trainer.folder  # type: ignore[attr-defined]  # a ProbeTrainer
        if self.trainer.is_global_zero and folder is not None:
            print_page(folder)


def print_page(folder: Path) -> None:
    """Make the page of a run that has ended, from its files, and say where it is."""
    from headprobe.report.page.build import write_page  # only now is there anything to show

    console.print(f"Report: {write_page([load_files(folder)], folder / REPORT)}", soft_wrap=True)


def run(words: list[str] | None) -> None:
    """Run `study` with the words of the command line, the command first; None reads the process's own.

    Raises:
        UsageError: The request cannot be carried out.
        RunError: The run failed, or its files cannot be written.
    """
    given = sys.argv[1:] if words is None else words
    test_and_fit.run(["test", *given[1:]], StudyCLI)


def print_options(command: str, everything: bool) -> None:
    """Print the options of Lightning's trainer, or all options of the command."""
    test_and_fit.print_options(command, everything, StudyCLI)
