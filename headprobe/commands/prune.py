"""`prune`: a `test` of one mask, after which the masked heads are removed for good and the smaller model is written."""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from headprobe.backbone.pruned.card import steps_of
from headprobe.backbone.pruned.directory import refuse_existing
from headprobe.backbone.weights import BUNDLED, ModelSource, pruned_source
from headprobe.callbacks.precision import EXACT
from headprobe.commands import test_and_fit
from headprobe.commands.study import print_page
from headprobe.commands.test_and_fit import TestCLI
from headprobe.errors import UsageError
from headprobe.masks.ablations import LINEAR
from headprobe.masks.spec import NONE, MaskSpecs
from headprobe.module import AfterBatch, HeadProbe, StepResult
from headprobe.pruning import choose
from headprobe.pruning.choose_in_run import SPEED_BATCH, by_accuracy, by_column, by_speed, go_on_with
from headprobe.pruning.make import Pruning, make, refuse_hopeless
from headprobe.report.table import console
from headprobe.run.results import write_pruned

ORDER = "grow:calibration:residual_variance_after_projection"
"""The nested sets of `--keep-top1` and `--speed`, unless the user gives others."""

CURVE = "curve.csv"
"""The sets that were judged or measured on the way to the one that was chosen."""

REAL_IMAGES = 16
"""Images of the run on which the proof is repeated."""

NOT_JUDGED = (
    "note: no images were read, so nothing was judged: there is no run in lightning_logs and no page; give --data.path "
    "to have both"
)


