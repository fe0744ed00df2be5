"""`test` and `fit`: Lightning's own command line around `HeadProbe` and `ImageNetDataModule`."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import lightning
import yaml
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe import __version__
from headprobe.callbacks.export import WeightsExport
from headprobe.callbacks.fail_together import FailTogether
from headprobe.callbacks.head_attention import HeadAttention
from headprobe.callbacks.head_similarity import HeadSimilarity
from headprobe.callbacks.head_spectrum import HeadSpectrum
from headprobe.callbacks.precision import PrecisionCheck
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.resume import AUTO, UnitLedger
from headprobe.callbacks.row_budget import RowBudget
from headprobe.commands.parser import Parser
from headprobe.commands.plan import print_plan
from headprobe.commands.quiet_libraries import silence
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpecs, plain_specs
from headprobe.module import HeadProbe
from headprobe.trainer import ProbeTrainer

DESCRIBING = (HeadAttention, HeadSimilarity, HeadSpectrum)
"""Callbacks that a config file names by their class alone: jsonargparse knows those that are imported."""


register_type(MaskSpecs, serializer=plain_specs, deserializer=MaskSpecs)


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's parser, with our errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name our callbacks where one is not understood: jsonargparse says what a callback is, not which there are."""
        if "trainer.callbacks" in message:
            ours = ", ".join(callback.__name__ for callback in DESCRIBING)
            message += f"\ncallbacks that describe heads are {ours}; others are named by their import path"
        super().error(message, ex)


