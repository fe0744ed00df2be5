"""Proves that masks take effect on a given model, layer by layer and proof by proof.

(a) `keep`: a mask that keeps every head leaves the output equal bit for bit.
(b) `operator`: masking heads equals zeroing their slice of the attention operator's own output; `columns`: where
    nothing but linear code stands between, it equals zeroing their columns of the output projection's weights.
(c) `effect`: every head's mask changes the output, or its projection is zero.
(d) `once`: every hook fires exactly once per forward pass and none is left afterwards.
(e) `rows`: rows with different masks in one batch equal separate runs, windows included.
(f) `join`: masks that join the growing pass at this layer give the logits of plain forward passes.
(g) `map`: the captured attention weights, applied to the values, give the operator's own output.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.trials import trial_masks
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.proofs.layer_alone import first_tensor, layer_benches
from headprobe.backbone.proofs.one_layer import prove_alone, prove_effect
from headprobe.backbone.proofs.report import PROOFS, CheckReport, LayerReport, Verdict
from headprobe.backbone.sandbox import (
    copied,
    evaluating,
    example_images,
    hook_count,
    is_plain,
    perturbed,
    relative,
    trying,
)
from headprobe.errors import RunError, UsageError
from headprobe.text import counted

ROWS_TOLERANCE = 1e-4
"""Largest difference between a batch and separate runs, relative to the largest output; a mask in a wrong row changes
some tenths of it."""

WITH_GRADIENTS = "the forward pass needs gradients, and a test with its growing pass runs without"


def check_backbone(
    backbone: nn.Module,
    input_size: tuple[int, int, int],
    model: str,
    semantics: Semantics = "slot",
    own_weights: bool = True,
) -> CheckReport:
    """Find the heads of a model and prove that masks of them take effect.

    The proofs run in float32 on a copy with all parameters perturbed: at initialisation some projections are zero
    and would hide errors. Whether each head has an effect is then tried with the model's own weights too.

    Args:
        backbone: A timm model; it is left as it was.
        input_size: `(channels, height, width)` of the images to try it on.
        model: Its name, for messages.
        semantics: What masking takes away, see `docs/heads.md`.
        own_weights: Also name the heads of the model's own weights that have no effect.

    Raises:
        UsageError: The model has no heads, or attention that cannot be masked at all.
    """
    layout = find_heads(backbone, input_size, model, semantics)
    tried = perturbed(copied(backbone, model).float())

    reports = tuple(LayerReport(layer) for layer in layout.layers)
    images = example_images(tried, input_size, 2, seed=2)
    with evaluating(tried), trying(tried, layout.gradients):
        for report, bench in zip(reports, layer_benches(tried, layout, images)[0], strict=True):
            prove_alone(report, bench)
        _prove_once(tried, layout, reports, images)
        _prove_rows(tried, layout, reports)
    _prove_joins(tried, layout, reports)

    if own_weights:
        _note_silent_heads(backbone, layout, reports)
    for report in reports:
        report.proofs = {name: report.proofs[name] for name in PROOFS}
    notes = [*_notes(layout, reports), *_quantised(backbone)]
    return CheckReport(model, input_size, reports, tuple(notes))


# -- the whole model -------------------------------------------------------------------------------------------------
def _prove_once(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...], images: Tensor) -> None:
    """(d) Count the hooks that fire in one forward pass, and the hooks that are left afterwards."""
    before = hook_count(backbone)
    keep = trial_masks(layout, images.device, seed=3)[0]  # [layers, max heads]
    with ablating(backbone, layout, masks_of_rows(keep.expand(len(images), *keep.shape))) as count:
        backbone(images)
        fired = list(count.fired)

    left = hook_count(backbone) != before
    for report, times in zip(reports, fired, strict=True):
        detail = f"fired {times} times in one forward pass" if times != 1 else "hooks are left behind" if left else ""
        report.proofs["once"] = Verdict(not detail, detail)


def _prove_rows(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """(e) Run three images with masks of their own in one batch, and one by one.

    Each layer's output is compared. The first layer that fails spoils the input of the later ones: they are not tried.
    """
    images = example_images(backbone, layout.input_size, 3, seed=4)
    keep = trial_masks(layout, images.device, seed=4)[[0, len(layout.layers) // 2, -1]]  # [3, layers, max heads]
    everything = torch.ones_like(keep)
    plain, plain_alone = _together_and_alone(backbone, layout, images, everything)
    masked, masked_alone = _together_and_alone(backbone, layout, images, keep)

    failed = ""
    for number, report in enumerate(reports):
        together, alone = masked[number], masked_alone[number]
        # another batch shape rounds differently, and depth amplifies that: allow for what happens without masks
        noise = relative(plain_alone[number], plain[number])
        differs = relative(alone, together) if alone.shape == together.shape else float("inf")
        if failed:
            report.proofs["rows"] = Verdict(None, f"not tried: it comes after {failed}")
        elif differs <= max(ROWS_TOLERANCE, 10 * noise) and noise < 1e-2:
            report.proofs["rows"] = Verdict(True, f"{differs:.0e}")
        else:
            failed = report.layer.name
            sizes = f"{differs:.1g}, without masks {noise:.1g}"
            report.proofs["rows"] = Verdict(False, f"a batch with three masks differs from separate runs by {sizes}")


def _together_and_alone(
    backbone: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every attention module's output for images in one batch, and for the same images one by one."""
    together = _outputs(backbone, layout, images, keep)
    one_by_one = [_outputs(backbone, layout, images[row : row + 1], keep[row : row + 1]) for row in range(len(images))]
    alone = [torch.cat([outputs[number] for outputs in one_by_one]) for number in range(len(layout.layers))]
    return together, alone


