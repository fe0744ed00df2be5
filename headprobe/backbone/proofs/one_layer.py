"""The proofs of one attention layer alone, and the cheap ones at the start of every run.

What each proves is in the docstring of `headprobe.backbone.proofs.check`.
"""

import warnings

import torch
from torch import Tensor, nn

from headprobe.backbone.growing.trials import trial_masks
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.proofs.layer_alone import LayerBench, layer_benches
from headprobe.backbone.proofs.report import LayerReport, Verdict
from headprobe.backbone.sandbox import agree, evaluating, example_images, relative, trying
from headprobe.errors import HeadprobeWarning, UsageError
from headprobe.text import first_line

MAP_TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, between recomputed attention and the operator's own output."""


def prove_masks(backbone: nn.Module, layout: HeadLayout) -> None:
    """Run the cheap proofs, as every run does at its start: on noise, with the model's own weights.

    Raises:
        UsageError: A proof fails; the model must not be run under masks.
    """
    images = example_images(backbone, layout.input_size, 2, seed=2)
    keep = trial_masks(layout, images.device, seed=2)[0]  # [layers, max heads]
    with evaluating(backbone), trying(backbone, layout.gradients):
        # the last pass, which nothing watches, must give the same
        benches, plain = layer_benches(backbone, layout, images)
        if not bool(plain.isfinite().all()):
            raise UsageError(
                f"model {layout.model!r} gives NaN or infinite logits on noise: nothing can be proven on it"
            )

        # whole model: a mask of no head changes nothing, a mask of many heads something
        if not torch.equal(masked_logits(backbone, layout, images, torch.ones_like(keep)), plain):
            raise UsageError(f"model {layout.model!r}: a mask that keeps every head changes the logits")
        if agree(masked_logits(backbone, layout, images, keep), plain):
            warnings.warn(
                f"masking half of the heads of {layout.model!r} changes no logit, as where its last "
                "layers are zero, which they often are before training",
                HeadprobeWarning,
                stacklevel=2,
            )
        if layout.headless:
            warnings.warn(
                f"{len(layout.headless)} modules of {layout.model!r} compute attention without heads, which no mask "
                f"reaches; the first is {layout.headless[0]}",
                HeadprobeWarning,
                stacklevel=2,
            )

        # layer by layer: masking is zeroing
        for bench in benches:
            _refuse_unlike(bench, layout.model)
        if not torch.equal(backbone(images), plain):
            raise UsageError(
                f"model {layout.model!r} is not the same after masking: it keeps state between forward passes"
            )


def _refuse_unlike(bench: LayerBench, model: str) -> None:
    """Raise a UsageError where masking heads of a layer is not zeroing them."""
    subsets = telling_subsets(bench)
    for name, proof in {"operator": prove_operator, "columns": prove_columns}.items():
        verdict = proof(bench, subsets)
        if verdict.passed is False:
            layer = bench.layer
            raise UsageError(
                f"model {model!r}: masking heads of {layer.name!r} ({layer.attention_class}) is not zeroing them: "
                f"{name}: {verdict.detail}; its heads are laid out in a way that headprobe does not support"
            )


def prove_alone(report: LayerReport, bench: LayerBench) -> None:
    """Run the proofs that need no other layer."""
    subsets = telling_subsets(bench)
    for name, proof in {"keep": prove_keep, "operator": prove_operator, "columns": prove_columns}.items():
        report.proofs[name] = proof(bench, subsets)
    report.proofs["effect"], _ = prove_effect(bench)
    report.proofs["map"] = prove_map(bench)


def telling_subsets(bench: LayerBench) -> list[Tensor]:
    """Return sets of heads to keep, `[heads]` bool each, in which no two heads are always masked together.

    Set b masks every head with bit b in its number plus one, so each head is masked in at least one set, and two heads
    differ in at least one.
    """
    heads = bench.layer.heads
    numbers = torch.arange(1, heads + 1, device=_device(bench))
    return [(numbers >> bit) % 2 == 0 for bit in range(heads.bit_length())]


def _device(bench: LayerBench) -> torch.device:
    return next(value for value in (*bench.args, *bench.kwargs.values()) if isinstance(value, Tensor)).device