class HeadProbeCLI(LightningCLI):
    """Lightning's command line with `--mask-spec`, `--dry-run`, `--resume` and `--records`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only what headprobe does."""
        hidden = {"model", "datamodule", "ckpt_path", "weights_only"}  # no checkpoints: they are pickles
        return {
            "test": {*hidden, "dataloaders", "verbose"},
            "fit": {*hidden, "train_dataloaders", "val_dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        parser.add_argument(
            "--mask-spec",
            type=MaskSpecs,
            default=MaskSpecs("none"),
            help="Heads to mask: layer:3, head:3.1, each:layer, ... or in YAML a list of specs, scored together.",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Print the masks, the forward passes, time, memory and the smallest resolvable drop; write nothing.",
        )
        parser.add_argument(
            "--resume",
            type=str,
            default=AUTO,
            help="auto: go on with units that the same command has finished before; never: score all again; or the "
            "directory of a run or of its units, which must be gone on with.",
        )
        parser.add_argument("--records", action="store_true", help="Also write one row per image and mask (Parquet).")

    def before_instantiate_classes(self) -> None:
        """Refuse empty values in config files, which jsonargparse lets through unchecked."""
        config = self.config[self.subcommand]
        for section in ("trainer", "model", "data"):
            if config[section] is None:
                raise UsageError(f"{section}: in a config file must hold options or be left out, got an empty value")
        for key in ("mask_spec", "resume", "model.name", "data.path", "data.batch_size"):
            if config[key] in (None, ""):
                raise UsageError(f"{key}: in a config file must have a value or be left out, got an empty one")

    def after_instantiate_classes(self) -> None:
        """Apply the masks after the model is built: linked arguments would let a YAML file score the unmasked model."""
        if self.subcommand == "test":
            self.model.ablate(self.config["test"].mask_spec)

    def before_test(self) -> None:
        """Check the data; then print the plan instead of running, where that is asked for."""
        _refuse_limits(self.trainer)
        self._open_data()
        if self.config["test"].dry_run:
            rank_zero_only(print_plan)(self.trainer, self.model, self.datamodule)
            raise SystemExit(0)
        self._keep_units()

    def _keep_units(self) -> None:
        """Keep finished units on disk: records before the ledger, a unit is finished only with its records."""
        options, callbacks = self.config["test"], self.trainer.callbacks  # type: ignore[attr-defined]  # documented
        first = 1 + next(number for number, one in enumerate(callbacks) if isinstance(one, FailTogether))
        keeping: list[lightning.Callback] = [RecordsWriter()] * options.records
        callbacks[first:first] = [*keeping, UnitLedger(options.resume), RowBudget(), PrecisionCheck()]

    def before_fit(self) -> None:
        """Check the data, and that no masks are asked for."""
        options = self.config["fit"]
        if options.mask_spec != MaskSpecs("none") or options.dry_run or options.records or options.resume != AUTO:
            raise UsageError("--mask-spec, --dry-run, --resume and --records belong to test; fit trains with all heads")
        self._open_data()

    @rank_zero_only
    def _open_data(self) -> None:
        """Open the data before other processes start: what is wrong is then said once, and nothing is written."""
        self.datamodule.prepare_data()
        self.datamodule.bind(self.model.data_config, self.model.num_classes)


def run(words: list[str] | None) -> None:
    """Run `test` or `fit` with the words of the command line, the command first; None reads the process's own.

    Raises:
        UsageError: The request cannot be carried out.
        RunError: The run failed, or its files cannot be written.
    """
    silence()
    _refuse_repeats(sys.argv[1:] if words is None else words)
    try:
        HeadProbeCLI(
            HeadProbe,
            ImageNetDataModule,
            trainer_class=ProbeTrainer,
            trainer_defaults={
                "callbacks": [ResultsWriter(), WeightsExport()],
                "enable_autolog_hparams": False,  # ResultsWriter logs what differs between runs, with their results
                "enable_model_summary": False,
                "enable_checkpointing": False,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "headprobe", "version": __version__},
            parser_class=LightningParser,
            args=words,
        )
    except SIGTERMException as stop:  # Lightning's own SystemExit would end with code 0
        raise RunError("ended from outside (SIGTERM); run the same command again to resume") from stop
    except OSError as error:  # of Lightning's and TensorBoard's own files; ours are RunErrors already
        if error.errno not in _CANNOT_WRITE:
            raise
        raise RunError(
            f"cannot write {str(error.filename or 'the files of this run')!r} ({error.strerror}); make room or choose "
            "another directory with --trainer.default_root_dir, then run the same command again to resume; finished "
            "files are complete"
        ) from error


_CANNOT_WRITE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EIO,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


def _refuse_repeats(words: Sequence[str]) -> None:
    """Of an option given twice argparse keeps the last; a mask that silently does nothing is what must never happen."""
    specs = [word for word in words if word.split("=", 1)[0] == "--mask-spec"]
    if len(specs) > 1:
        raise UsageError(
            "--mask-spec stands more than once: join heads into one mask with +, or score several masks together with "
            f"a YAML list under mask_spec: in a --config file, got it {len(specs)} times"
        )
    if specs and any(_names_masks(config) for config in _configs(words[words.index(specs[0]) + 1 :])):
        raise UsageError(
            "--mask-spec stands before a --config with a mask_spec of its own, which would replace it without a word: "
            f"put --mask-spec last, got {specs[0]} first"
        )


def _configs(words: Sequence[str]) -> list[str]:
    """Return the config files that these words name."""
    names = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in ("--config", "-c"):
            names.append(value or following)
    return names


def _names_masks(config: str) -> bool:
    """Say whether a config file chooses masks; what is wrong with the file itself is said where it is read."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    parts = [content, content.get("test")] if isinstance(content, dict) else []
    return any(isinstance(part, dict) and "mask_spec" in part for part in parts)


def _refuse_limits(trainer: lightning.Trainer) -> None:
    """Refuse Lightning's ways to end a test early: they count batches per process and would break units."""
    if trainer.limit_test_batches != 1.0:
        raise UsageError(
            "--trainer.limit_test_batches and --trainer.fast_dev_run would score parts of units; use --data.max_images "
            f"instead, got {trainer.limit_test_batches}"
        )
