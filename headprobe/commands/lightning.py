"""`test` and `fit`: Lightning's own command line around `HeadProbe` and `ImageNetDataModule`."""

import logging
import warnings
from typing import Any

import lightning
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from headprobe import __version__
from headprobe.callbacks.export import WeightsExport
from headprobe.callbacks.progress import ImageProgress
from headprobe.callbacks.records import RecordsWriter
from headprobe.callbacks.results import ResultsWriter
from headprobe.commands.plan import print_plan
from headprobe.data.imagenet import ImageNetDataModule
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe


class MaskSpecs(tuple[MaskSpec, ...]):
    """The specs of one run: a single text, or a YAML list of texts, whose masks are scored together.

    Raises:
        MaskSpecError: A text is no mask spec.
    """

    __slots__ = ()

    def __new__(cls, specs: Any = ()) -> "MaskSpecs":
        texts = specs if isinstance(specs, (list, tuple)) else [specs]
        return super().__new__(cls, (MaskSpec(text) for text in texts))


def _plain(specs: MaskSpecs) -> str | list[str]:
    """Return what a config file shows: one text, or a list of texts."""
    return str(specs[0]) if len(specs) == 1 else [str(spec) for spec in specs]


register_type(MaskSpecs, serializer=_plain, deserializer=MaskSpecs)


class ProbeTrainer(lightning.Trainer):
    """Lightning's trainer with a progress bar that counts images, and its own words for what `test` and `fit` do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = [ImageProgress(), *(kwargs.get("callbacks") or [])]
        super().__init__(*args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Score a model with and without chosen attention heads, on the same images, in one pass."""
        return super().test(*args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train a model from nothing on a small data set; how the bundled models were made."""
        return super().fit(*args, **kwargs)


class HeadProbeCLI(LightningCLI):
    """Lightning's command line with `--mask-spec`, `--dry-run` and `--records`."""

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
        parser.add_argument("--dry-run", action="store_true", help="Print the plan: masks, forward passes, time, memory, smallest resolvable drop; score nothing.")
        parser.add_argument("--records", action="store_true", help="Also write one row per image and mask (Parquet).")

    def after_instantiate_classes(self) -> None:
        """Apply the masks after the model is built: linked arguments would let a YAML file score the unmasked model."""
        if self.subcommand == "test":
            self.model.ablate(self.config["test"].mask_spec)

    def before_test(self) -> None:
        """Print the plan instead of running, where that is asked for."""
        if self.config["test"].dry_run:
            print_plan(self.trainer, self.model, self.datamodule)
            raise SystemExit(0)
        if self.config["test"].records:
            self.trainer.callbacks.append(RecordsWriter())


def run(words: list[str] | None) -> None:
    """Run `test` or `fit` with the words of the command line, the command first; None reads the process's own."""
    _quiet()
    HeadProbeCLI(
        HeadProbe,
        ImageNetDataModule,
        trainer_class=ProbeTrainer,
        trainer_defaults={
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": ".", "name": "lightning_logs", "default_hp_metric": False}},
            "callbacks": [ResultsWriter(), WeightsExport()],
            "enable_model_summary": False,
            "enable_checkpointing": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "headprobe", "version": __version__},
        args=words,
    )


def _quiet() -> None:
    """Silence what a user can do nothing about; everything else still shows."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # device and tip lines
    # our stream has no length on purpose (STREAMING: a length that is wrong on one rank loses images)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
