"""From what was calibrated to what fills the masked slots of every variant."""

from collections.abc import Sequence

import numpy as np
import torch

from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.replacement import (
    WITH_ZERO,
    AffineMap,
    Constant,
    Linear,
    Position,
    Replacement,
    Resample,
)
from headprobe.calibration.constants import Calibration, LayerConstants, predict_masked
from headprobe.calibration.optimal import in_words, refuse_missing
from headprobe.calibration.slots import position_shapes
from headprobe.errors import UsageError
from headprobe.masks.ablations import LINEAR, MEAN, OPTIMAL, POSITION, RESAMPLE, ZERO
from headprobe.masks.spec import Variant
from headprobe.text import Decision, counted

MapsOfLayers = dict[tuple[int, tuple[bool, ...]], AffineMap]
"""Predictions by layer and kept heads: where many masks hit the same heads of a layer, they share one."""


def replacements_of(
    variants: Sequence[Variant], layout: HeadLayout, calibration: Calibration | None, seed: int = 0
) -> list[Replacement]:
    """Return what fills the masked slots of each variant; variants that can share a replacement do.

    Args:
        variants: The variants.
        layout: The model's attention layers.
        calibration: What was fitted; None where no variant needs it.
        seed: Of the draws of resampling.

    Raises:
        UsageError: A variant needs constants that were not fitted.
    """
    if calibration is not None:
        refuse_missing(calibration, variants)
    shared: dict[tuple[str, int | str], Replacement] = {(ZERO, 0): WITH_ZERO}
    maps: MapsOfLayers = {}
    found: list[Replacement] = []
    for variant in variants:
        kind = variant.ablation
        key = (kind, variant.mask.mask.digest if kind == LINEAR else variant.draw)
        if key not in shared:
            shared[key] = _made(variant, layout, calibration, seed, maps)
        found.append(shared[key])
    return found


def _made(
    variant: Variant, layout: HeadLayout, calibration: Calibration | None, seed: int, maps: MapsOfLayers
) -> Replacement:
    """Return the replacement of a variant, and of all that can share it: that of linear depends on the masked heads."""
    kind = variant.ablation
    if kind == RESAMPLE:
        return Resample(seed, variant.draw)
    fitted = _needed(calibration, kind)
    return _linear(variant, layout, fitted, maps) if kind == LINEAR else _shared(kind, fitted)


def _needed(calibration: Calibration | None, kind: str) -> Calibration:
    if calibration is None:
        raise UsageError(f"the ablation {kind} is fitted on calibration images, and nothing was calibrated")
    return calibration


def _shared(kind: str, calibration: Calibration) -> Replacement:
    """Return the replacement of a kind that is the same for all masks."""
    values = []
    for number, layer in enumerate(calibration.layers):
        constants = {MEAN: layer.mean, POSITION: layer.position, OPTIMAL: layer.optimal}[kind]
        if constants is None:
            raise UsageError(f"the calibration has no constants of the kind {kind} for layer {number}; fit it anew")
        values.append(torch.from_numpy(np.asarray(constants, dtype=np.float32)))
    return Position(values) if kind == POSITION else Constant(kind, values)


def _linear(variant: Variant, layout: HeadLayout, calibration: Calibration, known: MapsOfLayers) -> Linear:
    """Return the affine predictions of one variant's masked heads, layer by layer; those of the same heads are one."""
    keep = variant.mask.mask.keep()  # [layers, max heads]
    maps: list[AffineMap | None] = []
    for number, layer in enumerate(layout.layers):
        kept = tuple(keep[number, : layer.heads].tolist())
        if all(kept):
            maps.append(None)
            continue
        if (number, kept) not in known:
            known[number, kept] = _map_of(calibration.layers[number], kept)
        maps.append(known[number, kept])
    return Linear(maps)


def _map_of(layer: LayerConstants, kept: Sequence[bool]) -> AffineMap:
    """Return the affine prediction of one layer's masked heads, in single precision."""
    found = predict_masked(layer, kept)
    matrix, offset = torch.from_numpy(found.matrix).float(), torch.from_numpy(found.offset).float()
    return AffineMap(torch.from_numpy(found.kept), torch.from_numpy(found.masked), matrix, offset)


FEW_IMAGES, FEW_TOKENS = 20, 50
"""Below so many images, or for `linear` tokens a channel of the layer, constants fit these images and few others.

Measured with `each:head` of the bundled models (ViT, Swin), judged on 249 other images. The rises of linear sum to 71
and 4.9 nats where 1 image fits, 1.9 and 1.3 with 10, 0.50 and 0.41 with 20, 0.31 and 0.25 with 50 (in the ViT 51 tokens
a channel: tokens of an image are alike), 0.27 with 200. Those of the mean sum to 2.2 and 1.2 with 1 image, 0.88 and
0.74 with 10, 0.70 and 0.67 with 20.
"""


def few_in_words(calibration: Calibration, kinds: Sequence[str]) -> str:
    """Return that too few images fitted the constants; empty where there were enough.

    Args:
        calibration: The constants.
        kinds: Kinds of ablation that take them.
    """
    if "images" not in calibration.about or not calibration.layers:  # a stand-in, or a classifier alone was fitted
        return ""
    images = int(calibration.about["images"])
    what = f"{counted(images, 'image')} fit {' and '.join(kinds)}"
    overfits = "constants fit these better than others and drops are overstated: take more"
    if LINEAR in kinds:
        layers = calibration.layers
        shares = [layer.samples / layer.mean.size for layer in layers]
        least = int(np.argmin(shares))
        if shares[least] < FEW_TOKENS:
            tokens, channels = counted(layers[least].samples, "token"), counted(layers[least].mean.size, "channel")
            return f"{what}, linear by {tokens} for {channels} in layer {least}; {overfits}"
    return f"{what}; {overfits}" if images < FEW_IMAGES else ""


def decisions_of(calibration: Calibration, kinds: Sequence[str]) -> list[Decision]:
    """Return what is to be known of the constants of a run, and of the images that fitted them.

    Args:
        calibration: The constants.
        kinds: Kinds of ablation that take them.
    """
    found = []
    if left_out := calibration.about.get("images_left_out", 0):
        read = counted(calibration.about["images"], "other")
        text = f"{counted(left_out, 'calibration image')} could not be read; constants are of the {read}"
        found.append(Decision("unread calibration images", text, shown=True))
    if few := few_in_words(calibration, kinds):
        found.append(Decision("few calibration images", few, shown=True))
    if OPTIMAL in calibration.about:
        found.append(Decision("optimal", in_words(calibration.about[OPTIMAL]), shown=True))
    return found


def stand_in(layout: HeadLayout) -> Calibration:
    """Return constants of every kind that were fitted on nothing: with these a dry run costs what a run costs."""
    layers = []
    for layer, shape in zip(layout.layers, position_shapes(layout), strict=True):
        mean, width = np.zeros((layer.heads, layer.head_dim)), layer.channels.channels
        layers.append(LayerConstants(1, mean, np.eye(width), position=np.zeros(shape), optimal=mean))
    return Calibration(layers)
