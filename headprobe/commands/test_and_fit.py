"""`test` and `fit`: Lightning's own command line around a model, its data and `ProbeTrainer`."""

import errno
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from headprobe import __version__
from headprobe.callbacks.describing import DESCRIBING
from headprobe.commands.parser import Parser, in_one_line, no_type_fits
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import ZERO, Ablations
from headprobe.masks.spec import MaskSpecs, plain_specs
from headprobe.text import safe_command
from headprobe.trainer import OFF, ProbeTrainer, refuse_limits

NO_OPTIONS = {"model", "datamodule", "ckpt_path", "weights_only"}
"""Arguments of the trainer's methods that are no options. Checkpoints are none, because they are pickles."""

OF_TEST = {"--mask-spec", "--ablation", "--calibration-file", "--dry-run", "--resume", "--records", "--score-heads"}
"""Options that `fit` refuses by name."""

register_type(MaskSpecs, serializer=plain_specs, deserializer=MaskSpecs)
register_type(Ablations, serializer=lambda given: Ablations(given).text, deserializer=Ablations)


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's parser, with our errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add the names of our callbacks to an error about a callback; jsonargparse's message does not have them."""
        if "trainer.callbacks" in message:
            ours = ", ".join(callback.__name__ for callback in DESCRIBING)
            message += f"; callbacks that describe heads are {ours}; others are named by their import path"
        super().error(message, ex)


class RunCLI(LightningCLI):
    """The common parts of the command lines of `test` and `fit`."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words of the command line, and keep them: they are what started the run."""
        self.words = list(sys.argv[1:] if args is None else args)
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Build the model, its data and the trainer.

        Raises:
            UsageError: One of them refuses its options, or a class that an option names cannot be built.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error, UsageError) or not no_type_fits(str(error)):
                raise
            raise UsageError(self._not_built(str(error))) from error
        self.trainer.command = safe_command(["headprobe", *self.words])  # type: ignore[attr-defined]  # a ProbeTrainer

    def _not_built(self, message: str) -> str:
        """Return jsonargparse's message for a class that cannot be built, with the option that names the class."""
        reason = in_one_line(message)
        name = reason.rsplit(", got ", 1)[-1]
        options = vars(self.config[self.subcommand].trainer).items()
        found = [key for key, value in options if re.search(rf"class_path='(?:[^']*\.)?{re.escape(name)}'", str(value))]
        option = f"--trainer.{found[0]}" if found else "an option of --trainer"
        return f"{option} names a class that cannot be built: {reason}"

    def before_instantiate_classes(self) -> None:
        """Refuse empty values in config files, which jsonargparse lets through unchecked."""
        config = self.config[self.subcommand]
        for section in ("trainer", "model", "data"):
            if config[section] is None:
                raise UsageError(f"{section}: in a config file must hold options or be left out, got an empty value")
        for key in ("mask_spec", "ablation", "resume", "model.name", "data.path", "data.batch_size"):
            if key in config and config[key] in (None, ""):
                raise UsageError(f"{key}: in a config file must have a value or be left out, got an empty one")

    @rank_zero_only
    def open_data(self) -> None:
        """Open the data before other processes start, so that an error is printed once and nothing is written."""
        self.datamodule.prepare_data()
        self.datamodule.bind_to(self.model)


class TestCLI(RunCLI):
    """`test`, with `--mask-spec`, `--dry-run` and `--records`."""

    def before_instantiate_classes(self) -> None:
        """Refuse options that would score a part of the images, before anything is built or fetched."""
        super().before_instantiate_classes()
        trainer = self.config["test"].trainer
        limits = (trainer.limit_test_batches, trainer.overfit_batches, trainer.limit_val_batches)
        refuse_limits(trainer.fast_dev_run, *limits)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `test`: `fit` has a model and data of its own."""
        return {"test": {*NO_OPTIONS, "dataloaders", "verbose", "records"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong neither to the trainer nor to the model or its data."""
        parser.add_argument(
            "--mask-spec",
            type=MaskSpecs,
            default=MaskSpecs("none"),
            help="Heads to mask: layer:3, head:3.1, each:layer, ... or in YAML a list of specs, scored together.",
        )
        parser.add_argument(
            "--ablation",
            type=Ablations,
            default=Ablations(ZERO),
            help="What masked heads are filled with: zero, mean, position, linear, resample:DRAWS:SEED, optimal, or "
            "several (zero,mean); docs/ablation.md.",
        )
        parser.add_argument(
            "--calibration-file",
            type=str | None,
            default=None,
            help="Take fitted constants from an earlier run's folder or calibration.safetensors; fit nothing.",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Print the masks, the forward passes, time, memory and the smallest resolvable drop; write nothing.",
        )
        parser.add_argument(
            "--score-heads",
            action="store_true",
            help="Also compute every importance score of every head on calibration images: scores.csv.",
        )
        parser.add_argument(
            "--records", action="store_true", help="Also write one row per image and variant (Parquet)."
        )

    def after_instantiate_classes(self) -> None:
        """Choose the masks after the model is built: linked arguments would let YAML score the unmasked model."""
        config = self.config["test"]
        self.choose_masks()
        if config.calibration_file is not None:
            self.model.use_calibration(config.calibration_file)
        self.trainer.split_data(self.model, self.datamodule)  # type: ignore[attr-defined]  # a ProbeTrainer

    def choose_masks(self) -> None:
        """Give the model the masks that the options name."""
        config = self.config["test"]
        self.model.choose_masks(config.mask_spec, config.ablation, config.score_heads)

    def before_test(self) -> None:
        """Check the data; with --dry-run, print what the run would do and stop."""
        self.open_data()
        if self.config["test"].dry_run:
            from headprobe.commands.dry.run import print_dry_run

            rank_zero_only(print_dry_run)(self.trainer, self.model, self.datamodule)
            raise SystemExit(0)

    def test(self, **options: Any) -> None:
        """Run the test; Lightning calls this where a command line has a method of the subcommand's name."""
        # An argument of the trainer's method would be `--records true` on the command line.
        self.trainer.test(records=self.config["test"].records, **options)  # type: ignore[call-arg]  # a ProbeTrainer


