"""`test` and `fit`: Lightning's own command line around `HeadProbe` and `ImageNetDataModule`."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from jsonargparse.typing import register_type
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe import __version__
from headprobe.callbacks.export import WeightsExport
from headprobe.callbacks.head_attention import HeadAttention
from headprobe.callbacks.head_similarity import HeadSimilarity
from headprobe.callbacks.head_spectrum import HeadSpectrum
from headprobe.callbacks.ledger import AUTO, UnitLedger
from headprobe.callbacks.precision import PrecisionCheck
from headprobe.callbacks.progress import progress_for
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.callbacks.row_budget import RowBudget
from headprobe.callbacks.together import FailTogether
from headprobe.commands.noise import silence
from headprobe.commands.parser import Parser
from headprobe.commands.plan import print_plan
from headprobe.data.imagenet import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe

DESCRIBING = (HeadAttention, HeadSimilarity, HeadSpectrum)
"""Callbacks that a config file names by their class alone: jsonargparse knows those that are imported."""


class MaskSpecs(tuple[MaskSpec, ...]):
    """The specs of one run: a single text, or a YAML list of texts, whose masks are scored together.

    Raises:
        MaskSpecError: A text is no mask spec.
    """

    __slots__ = ()

    def __new__(cls, specs: Any = ()) -> "MaskSpecs":
        """Check every text."""
        texts = specs if isinstance(specs, (list, tuple)) else [specs]
        if not texts:
            raise UsageError("the list of mask specs is empty; write none for the baseline alone, got []")
        return super().__new__(cls, (MaskSpec(text) for text in texts))


def _plain(specs: MaskSpecs) -> str | list[str]:
    """Return what a config file shows: one text, or a list of texts."""
    return str(specs[0]) if len(specs) == 1 else [str(spec) for spec in specs]


register_type(MaskSpecs, serializer=_plain, deserializer=MaskSpecs)


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's parser, with our errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name our callbacks where one is not understood: jsonargparse says what a callback is, not which there are."""
        if "trainer.callbacks" in message:
            ours = ", ".join(callback.__name__ for callback in DESCRIBING)
            message += f"\ncallbacks that describe heads are {ours}; others are named by their import path"
        super().error(message, ex)


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


def _refuse_lonely_nodes(trainer: lightning.Trainer) -> None:
    """Refuse to wait for other machines of which nothing is known: Lightning would, without a word and without end."""
    launched = getattr(trainer.strategy, "cluster_environment", None)
    unknown = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if trainer.num_nodes > 1 and isinstance(launched, LightningEnvironment) and unknown:
        raise UsageError(
            f"--trainer.num_nodes needs to know the other machines: start it with srun or torchrun, or set "
            f"{', '.join(unknown)} on each of them (docs/imagenet.md), got {trainer.num_nodes} nodes"
        )


def _refuse_limits(trainer: lightning.Trainer) -> None:
    """Refuse Lightning's ways to end a test early: they count batches per process and would break units."""
    if trainer.limit_test_batches != 1.0:
        raise UsageError(
            "--trainer.limit_test_batches and --trainer.fast_dev_run would score parts of units; use --data.max_images "
            f"instead, got {trainer.limit_test_batches}"
        )
