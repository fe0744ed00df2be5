"""Proves that masks take effect on a given model, layer by layer and proof by proof.

(a) `keep`: a mask that keeps every head leaves the output equal bit for bit. (b) `operator`: masking heads equals
zeroing their slice of the attention operator's own output; `columns`: where nothing but linear code stands between, it
equals zeroing their columns of the output projection's weights. (c) `effect`: every head's mask changes the output, or
its projection is zero. (d) `once`: every hook fires exactly once per forward pass and none is left afterwards. (e)
`rows`: rows with different masks in one batch equal separate runs, windows included. (f) `join`: masks that join the
growing pass at this layer give the logits of plain forward passes. (g) `map`: the captured attention weights, applied
to the values, give the operator's own output.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import ablating, masked_logits, masks_of_rows
from headprobe.backbone.bench import LayerBench, first_tensor, layer_benches
from headprobe.backbone.heads import AttentionLayer, HeadLayout, Semantics, find_heads
from headprobe.backbone.joins import agree, find_joins, trial_masks
from headprobe.backbone.perturbed import perturbed
from headprobe.backbone.trace import evaluating, example_images
from headprobe.errors import RunError, UsageError

PROOFS = ("keep", "operator", "columns", "effect", "once", "rows", "join", "map")
"""In the order of the table; what they say is in the module's docstring and in docs/heads.md."""

MAP_TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, between recomputed attention and the operator's own output."""

ROWS_TOLERANCE = 1e-4
"""The same between a batch and separate runs; a mask in a wrong row changes some tenths of the output."""


@dataclass(frozen=True)
class Verdict:
    """What came of one proof of one layer.

    Attributes:
        passed: None where the proof does not apply.
        detail: The size of the difference, the heads concerned, or why it does not apply.
    """

    passed: bool | None
    detail: str = ""


@dataclass
class LayerReport:
    """One attention layer and its proofs.

    Attributes:
        layer: The layer.
        proofs: Verdicts by name, in the order of `PROOFS`.
        join: Qualified name of the module at whose input its masks join the growing pass, empty for the whole model;
            None where they cannot.
        silent: Heads whose projection is zero, so that masking them changes nothing.
    """

    layer: AttentionLayer
    proofs: dict[str, Verdict] = field(default_factory=dict)
    join: str | None = None
    silent: list[int] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no proof failed."""
        return all(verdict.passed is not False for verdict in self.proofs.values())


@dataclass(frozen=True)
class CheckReport:
    """What `check` found out about a model.

    Attributes:
        model: Its name.
        input_size: `(channels, height, width)` of the images it was tried on.
        layers: A report per attention layer, in execution order.
        notes: What else a user must know.
    """

    model: str
    input_size: tuple[int, int, int]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every proof of every layer passed."""
        return all(report.passed for report in self.layers)

    @property
    def failures(self) -> list[str]:
        """One line per failed proof: layer, proof, detail."""
        return [
            f"{report.layer.name}: {name}: {verdict.detail}"
            for report in self.layers
            for name, verdict in report.proofs.items()
            if verdict.passed is False
        ]


