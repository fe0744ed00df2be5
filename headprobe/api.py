"""For a timm model in hand: prove that masks take effect on it, and run it under a mask.

```python
print(headprobe.check(model))
with headprobe.ablate(model, "layer:3"):
    logits = model(images)
```
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from headprobe.backbone.built_size import built_size, inner_model, timm_config
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.heads.refusals import refuse_unreachable, refuse_unusable
from headprobe.backbone.masking.ablation import HookCount, ablating, masks_of_rows
from headprobe.backbone.masking.replacement import Replacement, check_replacements
from headprobe.backbone.proofs.check import check_backbone
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.proofs.report import CheckReport
from headprobe.backbone.sandbox import in_single, quiet
from headprobe.backbone.weights import weights_digest
from headprobe.calibration.constants import Calibration, read_calibration, refuse_another
from headprobe.calibration.fills import replacements_of
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import FITTED, RESAMPLE, ZERO, Ablations
from headprobe.masks.spec import NO_ORDERS, MaskSpec, Scores, Variant, expand_all
from headprobe.text import counted


def check(
    model: nn.Module, *, input_size: tuple[int, int, int] | None = None, semantics: Semantics = "slot"
) -> CheckReport:
    """Prove, layer by layer, that head masks take effect on `model`; `print` the report to see its table.

    The model is left as it was: weights, gradients, modes, hooks and what its modules keep. Where its forward pass
    fails without gradients, the proofs run with them.

    Args:
        model: A timm model, on any device, trained or not.
        input_size: `(channels, height, width)` of the images to try it on; without it the size it was built for.
        semantics: What masking takes away where a head's slot holds more than what the head attended to: the whole
            `slot`, or the `attention` alone.

    Returns:
        The verdict of every proof on every layer.

    Raises:
        UsageError: It is no model, has no attention heads, or attention that cannot be masked at all.
    """
    _refuse_early(model)
    with torch.inference_mode(False), quiet(model):
        return check_backbone(model, _input_size(model, input_size), _name(model), semantics)


@contextmanager
def ablate(
    model: nn.Module,
    spec: str | MaskSpec,
    *,
    input_size: tuple[int, int, int] | None = None,
    semantics: Semantics = "slot",
    ablation: str = ZERO,
    calibration: str | Path | Calibration | None = None,
) -> Iterator[HeadLayout]:
    """Mask heads in every forward pass of `model` while the context is open; afterwards the model is as it was.

    The cheap proofs run first, on noise; your own hooks are removed for them, and run as always under the mask.
    Gradients flow as always, and a forward pass may need them. Contexts may be nested, which masks the heads of all of
    them; `linear` ones in the same layer each predict on their own, so give one spec for both. Compile the model inside
    the context, not before; with gradient checkpointing call `backward` inside too. Use a model in one thread at a
    time.

    Args:
        model: A timm model, on any device.
        spec: A mask spec that stands for one mask, such as `layer:3` or `head:3.1+head:5.0`.
        input_size: `(channels, height, width)` of your images; without it the size the model was built for.
        semantics: What masking takes away, as in `check`.
        ablation: What the slots of masked heads are filled with: `zero`, or `mean`, `position`, `linear` or `optimal`.
        calibration: A run's folder or `calibration.safetensors`, with the constants of these, or with the scores that
            order heads (`grow:calibration:SCORE:least:6`).

    Yields:
        The model's attention layers.

    Raises:
        UsageError: The spec does not fit the model or stands for several masks, or a proof fails; or the calibration is
            not one of this model and its weights.
        RunError: A forward pass did not apply the mask exactly once per layer, or there was none at all: the mask would
            have done nothing.
    """
    chosen = one_variant(model, spec, input_size, semantics, ablation, calibration)
    layout, fills = chosen.layout, [chosen.fill]
    with torch.inference_mode(False), quiet(model):
        prove_masks(in_single(model, layout.model), layout)

    keep = chosen.variant.mask.mask.keep().to(_device(model))  # [layers, max heads]
    with ExitStack() as stack:
        count = stack.enter_context(ablating(model, layout, masks_of_rows(keep[None]), lambda: fills))
        stack.enter_context(_counted(model, layout, count))
        yield layout
        if not count.ever:
            raise RunError(
                f"no forward pass of {layout.model!r} ran under {spec}: the mask had no effect on anything "
                "(where the model was compiled before, call torch.compiler.reset() first)"
            )


class OneVariant(NamedTuple):
    """One mask of a model in hand, and what fills its slots.

    Attributes:
        layout: The model's attention layers.
        variant: The mask and the kind of ablation.
        fill: What fills the slots of masked heads.
    """

    layout: HeadLayout
    variant: Variant
    fill: Replacement


def one_variant(
    model: nn.Module,
    spec: str | MaskSpec,
    input_size: tuple[int, int, int] | None,
    semantics: Semantics,
    ablation: str,
    calibration: str | Path | Calibration | None,
) -> OneVariant:
    """Return the one mask that a spec stands for on a model in hand; the arguments are those of `ablate`.

    Raises:
        UsageError: The spec does not fit the model or stands for several masks; or the calibration is not one of this
            model and its weights.
    """
    if not isinstance(spec, str | MaskSpec):
        raise UsageError(f"a mask spec must be text such as 'layer:3', or a MaskSpec, got {spec!r}")
    spec = MaskSpec(spec) if isinstance(spec, str) else spec
    _refuse_early(model)

    with torch.inference_mode(False), quiet(model):
        layout = find_heads(model, _input_size(model, input_size), _name(model), semantics)
        given = None if calibration is None else _read(calibration)
        scores = _scores(spec, given)
        orders = given.orders if scores is not None and given is not None else NO_ORDERS
        variants = expand_all([spec], layout.heads_per_layer, layout.model, Ablations(ablation), scores, orders)
        if len(variants) != 1:
            raise UsageError(
                f"expected a spec of one mask and one ablation, got {spec} under {ablation} with "
                f"{counted(len(variants), 'variant')}"
            )
        fills = _fills(model, layout, variants, given, ordered=scores is not None)
    return OneVariant(layout, variants[0], fills[0])


def _read(given: str | Path | Calibration) -> Calibration:
    if not isinstance(given, str | Path | Calibration):
        raise UsageError(
            f"calibration must be a run's folder, its calibration.safetensors, or a Calibration, got {given!r}"
        )
    return given if isinstance(given, Calibration) else read_calibration(Path(given))


def _scores(spec: MaskSpec, calibration: Calibration | None) -> Scores | None:
    """Return the scores that order a spec's heads; None where it needs none."""
    if not spec.needs_scores:
        return None
    if calibration is None or not calibration.scores:
        raise UsageError(
            "which heads this mask hits is known once a run has scored them: run headprobe test --score-heads on this "
            f"model and give calibration its folder, got {spec} without scores"
        )
    return calibration.scores


