"""Sequential calibration: `linear` refitted layer by layer, each in the model that is pruned up to it already."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from headprobe.backbone.pruned.directory import save_directory
from headprobe.calibration.constants import Calibration, LayerConstants
from headprobe.calibration.fills import replacements_of
from headprobe.errors import RunError
from headprobe.masks.ablations import LINEAR
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.spec import Variant
from headprobe.module import HeadProbe
from headprobe.pruning.remove import without_heads
from headprobe.trainer import ProbeTrainer

REFITTED = "refitted"
"""Where a calibration says which layers were fitted in a model that was pruned before them."""


def refit(trainer: ProbeTrainer, probe: HeadProbe, data: Any) -> Calibration:
    """Return a calibration whose layers were each fitted with all masks before them in place.

    The first masked layer is fitted in the whole model. Its prediction is folded into a smaller model, in which the
    next one is fitted, and so on: a calibration each, whose finished units are kept as those of any other, so that the
    same command goes on where it stopped.

    Args:
        trainer: Runs the calibrations.
        probe: The whole model, with one mask under `linear`.
        data: The data module.
    """
    variant = probe.variants[0]
    trainer.calibrate(probe, data)
    if probe.calibration is None:
        raise RunError("the first calibration left no constants")
    layers, about = list(probe.calibration.layers), dict(probe.calibration.about)

    hit = sorted({layer for layer, _ in variant.mask.mask.masked})
    for number in hit[1:]:
        before = _before(variant, number)
        fill = replacements_of([before], probe.layout, Calibration(layers, about))[0]
        layers[number] = _in_smaller(trainer, probe, data, before.mask.mask.keep(), fill, number)
    names = [probe.layout.layers[number].name for number in hit[1:]]
    return Calibration(layers, {**about, REFITTED: names})


def _before(variant: Variant, number: int) -> Variant:
    """Return the part of a variant's mask that lies before a layer."""
    mask = variant.mask.mask
    part = HeadMask(mask.heads_per_layer, frozenset(one for one in mask.masked if one[0] < number))
    return replace(variant, mask=replace(variant.mask, mask=part))


def _in_smaller(
    trainer: ProbeTrainer, probe: HeadProbe, data: Any, keep: Tensor, fill: Any, number: int
) -> LayerConstants:
    """Return the constants of one layer in the model without the masked heads of the layers before it."""
    name = probe.layout.layers[number].name
    identity = probe.identity()
    smaller = without_heads(probe.backbone.cpu(), probe.layout, keep, fill)
    with TemporaryDirectory(prefix="headprobe-refit-") as parent:
        folder = Path(parent) / "model"
        save_directory(smaller, folder, str(identity["architecture"]), identity["options"], {})
        stage = HeadProbe(
            f"local-dir:{folder}",
            semantics=probe.semantics,
            row_budget=probe.row_budget,
            train_size=probe.source.train_size,
        )
        place = [layer.name for layer in stage.layout.layers].index(name)
        stage.choose_masks(f"head:{place}.0", LINEAR)  # any mask: constants are of all heads
        trainer.calibrate(stage, data)
    if stage.calibration is None:
        raise RunError(f"the calibration of {name!r} left no constants")
    return stage.calibration.layers[place]