def check_backbone(
    backbone: nn.Module,
    input_size: tuple[int, int, int],
    model: str,
    semantics: Semantics = "slot",
    own_weights: bool = True,
) -> CheckReport:
    """Find the heads of a model and prove that masks of them take effect.

    The proofs run in float32 on a copy whose parameters are all perturbed: at initialisation some projections are zero
    and would hide errors. Whether each head has an effect is then asked of the model's own weights too.

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
    tried = perturbed(deepcopy(backbone).float())
    reports = tuple(LayerReport(layer) for layer in layout.layers)
    images = example_images(tried, input_size, 2, seed=2)
    with evaluating(tried), torch.inference_mode():
        for report, bench in zip(reports, layer_benches(tried, layout, images), strict=True):
            _prove_alone(report, bench)
        _prove_once(tried, layout, reports, images)
        _prove_rows(tried, layout, reports)
    _prove_joins(tried, layout, reports)
    if own_weights:
        _note_silent_heads(backbone, layout, reports)
    for report in reports:
        report.proofs = {name: report.proofs[name] for name in PROOFS}
    return CheckReport(model, input_size, reports, tuple(_notes(layout, reports)))


def prove_masks(backbone: nn.Module, layout: HeadLayout) -> None:
    """Run the cheap proofs on noise and the model's own weights: at the start of every run.

    Raises:
        UsageError: A proof fails; the model must not be run under masks.
    """
    images = example_images(backbone, layout.input_size, 2, seed=2)
    keep = trial_masks(layout, images.device, seed=2)[0]
    with evaluating(backbone), torch.inference_mode():
        plain: Tensor = backbone(images)
        if not torch.equal(masked_logits(backbone, layout, images, torch.ones_like(keep)), plain):
            raise UsageError(f"model {layout.model!r}: a mask that keeps every head changes the logits")
        if agree(masked_logits(backbone, layout, images, keep), plain):
            warnings.warn(
                f"masking half of the heads of {layout.model!r} changes no logit; are its weights trained?",
                stacklevel=2,
            )
        for number, bench in enumerate(layer_benches(backbone, layout, images)):
            kept = [keep[number, : bench.layer.heads]]
            for name, verdict in {"operator": _operator(bench, kept), "columns": _columns(bench, kept)}.items():
                if verdict.passed is False:
                    raise UsageError(
                        f"model {layout.model!r}: masking heads of {bench.layer.name!r} "
                        f"({bench.layer.attention_class}) differs from zeroing them: {name}: {verdict.detail}; its "
                        "heads are laid out in a way headprobe does not know"
                    )
        if not torch.equal(backbone(images), plain):
            raise UsageError(
                f"model {layout.model!r} is not the same after masking: it keeps state between forward passes"
            )


# -- one layer alone -------------------------------------------------------------------------------------------------


def _prove_alone(report: LayerReport, bench: LayerBench) -> None:
    """Run the proofs that need no other layer."""
    subsets = telling_subsets(bench.layer.heads, _device(bench))
    for name, proof in {"keep": _keep, "operator": _operator, "columns": _columns}.items():
        report.proofs[name] = proof(bench, subsets)
    report.proofs["effect"], _ = _effect(bench)
    report.proofs["map"] = _map(bench)


def telling_subsets(heads: int, device: torch.device) -> list[Tensor]:
    """Return sets of heads to keep, `[heads]` bool each, in which no two heads are always masked together.

    Set b masks the heads whose number plus one has bit b: every head is masked in one at least.
    """
    numbers = torch.arange(1, heads + 1, device=device)
    return [(numbers >> bit) % 2 == 0 for bit in range(heads.bit_length())]


def _device(bench: LayerBench) -> torch.device:
    return next(value for value in (*bench.args, *bench.kwargs.values()) if isinstance(value, Tensor)).device


def _keep(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(a) Keep every head, with the fill really run."""
    plain = bench.output()
    kept = bench.masked(torch.ones_like(subsets[0])[None])
    same = torch.equal(kept, plain)
    return Verdict(same, "" if same else f"a mask that keeps every head changes the output by {_worst(kept, plain)}")