class KeepImages(AfterBatch):
    """Keeps the first images that are judged, for the proof.

    Attributes:
        images: `[images, channels, height, width]` uint8; None before.
    """

    def __init__(self) -> None:
        self.images: Tensor | None = None

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Keep images of the first batches."""
        there = [] if self.images is None else [self.images]
        if len(batch.images) and sum(map(len, there)) < REAL_IMAGES:
            self.images = torch.cat([*there, batch.images.cpu()])[:REAL_IMAGES]


class PruneCLI(TestCLI):
    """`prune`: the options of `test`, and where the smaller model goes."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keep the words as they were typed: below, it is Lightning's subcommand `test`."""
        super().parse_arguments(parser, args)
        self.words = ["prune", *self.words[1:]]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder, what to choose by, and how often latency is measured."""
        super().add_arguments_to_parser(parser)
        parser.prog = "headprobe prune"
        parser.add_argument("--output", type=str | None, default=None, help="Folder of the smaller model; a new one.")
        parser.add_argument(
            "--refit",
            action="store_true",
            help="Fit linear layer by layer, each in the model that is pruned up to it.",
        )
        parser.add_argument(
            "--keep-top1",
            type=float | None,
            default=None,
            help="Remove the largest nested set that is shown to lose at most so many points of top-1.",
        )
        parser.add_argument(
            "--speed",
            type=float | None,
            default=None,
            help="Remove the smallest nested set that makes the model so many times faster.",
        )
        parser.add_argument("--pairs", type=int, default=20, help="Pairs of timings that measure latency.")

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot be done before anything is built or fetched."""
        super().before_instantiate_classes()
        config = self.config["test"]
        if not config.output:
            raise UsageError("prune needs the folder of the smaller model: give --output DIR, got none")
        refuse_existing(Path(config.output))
        if config.pairs < 1:
            raise UsageError(f"--pairs must be 1 or more, got {config.pairs}")
        if str(config.trainer.precision or EXACT[0]) not in (*EXACT, "32"):
            raise UsageError(
                "prune proves its model in float32; leave --trainer.precision out and convert the folder's weights "
                f"afterwards, got {config.trainer.precision}"
            )
        if config.dry_run:
            raise UsageError("prune has no --dry-run: headprobe test with the same mask and ablation prints the cost")
        if config.keep_top1 is not None and not 0 < config.keep_top1 < 100:
            raise UsageError(f"--keep-top1 must be points of top-1 between 0 and 100, got {config.keep_top1:g}")
        if config.speed is not None and not config.speed > 1:
            raise UsageError(f"--speed must be more than 1, how many times faster, got {config.speed:g}")
        self._check_choice(config)

    def _check_choice(self, config: Any) -> None:
        """Refuse options that choose in two ways, or in none."""
        chooses = [name for name in ("keep_top1", "speed") if config[name] is not None]
        given = [spec for spec in config.mask_spec if spec.canonical != NONE]
        if len(chooses) > 1:
            raise UsageError("--keep-top1 and --speed choose in two ways: give one of them, got both")
        if not chooses and not given:
            raise UsageError("prune needs the heads to remove: give --mask-spec, --keep-top1 or --speed, got none")
        if chooses and config.refit:
            raise UsageError(
                "--refit gives another model than those that were judged: choose first, then prune again with "
                f"--mask-spec and --refit, got --refit beside --{chooses[0].replace('_', '-')}"
            )
        if chooses and not given:
            config.mask_spec = MaskSpecs(ORDER)
        if chooses and any(spec.startswith("grow:") and not _of_calibration(spec) for spec in config.mask_spec):
            raise UsageError(
                "the judged images must have no part in the order of the sets: give grow:calibration:SCORE or "
                f"grow:random:SEED as --mask-spec, got {config.mask_spec[0]}"
            )

    @property
    def _chooses(self) -> bool:
        config = self.config["test"]
        return config.keep_top1 is not None or config.speed is not None

    @property
    def _reads_data(self) -> bool:
        """Whether images are read: where something is fitted or chosen, and where the user names any."""
        config = self.config["test"]
        named = any(word.partition("=")[0] == "--data.path" for word in self.words) or config.data.path != "digits"
        return self.model.fits or self._chooses or named or _bundled(self.model.source)

    def choose_masks(self) -> None:
        """Choose the mask, and refuse what cannot be pruned."""
        super().choose_masks()
        config, variants = self.config["test"], self.model.variants
        if len(config.ablation) != 1:
            raise UsageError(f"prune takes one --ablation, got {self.model.ablations.text}")
        if self._chooses:
            if not any(spec.needs_scores for spec in self.model.specs):
                choose.refuse_unordered(variants)
        elif len(variants) != 1:
            raise UsageError(
                f"prune takes a --mask-spec of one mask, got {config.mask_spec[0]} with {len(variants):,} of them"
            )
        if config.keep_top1 is not None and not self.model.labelled:
            raise UsageError(
                "--keep-top1 counts right answers, and --model.classifier none has no answers: choose a classifier, or "
                f"give the heads with --mask-spec, got --keep-top1 {config.keep_top1:g}"
            )
        if config.refit and config.ablation[0].kind != LINEAR:
            raise UsageError(f"--refit is for --ablation linear, got {self.model.ablations.text}")
        if config.refit and (config.calibration_file is not None or self.model.score_heads):
            raise UsageError("--refit fits anew and needs a mask that is known before: leave --calibration-file out")
        refuse_hopeless(self.model, variants[0])

    def before_test(self) -> None:
        """Check the data where any are read, and that these can show what is asked for."""
        if not self._reads_data:
            return
        if self.config["test"].keep_top1 is not None:
            self._refuse_same()
        self.open_data()
        self._refuse_few()

    @rank_zero_only
    def _refuse_few(self) -> None:
        """Refuse images that can show nothing; only the first process has opened them."""
        most, images = self.config["test"].keep_top1, self.datamodule.expected_images
        if most is not None and images is not None:
            choose.refuse_few(images, most)

    def _refuse_same(self) -> None:
        """Refuse to show anything on images that took part in the order of the sets, or in what is folded."""
        rows = self.datamodule.calibration
        if self.model.fits and rows is not None and rows.rule == "same":
            raise UsageError(
                "--keep-top1 shows nothing on the images that order the sets or fit what is folded: give "
                f"--data.calibration half or split:NAME, got {rows.text}"
            )

    def test(self, **options: Any) -> None:
        """Fit, judge, then remove the heads and write the smaller model."""
        config, model, data = self.config["test"], self.model, self.datamodule
        trainer: Any = self.trainer  # a ProbeTrainer
        keep, curve = KeepImages(), ""
        if config.refit:
            from headprobe.pruning.refit import refit

            go_on_with(model, data, refit(trainer, model, data))
        if config.speed is not None:
            curve = by_speed(trainer, model, data, config.speed, config.pairs)
        if self._reads_data:
            trainer.callbacks.append(keep)
            super().test(**options)
        variant = model.variants[0]
        if config.keep_top1 is not None:
            variant, curve = by_accuracy(model, config.keep_top1)
        if trainer.is_global_zero:
            model.to(trainer.strategy.root_device)
            files = {CURVE: curve} if curve else {}
            self._make(Pruning(model, variant, keep.images, config.pairs, self._about(), files), curve)

    def _make(self, pruning: Pruning, curve: str) -> None:
        """Write the smaller model, and the page of its run where images were judged; say what was written."""
        config = self.config["test"]
        lines, made = make(pruning, Path(config.output), config.speed)
        if not self._reads_data:
            lines.append(NOT_JUDGED)
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)
        folder: Path | None = self.trainer.folder  # type: ignore[attr-defined]  # a ProbeTrainer
        if self._reads_data and folder is not None:
            write_pruned(folder, {**made, "curve": by_column(curve)})
            print_page(folder)

    def _about(self) -> dict[str, Any]:
        """Return what the folder says of how it came about."""
        config = self.config["test"]
        about: dict[str, Any] = {"command": self.trainer.command}  # type: ignore[attr-defined]  # a ProbeTrainer
        if config.keep_top1 is not None:
            about["chosen_by"] = {"keep_top1_pp": config.keep_top1}
        if config.speed is not None:
            about["chosen_by"] = {"speed": config.speed, "batch": SPEED_BATCH}
        return about


def _bundled(source: ModelSource) -> bool:
    """Return whether a model, or what it was pruned from, is one of those whose images are bundled too."""
    own = pruned_source(source)
    name = source.name if own is None else steps_of(own)[0].get("parent", {}).get("name")
    return name in BUNDLED


def _of_calibration(spec: str) -> bool:
    return spec.startswith(("grow:calibration:", "grow:random:"))


def run(words: list[str] | None) -> None:
    """Run `prune` with the words of the command line, the command first; None reads the process's own.

    Raises:
        UsageError: The request cannot be carried out.
        RunError: The run failed, no set was shown to do, or the files cannot be written.
    """
    given = sys.argv[1:] if words is None else words
    test_and_fit.run(["test", *given[1:]], PruneCLI)


def print_options(command: str, everything: bool) -> None:
    """Print the options of Lightning's trainer, or all options of the command."""
    test_and_fit.print_options(command, everything, PruneCLI)