def _fills(
    model: nn.Module,
    layout: HeadLayout,
    variants: Sequence[Variant],
    calibration: Calibration | None,
    ordered: bool,
) -> list[Replacement]:
    """Return what fills the masked slots, from constants that were fitted on this very model.

    Args:
        model: The model.
        layout: Its attention layers.
        variants: The one variant.
        calibration: The constants, or the scores.
        ordered: Whether heads are ordered by the scores.
    """
    kind = variants[0].ablation
    if kind == RESAMPLE:
        raise UsageError("ablate has no other images to take heads from: use headprobe test, got resample")
    if kind not in FITTED and not ordered:
        if calibration is not None:
            raise UsageError(f"calibration is for ablations that are fitted, {', '.join(sorted(FITTED))}, got {kind}")
        return replacements_of(variants, layout, None)
    if calibration is None:
        raise UsageError(
            f"the ablation {kind} needs constants: run headprobe test --ablation {kind} on this model and give "
            "calibration its folder, got none"
        )
    own = {
        "weights_sha256": weights_digest(model),
        "heads_per_layer": list(layout.heads_per_layer),
        "layers": [layer.name for layer in layout.layers],
    }
    refuse_another(calibration, own, [kind] if kind in FITTED else [])
    _refuse_other_size(calibration, layout)
    check_replacements(layout, fills := replacements_of(variants, layout, calibration), 1)
    return fills


def _refuse_other_size(calibration: Calibration, layout: HeadLayout) -> None:
    """Raise a UsageError where images of this size are others than those of the calibration."""
    fitted = calibration.about.get("model", {}).get("data_config", {}).get("input_size")
    if fitted is not None and tuple(fitted) != tuple(layout.input_size):
        raise UsageError(
            f"the calibration was fitted on images of {tuple(fitted)}: give input_size that size if yours have it, or "
            f"fit it anew, got {tuple(layout.input_size)}"
        )


@contextmanager
def _counted(model: nn.Module, layout: HeadLayout, count: HookCount) -> Iterator[None]:
    """Check after every forward pass that each layer's mask was applied exactly once."""

    def begin(*_: object) -> None:
        count.restart()

    def end(*_: object) -> None:
        count.check(layout)

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _refuse_early(model: nn.Module) -> None:
    """Raise a UsageError for what is no model, or one that cannot be tried at all."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a model must be a torch.nn.Module, as timm.create_model(name) returns it, got {type(model).__name__}"
        )
    if next(model.parameters(), None) is None:
        raise UsageError(f"a model to check must have weights, got {type(model).__name__}")
    refuse_unreachable(model, _name(model))
    refuse_unusable(model, _name(model))


def _input_size(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the given size if it is one, or the size that the model was built for."""
    if given is None:
        return built_size(model)
    if not isinstance(given, tuple | list) or len(given) != 3 or not all(_is_count(number) for number in given):
        raise UsageError(f"input_size must be three whole numbers (channels, height, width), got {given!r}")
    return (int(given[0]), int(given[1]), int(given[2]))


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) > 0


def _name(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the name of the class."""
    return str(timm_config(model).get("architecture") or type(inner_model(model)).__name__)