class FitCLI(RunCLI):
    """`fit`, which trains with all heads, or with those that a mask or pruning left."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`."""
        return {"fit": {*NO_OPTIONS, "train_dataloaders", "val_dataloaders"}}

    def before_fit(self) -> None:
        """Check the data."""
        self.open_data()


def run(words: list[str] | None, of_test: type[TestCLI] = TestCLI) -> None:
    """Run `test` or `fit` with the words of the command line, the command first; None reads the process's own.

    Args:
        words: The words.
        of_test: The command line of `test`, or one with other defaults.

    Raises:
        UsageError: The request cannot be carried out.
        RunError: The run failed, or its files cannot be written.
    """
    silence()
    given = sys.argv[1:] if words is None else words
    _refuse_repeats(given)
    if given[0] == "fit" and {word.split("=", 1)[0] for word in given} & OF_TEST:
        raise UsageError(
            f"{', '.join(sorted(OF_TEST))} belong to test; fit trains with all heads, or under --model.mask_spec"
        )
    try:
        _command_line(given[0], words, of_test)
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


def print_options(command: str, everything: bool, of_test: type[TestCLI] = TestCLI) -> None:
    """Print the options of Lightning's trainer, or all options of a command."""
    if everything:
        silence()
        _command_line(command, ["fit" if command == "fit" else "test", "--help"], of_test)
        return
    parser = LightningParser(prog=f"headprobe {command}", usage=f"headprobe {command} [OPTIONS]", add_help=False)
    parser.add_lightning_class_args(ProbeTrainer, "trainer")
    parser.set_defaults({f"trainer.{name}": off for name, off in OFF.items()})
    parser.print_help()


def _command_line(command: str, words: list[str] | None, of_test: type[TestCLI]) -> None:
    """Parse the words and run the command; each has the options of its own model and data only."""
    kind: type[RunCLI]
    model: Any
    data: Any
    if command == "fit":
        from headprobe.data.training import TrainingDataModule
        from headprobe.fit_steps import Fit

        kind, model, data = FitCLI, Fit, TrainingDataModule
    else:
        from headprobe.data.datamodule import ImageNetDataModule
        from headprobe.module import HeadProbe

        kind, model, data = of_test, HeadProbe, ImageNetDataModule
    kind(
        model,
        data,
        trainer_class=ProbeTrainer,
        trainer_defaults=OFF,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "headprobe", "version": __version__},
        parser_class=LightningParser,
        args=words,
    )


_CANNOT_WRITE = frozenset(
    {
        errno.EACCES,
        getattr(errno, "EDQUOT", errno.ENOSPC),  # Windows has no quotas
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
    """Refuse a repeated --mask-spec or --ablation: argparse would keep only the last and drop the others silently."""
    for option, remedy in SAID_ONCE.items():
        given = [word for word in words if word.split("=", 1)[0] == option]
        key = option.removeprefix("--").replace("-", "_")
        if len(given) > 1:
            raise UsageError(f"{option} stands more than once: {remedy}, got it {len(given)} times")
        if given and any(_has(config, key) for config in _configs(words[words.index(given[0]) + 1 :])):
            raise UsageError(
                f"{option} stands before a --config with {key} of its own, which would silently replace it: "
                f"put {option} last, got {given[0]} first"
            )


SAID_ONCE = {
    "--mask-spec": "join heads into one mask with +, or score several masks together with a YAML list under "
    "mask_spec: in a --config file",
    "--ablation": "join several with a comma, as in --ablation zero,mean",
}
"""Options that may stand once, and how several values are said."""


def _configs(words: Sequence[str]) -> list[str]:
    """Return the config files that these words name."""
    names = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in ("--config", "-c"):
            names.append(value or following)
    return names


def _has(config: str, key: str) -> bool:
    """Return whether a config file has an option; reading the file itself reports what is wrong with it."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    sections = [content, content.get("test")] if isinstance(content, dict) else []
    return any(isinstance(section, dict) and key in section for section in sections)


# -- messages of libraries ---------------------------------------------------------------------------------------------


def silence() -> None:
    """Quieten the libraries below us; call it after importing Lightning, which sets its loggers' levels."""
    # "Seed set to 0", "GPU available: ...", tips: nothing that a user must act on. Their warnings and errors stay.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # At this level Lightning prints why it kills a run: one of its processes was ended from outside (out of memory).
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    # Given words are meant to stand for those of the process.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # TensorBoard writes in a thread. The main thread gets the error of a full disk too, and prints one message.
    threading.excepthook = partial(_all_but_full_disks, threading.excepthook)
    # The hub's client prints two lines for each of up to ten tries; the error at the end has the remedy.
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FirstRetry())


def _all_but_full_disks(usual: Callable[[threading.ExceptHookArgs], Any], args: threading.ExceptHookArgs) -> None:
    ours = type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)
    if not ours:
        usual(args)


class _FirstRetry(logging.Filter):
    """Shows one line when the hub does not answer: a minute without output would look like a hang."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass the first warning on, reworded."""
        if record.levelno != logging.WARNING:
            return True
        first, self._shown = not self._shown, True
        record.msg, record.args = "headprobe: the hub does not answer; trying again for up to a minute", None
        return first