def _operator(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(b) Zero the heads in the operator's own output, or in what it is given where that is how they are masked."""
    if bench.layer.operator is None:
        return Verdict(False, "its attention operator was not seen: no fused call and no matrix product")
    if bench.layer.ambiguous and not bench.layer.masked_at_operator:
        return _own_slots(bench)
    oracle = bench.operands_zeroed if bench.layer.masked_at_operator else bench.operator_zeroed
    try:
        return _compared([(bench.masked(keep[None]), oracle(keep[None])) for keep in subsets], "zeroing the operator")
    except (RuntimeError, IndexError, ValueError) as error:  # what torch raises where no axis is that of the heads
        return Verdict(False, f"the operator's output is not that of {bench.layer.heads} heads ({_first_line(error)})")


def _own_slots(bench: LayerBench) -> Verdict:
    """(b) Where a slot holds more than the operator's output: what a head attended to is in its own slot alone."""
    plain = bench.heads_out()
    for head in range(bench.layer.heads):
        keep = torch.ones(1, bench.layer.heads, dtype=torch.bool, device=plain.device)
        keep[0, head] = False
        changed = [slot for slot in range(bench.layer.heads) if _differs(bench.heads_out(keep), plain, slot)]
        allowed = range(head, bench.layer.heads) if bench.layer.site.cascades else [head]
        if head not in changed or not set(changed) <= set(allowed):
            return Verdict(False, f"what head {head} attended to is in the slots {changed}")
    return Verdict(True, "in its own slot")


def _differs(one: Tensor, other: Tensor, slot: int) -> bool:
    return not torch.equal(one[:, :, slot], other[:, :, slot])


def _columns(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(b) Zero the heads' columns of the output projection."""
    if bench.layer.inner_norm:
        return Verdict(None, "a norm over all heads stands before the projection")
    if not bench.layer.site.columns:
        return Verdict(None, "the projection is in the block around, behind a norm and an activation")
    if bench.projection is None:
        return Verdict(None, "there is no projection")
    pairs = [(bench.slots_masked(keep[None]), bench.columns_zeroed(keep)) for keep in subsets]
    return _compared(pairs, "zeroing the columns")


def _effect(bench: LayerBench) -> tuple[Verdict, list[int]]:
    """(c) Mask each head alone; return the verdict and the heads without effect whose projection is zero."""
    plain = bench.output()
    heads = bench.layer.heads
    one = torch.eye(heads, dtype=torch.bool, device=plain.device)
    idle = [head for head in range(heads) if torch.equal(bench.masked(~one[head][None]), plain)]
    silent = [head for head in idle if head in bench.silent_heads()]
    if len(idle) > len(silent):
        return Verdict(False, f"masking head {[head for head in idle if head not in silent]} changes nothing"), silent
    return Verdict(True, f"the projection of {silent} is zero" if silent else ""), silent


def _map(bench: LayerBench) -> Verdict:
    """(g) Apply the captured weights to the values."""
    if bench.layer.site.maps == "none":
        return Verdict(None, bench.layer.site.why)
    applied = bench.applied()
    if not applied:
        return Verdict(False, "its attention weights were not seen")
    worst = 0.0
    for part in applied:
        weights, _ = part.attention.weights(slice(None), slice(None))
        found = weights @ part.values.to(weights.dtype)
        if found.shape != part.outputs.shape:
            return Verdict(False, "the captured weights do not fit the values")
        scale = float(part.outputs.abs().max().clamp(min=1e-12))
        worst = max(worst, float((found - part.outputs).abs().max()) / scale)
    if worst <= MAP_TOLERANCE:
        return Verdict(True, f"{worst:.0e}")
    return Verdict(False, f"weights @ values differ from the heads' output by {worst:.1g} of it")


def _compared(pairs: list[tuple[Tensor, Tensor]], to: str) -> Verdict:
    """Compare outputs with what they are to be, relative to the largest."""
    worst = max(_relative(found, expected) for found, expected in pairs)
    passed = all(agree(found, expected) for found, expected in pairs)
    return Verdict(passed, f"{worst:.0e}" if passed else f"masking differs from {to} by {worst:.1g} of the output")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max()) / float(expected.abs().max().clamp(min=1e-12))


def _worst(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max()):.1g}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:120]


# -- the whole model -------------------------------------------------------------------------------------------------


def _prove_once(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...], images: Tensor) -> None:
    """(d) Count the hooks that fire in one forward pass, and those that are left afterwards."""
    before = _hooks(backbone)
    keep = trial_masks(layout, images.device, seed=3)[0]
    with ablating(backbone, layout, masks_of_rows(keep.expand(len(images), *keep.shape))) as count:
        backbone(images)
        fired = list(count.fired)
    left = _hooks(backbone) != before
    for report, times in zip(reports, fired, strict=True):
        detail = f"fired {times} times in one forward pass" if times != 1 else "hooks are left behind" if left else ""
        report.proofs["once"] = Verdict(not detail, detail)