def _outputs(backbone: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor) -> list[Tensor]:
    """Return every attention module's output in a forward pass with a mask of its own for each image.

    Args:
        backbone: The model.
        layout: Its attention layers.
        images: `[images, channels, height, width]`, normalised.
        keep: `[images, layers, max heads]` bool, True = keep.
    """
    outputs: dict[int, Tensor] = {}

    def hook_of(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[number] = first_tensor(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(ablating(backbone, layout, masks_of_rows(keep)))
        for number, layer in enumerate(layout.layers):
            module = backbone.get_submodule(layer.name)
            stack.callback(module.register_forward_hook(hook_of(number)).remove)
        backbone(images)
    return [outputs[number] for number in range(len(layout.layers))]


def _prove_joins(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """(f) Find where masks may join the growing pass."""
    if layout.gradients:
        for report in reports:
            report.proofs["join"] = Verdict(None, WITH_GRADIENTS)
        return
    try:
        joins = find_joins(backbone, layout).joins
    except (UsageError, RunError) as error:
        for report in reports:
            report.proofs["join"] = Verdict(False, str(error))
        return
    for report, join in zip(reports, joins, strict=True):
        report.join = join.module
        report.proofs["join"] = Verdict(True, join.module or "the whole model")


# -- the model's own weights -----------------------------------------------------------------------------------------
def _note_silent_heads(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """Note which heads have no effect with the model's own weights."""
    images = example_images(backbone, layout.input_size, 1, seed=5)
    with evaluating(backbone), trying(backbone, layout.gradients):
        for report, bench in zip(reports, layer_benches(backbone, layout, images)[0], strict=True):
            report.silent = prove_effect(bench)[1]


def _notes(layout: HeadLayout, reports: tuple[LayerReport, ...]) -> list[str]:
    """Return what a user should know beside the proofs, a sentence each."""
    notes = []
    unknown = sorted({report.layer.attention_class for report in reports if not report.layer.known})
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: not in headprobe's table; reached by the default rule, which the proofs judge"
        )

    for attention_class, site in {report.layer.attention_class: report.layer.site for report in reports}.items():
        name = attention_class.rpartition(".")[2]
        if site.head_is:
            notes.append(f"{name}: a head is {site.head_is}")
        if site.also:
            notes.append(f"{name}: a head's slot also holds {site.also}; masked is {_masked_is(layout)}")
        if site.cascades:
            notes.append(f"{name}: the next head of a layer reads a head's output too; masked is {_masked_is(layout)}")

    if layout.headless:
        notes.append(
            f"{len(layout.headless)} modules compute attention without heads, which no mask reaches, "
            f"the first is {layout.headless[0]}"
        )
    silent = [f"{number}.{head}" for number, report in enumerate(reports) for head in report.silent]
    if silent:
        notes.append(
            f"with the model's own weights the projection of {counted(len(silent), 'head')} is zero: "
            f"{' '.join(silent[:20])}"
        )
    whole = [str(number) for number, report in enumerate(reports) if report.join == ""]
    if whole:
        notes.append(f"masks of layers {', '.join(whole)} join at the whole model's input: no work is shared there")
    return notes


def _quantised(backbone: nn.Module) -> list[str]:
    """Return a note on weights that cannot be perturbed."""
    kinds = [type(weight.data).__name__ for weight in backbone.parameters() if not is_plain(weight)]
    if not kinds:
        return []
    return [f"{counted(len(kinds), 'weight')} of the class {kinds[0]} (quantised) could not be perturbed: tried as is"]


def _masked_is(layout: HeadLayout) -> str:
    at_operator = any(layer.masked_at_operator for layer in layout.layers)
    return "what the head attended to alone" if at_operator else "the whole slot"