def prove_keep(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(a) Keep every head, by a mask that really runs the fill."""
    plain = bench.output()
    kept = bench.masked(torch.ones_like(subsets[0])[None])
    same = torch.equal(kept, plain)
    return Verdict(same, "" if same else f"a mask that keeps every head changes the output by {_worst(kept, plain)}")


def prove_operator(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(b) Zero the heads in the operator's own output; in its operands where its output is masked itself."""
    if bench.layer.operator is None:
        return Verdict(False, "its attention operator was not found: no fused call and no matrix product")
    oracle = bench.operands_zeroed if bench.layer.masked_at_operator else bench.operator_zeroed
    try:
        if bench.layer.ambiguous and not bench.layer.masked_at_operator:
            return _own_slots(bench)
        pairs = [(bench.masked(keep[None]), oracle(keep[None])) for keep in subsets]
        return _compared(pairs, "zeroing the operator")
    except (RuntimeError, IndexError, ValueError) as error:  # what torch raises where no axis has the heads
        return Verdict(False, f"the operator's output is not that of {bench.layer.heads} heads ({first_line(error)})")


def _own_slots(bench: LayerBench) -> Verdict:
    """(b) Where a slot holds more than the operator's output: a head's attention reaches its own slot alone."""
    plain = bench.heads_out()  # [rows, tokens, heads, head_dim]
    for head in range(bench.layer.heads):
        keep = torch.ones(1, bench.layer.heads, dtype=torch.bool, device=plain.device)
        keep[0, head] = False

        # masking its slot empties that slot and no other
        masked = bench.slots(keep)
        emptied = [slot for slot in range(bench.layer.heads) if _differs(masked, plain, slot)]
        if emptied != [head] or bool(masked[:, :, head].any()):
            return Verdict(False, f"masking head {head} changes the slots {emptied}")

        # zeroing it in the operator changes that slot, and in a cascade the slots of later heads
        zeroed = bench.heads_out(keep)
        changed = [slot for slot in range(bench.layer.heads) if _differs(zeroed, plain, slot)]
        allowed = range(head, bench.layer.heads) if bench.layer.site.cascades else [head]
        if head not in changed or not set(changed) <= set(allowed):
            return Verdict(False, f"what head {head} attended to is in the slots {changed}")
    return Verdict(True, "in its own slot")


def _differs(one: Tensor, other: Tensor, slot: int) -> bool:
    return not torch.equal(one[:, :, slot], other[:, :, slot])


def prove_columns(bench: LayerBench, subsets: list[Tensor]) -> Verdict:
    """(b) Zero the heads' columns of the output projection."""
    if bench.layer.inner_norm:
        return Verdict(None, "a norm over all heads stands before the projection")
    if not bench.layer.site.columns:
        return Verdict(None, "the projection is in the block around, behind a norm and an activation")
    if bench.projection is None:
        return Verdict(None, "there is no projection")
    pairs = [(bench.slots_masked(keep[None]), bench.columns_zeroed(keep)) for keep in subsets]
    return _compared(pairs, "zeroing the columns")


def prove_effect(bench: LayerBench) -> tuple[Verdict, list[int]]:
    """(c) Mask each head alone; return the verdict and the heads without effect because their projection is zero.

    A head with an output of zeros, behind an activation, changes nothing either; zeroing it in the operator must agree.
    """
    plain = bench.output()
    keep = ~torch.eye(bench.layer.heads, dtype=torch.bool, device=plain.device)[:, None]  # [head, 1, heads]

    idle = [head for head, kept in enumerate(keep) if torch.equal(bench.masked(kept), plain)]
    silent = [head for head in idle if head in bench.silent_heads()]
    dead = [head for head in idle if head not in silent and _is_dead(bench, keep[head], plain)]
    ignored = [head for head in idle if head not in silent + dead]
    if ignored:
        return Verdict(False, f"masking head {ignored} changes nothing"), silent
    details = [f"the projection of {silent} is zero"] * bool(silent) + [f"the output of {dead} is zero"] * bool(dead)
    return Verdict(True, "; ".join(details)), silent


def _is_dead(bench: LayerBench, keep: Tensor, plain: Tensor) -> bool:
    """Return whether zeroing a head in the operator's own output changes nothing either."""
    return bench.layer.operator is not None and torch.equal(bench.operator_zeroed(keep), plain)


def prove_map(bench: LayerBench) -> Verdict:
    """(g) Apply the captured weights to the values."""
    if bench.layer.site.maps == "none":
        return Verdict(None, bench.layer.site.why)
    applied = bench.applied()
    if not applied:
        return Verdict(
            False,
            "its attention weights were not captured: no softmax and no fused attention was seen, and weights made "
            "otherwise (sigmoid, exp and a division) are not read (docs/heads.md)",
        )
    worst = 0.0
    for part in applied:
        weights = part.attention.weights(slice(None), slice(None)).detach()  # [rows, heads, queries, keys]
        rows, heads, queries, keys = weights.shape
        if part.values.shape[:3] != (rows, heads, keys) or part.outputs.shape[:3] != (rows, heads, queries):
            return Verdict(False, "the captured weights do not fit the values")

        found, outputs = weights @ part.values.detach().to(weights.dtype), part.outputs.detach()
        worst = max(worst, relative(found, outputs))  # of [rows, heads, queries, head_dim]
    if worst <= MAP_TOLERANCE:
        return Verdict(True, f"{worst:.0e}")
    return Verdict(False, f"weights @ values differ from the heads' output by {worst:.1g} of it")


def _compared(pairs: list[tuple[Tensor, Tensor]], to: str) -> Verdict:
    """Compare outputs with the expected ones, relative to the largest number."""
    worst = max(relative(found, expected) for found, expected in pairs)
    passed = all(agree(found, expected) for found, expected in pairs)
    return Verdict(passed, f"{worst:.0e}" if passed else f"masking differs from {to} by {worst:.1g} of the output")


def _worst(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max()):.1g}"