def _hooks(backbone: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules())


def _prove_rows(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """(e) Run three images with masks of their own in one batch, and one by one.

    Each layer's output is compared. Behind the first layer that fails nothing can be said of the others.
    """
    images = example_images(backbone, layout.input_size, 3, seed=4)
    keep = trial_masks(layout, images.device, seed=4)[[0, len(layout.layers) // 2, -1]]
    everything = torch.ones_like(keep)
    plain, masked = (_outputs(backbone, layout, images, mask) for mask in (everything, keep))
    plain_alone, masked_alone = (
        [_outputs(backbone, layout, images[row : row + 1], mask[row : row + 1]) for row in range(3)]
        for mask in (everything, keep)
    )
    failed = ""
    for number, report in enumerate(reports):
        together, alone = masked[number], torch.cat([outputs[number] for outputs in masked_alone])
        # another batch shape rounds otherwise, and depth carries that on: as far as it does without masks, and more
        noise = _relative(torch.cat([outputs[number] for outputs in plain_alone]), plain[number])
        differs = _relative(alone, together) if alone.shape == together.shape else float("inf")
        if failed:
            report.proofs["rows"] = Verdict(None, f"not tried: it comes after {failed}")
        elif differs <= max(ROWS_TOLERANCE, 10 * noise) and noise < 1e-2:
            report.proofs["rows"] = Verdict(True, f"{differs:.0e}")
        else:
            failed = report.layer.name
            sizes = f"{differs:.1g}, without masks {noise:.1g}"
            report.proofs["rows"] = Verdict(False, f"a batch with three masks differs from separate runs by {sizes}")


def _outputs(backbone: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor) -> list[Tensor]:
    """Return every attention module's output in a forward pass in which each image has its own mask."""
    outputs: dict[int, Tensor] = {}

    def hook_of(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[number] = first_tensor(output)

        return hook

    with ablating(backbone, layout, masks_of_rows(keep)):
        handles = [
            backbone.get_submodule(layer.name).register_forward_hook(hook_of(number))
            for number, layer in enumerate(layout.layers)
        ]
        try:
            backbone(images)
        finally:
            for handle in handles:
                handle.remove()
    return [outputs[number] for number in range(len(layout.layers))]


def _prove_joins(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """(f) Find where masks may join the growing pass."""
    try:
        joins = find_joins(backbone, layout)
    except (UsageError, RunError) as error:
        for report in reports:
            report.proofs["join"] = Verdict(False, str(error))
        return
    for report, join in zip(reports, joins, strict=True):
        report.join = join.module
        report.proofs["join"] = Verdict(True, join.module or "the whole model")


# -- the model's own weights -----------------------------------------------------------------------------------------


def _note_silent_heads(backbone: nn.Module, layout: HeadLayout, reports: tuple[LayerReport, ...]) -> None:
    """Note which heads have no effect with the weights that the model has."""
    images = example_images(backbone, layout.input_size, 1, seed=5)
    with evaluating(backbone), torch.inference_mode():
        for report, bench in zip(reports, layer_benches(backbone, layout, images), strict=True):
            report.silent = _effect(bench)[1]


def _notes(layout: HeadLayout, reports: tuple[LayerReport, ...]) -> list[str]:
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
            f"with the model's own weights the projection of {len(silent)} heads is zero: {' '.join(silent[:20])}"
        )
    whole = [str(number) for number, report in enumerate(reports) if report.join == ""]
    if whole:
        notes.append(f"masks of layers {', '.join(whole)} join at the whole model's input: no work is shared there")
    return notes


def _masked_is(layout: HeadLayout) -> str:
    return "the whole slot" if layout.layers[0].semantics == "slot" else "what the head attended to alone"
