"""A broken adapter must not get past `check`: things are broken one at a time, and the proof that fails is named."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from headprobe.backbone.capture import operator_record as seen_attention
from headprobe.backbone.capture.layer_record import FusedAttention, PlainAttention
from headprobe.backbone.growing import growing_pass as growing
from headprobe.backbone.growing import joins
from headprobe.backbone.growing import row_plan as arguments
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadChannels, HeadLayout
from headprobe.backbone.heads.sites import SITES
from headprobe.backbone.masking import ablation, replacement
from headprobe.backbone.masking.replacement import LayerSlots, Replacement, replace_heads
from headprobe.backbone.proofs import check
from headprobe.backbone.proofs import layer_alone as bench
from headprobe.backbone.proofs.check import check_backbone
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.proofs.report import PROOFS, CheckReport, Verdict
from headprobe.errors import RunError, UsageError
from tests.families import ATTENTION, COAT, EVA, GEMMA, MVIT, REPRESENTATIVES, build

NEST = "timm.models.nest.Attention"
SAM = "timm.models.vision_transformer_sam.Attention"
SWIN = "timm.models.swin_transformer.WindowAttention"
CAIT = "timm.models.cait.TalkingHeadAttn"
MSRA = "timm.models.efficientvit_msra.CascadedGroupAttention"
FORMER = ("timm.models.efficientformer_v2.Attention2d", "timm.models.efficientformer_v2.Attention2dDownsample")
AMBIGUOUS = (MVIT, COAT, (MSRA,), FORMER)
SIZE = (3, 32, 32)
REPLACE = replace_heads

NO_COLUMNS = {
    "vit_scale_norm": "a norm over all heads stands before the projection",
    "eva_scale_norm": "a norm over all heads stands before the projection",
    "botnet": "the projection is in the block around, behind a norm and an activation",
    "halonet": "the projection is in the block around, behind a norm and an activation",
    "lambda_resnet": "the projection is in the block around, behind a norm and an activation",
    "lambda_resnet_table": "the projection is in the block around, behind a norm and an activation",
    "lowformer": "there is no projection",  # nn.Identity: an upsampling convolution follows
    "cpubone": "there is no projection",
}
NO_MAP = ("coat", "coat_lite", "efficientvit_mit", "efficientvit_mit_large", "lambda_resnet", "lambda_resnet_table")


def checked(key: str, model: Any = None, **options: Any) -> CheckReport:
    representative = REPRESENTATIVES[key]
    return check_backbone(build(key) if model is None else model, representative.input_size, key, **options)


def failed(report: CheckReport) -> dict[str, list[int]]:
    """Numbers of the layers at which each proof fails."""
    found = {
        proof: [number for number, one in enumerate(report.layers) if one.proofs[proof].passed is False]
        for proof in PROOFS
    }
    return {proof: layers for proof, layers in found.items() if layers}


def proven(key: str) -> None:
    """Run the cheap proofs."""
    model = build(key)
    prove_masks(model, find_heads(model, REPRESENTATIVES[key].input_size, key))


def half(module: Any) -> int:
    return max(1, int(module.num_heads) // 2)


def broken_site(monkeypatch: pytest.MonkeyPatch, path: str, **changes: Any) -> None:
    monkeypatch.setitem(SITES, path, replace(SITES[path], **changes))


# -- nothing is broken -----------------------------------------------------------------------------------------------


@pytest.mark.any_timm
@pytest.mark.parametrize("key", REPRESENTATIVES)
def test_every_representative_passes_every_proof(key: str) -> None:
    report = checked(key)
    assert report.failures == []
    assert report.passed
    assert tuple(one.layer.heads for one in report.layers) == REPRESENTATIVES[key].heads
    assert {one.layer.attention_class for one in report.layers} == set(REPRESENTATIVES[key].classes)
    for one in report.layers:
        assert tuple(one.proofs) == PROOFS
        assert one.layer.known
        assert one.join is not None
        assert one.silent == []
        reasons = {proof: verdict.detail for proof, verdict in one.proofs.items() if verdict.passed is None}
        assert reasons.get("columns") == NO_COLUMNS.get(key)
        assert set(reasons) == {proof for proof, keys in {"columns": NO_COLUMNS, "map": NO_MAP}.items() if key in keys}
        assert all(reasons.values())


@pytest.mark.parametrize("key", [key for key in REPRESENTATIVES if REPRESENTATIVES[key].classes in AMBIGUOUS])
def test_the_other_semantics_of_ambiguous_heads_passes_every_proof_too(key: str) -> None:
    report = checked(key, semantics="attention")
    assert report.failures == []
    assert {one.layer.semantics for one in report.layers} == {"attention"}
    assert any("masked is what the head attended to alone" in note for note in report.notes)


@pytest.mark.parametrize("key", ["vit", "swin", "levit", "efficientvit_msra"])
def test_the_model_is_left_as_it_was(key: str) -> None:
    model = build(key).train()
    next(model.children()).eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, hooks = [part.training for part in model.modules()], hooks_of(model)
    assert checked(key, model).passed
    prove_masks(model, find_heads(model, REPRESENTATIVES[key].input_size, key))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert calls  # the user's own hook went on working
    assert not torch.overrides._get_current_function_mode_stack()


def hooks_of(model: nn.Module) -> list[tuple[list[int], list[int]]]:
    return [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in model.modules()]


# -- (a) keep --------------------------------------------------------------------------------------------------------


def test_a_mask_that_touches_kept_heads_in_the_last_bits_fails_keep_at_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touching(slots: LayerSlots, replacements: Sequence[Replacement]) -> Tensor:
        scale = 1 + 2**-20 if slots.channels.heads == 4 else 1.0
        return REPLACE(slots, replacements) * scale

    masks_by(monkeypatch, touching)
    report = checked("pit")
    assert failed(report) == {"keep": [1]}  # 2, 4 and 8 heads
    assert report.failures[0].startswith("transformers.1.blocks.0.attn: keep: a mask that keeps every head changes")


# -- (b) operator and columns ----------------------------------------------------------------------------------------


def masks_by(monkeypatch: pytest.MonkeyPatch, fill: Callable[[LayerSlots, Sequence[Replacement]], Tensor]) -> None:
    """Break what masks heads, wherever it is used."""
    for module in (ablation, bench):
        monkeypatch.setattr(module, "replace_heads", fill, raising=False)


@dataclass(frozen=True)
class Broken:
    """A wrong entry of the table, and which layers fail which proofs by it."""

    key: str
    path: str
    changes: dict[str, Any]
    operator: list[int]
    columns: list[int] = field(default_factory=list)
    map: list[int] = field(default_factory=list)
    says: str = "masking differs from zeroing the operator"


BROKEN = {
    "wrong axis": Broken("vit_mean", ATTENTION, {"axis": 1}, [0, 1], columns=[0, 1]),
    "interleaved taken as contiguous": Broken("nest", NEST, {"interleaved": False}, list(range(6))),
    "contiguous taken as interleaved": Broken("vit", ATTENTION, {"interleaved": True}, [0, 1]),
    "contiguous taken as interleaved, in windows": Broken("swin", SWIN, {"interleaved": True}, [0, 1, 2, 3]),
    "contiguous taken as interleaved, slots": Broken(
        "coat_lite", COAT[0], {"interleaved": True}, [0, 1, 2, 3], says="what head 0 attended to is in the slots"
    ),
    "hook after the inner norm": Broken("vit_scale_norm", ATTENTION, {"points": ("proj",)}, [0, 1]),
    "hook after the inner norm, rotary": Broken("eva_scale_norm", EVA, {"points": ("proj",)}, [0, 1]),
    "half the heads": Broken("vit", ATTENTION, {"heads": half}, [0, 1], says="not that of 2 heads"),
    "half the heads of some layers": Broken(
        "twins", "timm.models.twins.LocallyGroupedAttn", {"heads": half}, [2, 4, 6], says="not that of 3 heads"
    ),
    "half the heads, mixed": Broken("cait", CAIT, {"heads": half}, [0, 1], says="not that of 2 heads"),
    "half the heads, merged into the rows": Broken("sam", SAM, {"heads": half}, [0, 1]),
    "half the heads, one call each": Broken(
        "efficientvit_msra", MSRA, {"heads": half}, [0, 1, 2, 3], map=[0, 1, 2, 3], says="not found"
    ),
    "twice the heads": Broken(
        "gemma", GEMMA[0], {"heads": lambda module: 2 * module.num_heads}, [0, 1], says="not that of 8 heads"
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_wrong_entry_of_the_table_fails_at_the_layers_of_its_class(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[how]
    broken_site(monkeypatch, broken.path, **broken.changes)
    report = checked(broken.key)
    expected = {"operator": broken.operator, "columns": broken.columns, "map": broken.map}
    assert failed(report) == {proof: layers for proof, layers in expected.items() if layers}
    assert broken.says in report.layers[broken.operator[0]].proofs["operator"].detail


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_on_a_wrong_entry_of_the_table_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BROKEN[how]
    broken_site(monkeypatch, broken.path, **broken.changes)
    model = build(broken.key)
    layout = find_heads(model, REPRESENTATIVES[broken.key].input_size, broken.key)
    where = rf"model '{broken.key}': masking heads of '{layout.layers[broken.operator[0]].name}' \({broken.path}\)"
    with pytest.raises(UsageError, match=where + " is not zeroing them: operator: .* does not support$"):
        prove_masks(model, layout)


def test_a_hook_before_the_operator_is_refused_since_attention_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_site(monkeypatch, ATTENTION, points=("qkv",))
    with pytest.raises(
        UsageError, match=r"computes attention in 'blocks\.0\.attn' .* in a way that headprobe cannot mask"
    ):
        checked("vit")


@pytest.mark.parametrize("key", ["visformer", "coatnet", "levit_conv", "lowformer_projected"])
def test_an_axis_that_heads_do_not_divide_is_refused_before_any_proof(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in REPRESENTATIVES[key].classes:
        broken_site(monkeypatch, path, axis=-1)
    with pytest.raises(UsageError, match=r"concatenates \d channels, which are not those of \d heads"):
        checked(key)


@pytest.mark.parametrize("key", ["vit", "swin", "nest", "botnet", "vit_scale_norm", "vit_parallel_fused"])
def test_heads_shifted_by_one_fail_the_operator_proof_at_every_layer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shift_heads(monkeypatch)
    assert failed(checked(key)) == {"operator": list(range(len(REPRESENTATIVES[key].heads)))}
    with pytest.raises(UsageError, match="is not zeroing them: operator"):
        proven(key)


@pytest.mark.parametrize("key", ["mvit", "coat_lite", "efficientformer_v2", "efficientvit_msra"])
def test_slots_shifted_by_one_fail_the_operator_proof(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shift_heads(monkeypatch)
    assert "operator" in failed(checked(key))


def shift_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask the head after the one that is asked for."""
    of_heads = HeadChannels.of_heads
    monkeypatch.setattr(HeadChannels, "of_heads", lambda self, chosen: of_heads(self, chosen.roll(1, -1)))


@pytest.mark.parametrize("key", ["mvit", "coat_lite", "efficientformer_v2"])
def test_too_few_slots_fail_the_operator_proof(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in REPRESENTATIVES[key].classes:
        broken_site(monkeypatch, path, heads=half)
    assert "operator" in failed(checked(key))


@pytest.mark.parametrize("key", ["vit", "sam", "lambda_resnet", "vit_scale_norm"])
def test_a_mask_that_is_ignored_fails_every_proof_of_its_effect(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks_by(monkeypatch, lambda slots, _: slots.heads_out)
    everywhere = list(range(len(REPRESENTATIVES[key].heads)))
    expected = {"operator": everywhere, "columns": everywhere, "effect": everywhere}
    if key in NO_COLUMNS:
        del expected["columns"]
    assert failed(checked(key)) == expected
    with pytest.warns(UserWarning, match="changes no logit"), pytest.raises(UsageError, match="is not zeroing them"):
        proven(key)


@pytest.mark.parametrize("key", ["coat_lite", "efficientformer_v2", "efficientvit_msra"])
def test_a_mask_that_is_ignored_fails_columns_and_effect_where_slots_hold_more(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks_by(monkeypatch, lambda slots, _: slots.heads_out)
    found, everywhere = failed(checked(key)), list(range(len(REPRESENTATIVES[key].heads)))
    assert set(found) <= {"operator", "columns", "effect"}
    assert found["columns"] == found["effect"] == everywhere
    with pytest.warns(UserWarning, match="changes no logit"), pytest.raises(UsageError, match="is not zeroing them"):
        proven(key)


@pytest.mark.parametrize("key", ["vit", "coat_lite"])
def test_a_mask_that_a_run_ignores_is_caught(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "replace_heads", lambda slots, replacements: slots.heads_out)
    assert not checked(key).passed


def test_a_run_in_bfloat16_on_a_wrong_entry_of_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_site(monkeypatch, ATTENTION, points=("proj",))
    model = build("vit_scale_norm").to(torch.bfloat16)
    with pytest.raises(UsageError, match="is not zeroing them"):
        prove_masks(model, find_heads(model, (3, 64, 64), "vit"))


@pytest.mark.parametrize(
    ("key", "number"),
    [("tiny_vit", 1), ("tiny_vit", 2), ("mobilevit", 7), ("swin", 1), ("crossvit", 5), ("crossvit", 7)],
)
def test_a_run_is_refused_whichever_layer_is_wrong(key: str, number: int) -> None:
    model = build(key)
    layout = find_heads(model, REPRESENTATIVES[key].input_size, key)
    wrong = replace(layout.layers[number], channels=replace(layout.layers[number].channels, interleaved=True))
    layers = (*layout.layers[:number], wrong, *layout.layers[number + 1 :])
    with pytest.raises(UsageError, match="is not zeroing them"):
        prove_masks(model, replace(layout, layers=layers))


# -- (c) effect ------------------------------------------------------------------------------------------------------


def test_a_head_whose_mask_does_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_third(slots: LayerSlots, replacements: Sequence[Replacement]) -> Tensor:
        keep = slots.keep.clone()
        keep[:, 2] = True
        return REPLACE(replace(slots, keep=keep), replacements)

    masks_by(monkeypatch, without_the_third)
    report = checked("vit")
    assert failed(report) == {"operator": [0, 1], "columns": [0, 1], "effect": [0, 1]}
    assert report.layers[1].proofs["effect"] == Verdict(False, "masking head [2] changes nothing")


@pytest.mark.parametrize(("key", "name"), [("vit", "blocks.1.attn"), ("nest", "levels.0.transformer_encoder.1.attn")])
def test_a_head_whose_projection_is_zero_is_silent_and_no_failure(key: str, name: str) -> None:
    model, heads = build(key), REPRESENTATIVES[key].heads[1]
    weight = model.get_submodule(name).proj.weight
    size = weight.shape[1] // heads
    own = slice(2, None, heads) if key == "nest" else slice(2 * size, 3 * size)  # NesT: channel d * heads + head
    with torch.no_grad():
        weight[:, own] = 0
    report = checked(key, model)
    assert report.passed
    assert {number: one.silent for number, one in enumerate(report.layers) if one.silent} == {1: [2]}
    assert "with the model's own weights the projection of 1 head is zero: 1.2" in report.notes
    assert not any(one.silent for one in checked(key, model, own_weights=False).layers)


# -- (d) once --------------------------------------------------------------------------------------------------------


class Twice(Attention):  # type: ignore[misc]  # timm: untyped
    """Calls the module at its point a second time."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x, *args, **kwargs)
        self.norm(out)
        return out


class NotInBatches(Attention):  # type: ignore[misc]  # timm: untyped
    """Goes around the module at its point when there are several images."""

    norm: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        point = self.norm
        if len(x) > 1:
            self.norm = nn.Identity()
        try:
            out: Tensor = super().forward(x, *args, **kwargs)
        finally:
            self.norm = point
        return out


def with_second_attention(cls: type[nn.Module]) -> Any:
    model = build("vit")
    model.blocks[1].attn.__class__ = cls
    return model


def test_a_hook_that_fires_twice_fails_once_at_its_layer() -> None:
    report = checked("vit", with_second_attention(Twice))
    assert failed(report) == {"once": [1], "join": [0, 1]}
    assert report.layers[1].proofs["once"].detail == "fired 2 times in one forward pass"


def test_a_hook_that_does_not_fire_fails_once_at_its_layer() -> None:
    report = checked("vit", with_second_attention(NotInBatches))
    found = failed(report)
    assert found.pop("join") == [0, 1]
    assert found == {proof: [1] for proof in ("operator", "columns", "effect", "once", "rows")}
    assert report.layers[1].proofs["once"].detail == "fired 0 times in one forward pass"


@pytest.mark.parametrize("cls", [Twice, NotInBatches])
def test_a_run_whose_hooks_do_not_fire_once_is_refused(cls: type[nn.Module]) -> None:
    model = with_second_attention(cls)
    with pytest.raises(RunError, match=r"'blocks\.1\.attn' of 'vit' was applied [02] times in one forward pass"):
        prove_masks(model, find_heads(model, (3, 64, 64), "vit"))


def test_a_hook_that_is_left_behind_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ablating = ablation.ablating

    @contextmanager
    def leaving_one(backbone: nn.Module, layout: HeadLayout, keep: Any) -> Iterator[Any]:
        with ablating(backbone, layout, keep) as count:
            yield count
        backbone.get_submodule(layout.layers[0].point).register_forward_pre_hook(lambda *_: None)

    monkeypatch.setattr(check, "ablating", leaving_one)
    report = checked("vit")
    assert failed(report) == {"once": [0, 1]}
    assert report.layers[0].proofs["once"].detail == "hooks are left behind"


# -- (e) rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["swin", "sam", "tiny_vit", "maxvit"])
def test_masks_in_the_wrong_order_of_rows_fail_at_the_first_layer_with_windows(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alternating(values: Tensor, rows: int) -> Tensor:
        return values.repeat(rows // len(values), *[1] * (values.dim() - 1))

    monkeypatch.setattr(replacement, "by_row", alternating)
    report = checked(key)
    everywhere = list(range(len(REPRESENTATIVES[key].heads)))
    assert failed(report) == {"rows": [0], "join": everywhere}
    for one in report.layers[1:]:
        assert one.proofs["rows"] == Verdict(None, f"not tried: it comes after {report.layers[0].layer.name}")


class MixesImages(nn.Module):
    """Adds a share of the batch's mean to each image."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + self.share * out.mean(dim=0, keepdim=True)


def mixing(share: float) -> Any:
    model = build("vit")
    model.blocks[0].mlp = MixesImages(model.blocks[0].mlp, share)
    return model


def test_a_model_that_mixes_images_fails_rows_at_the_layer_behind() -> None:
    report = checked("vit", mixing(1.0))
    assert failed(report) == {"rows": [1], "join": [0, 1]}
    assert "a batch with three masks differs from separate runs" in report.layers[1].proofs["rows"].detail


# -- (f) join --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_a_model_that_mixes_images_a_little_is_refused_with_the_reason(share: float) -> None:
    report = checked("vit", mixing(share))
    assert failed(report) == {"join": [0, 1]}
    assert [one.join for one in report.layers] == [None, None]
    says = "model 'vit': rows of one batch influence each other: an image's logits change by"
    assert report.layers[0].proofs["join"].detail.startswith(says)


def test_a_model_in_bfloat16_that_mixes_images_is_refused() -> None:
    model = mixing(1.0).to(torch.bfloat16)
    with pytest.raises(UsageError, match="rows of one batch influence each other"):
        joins.find_joins(model, find_heads(model, (3, 64, 64), "vit"))


@pytest.mark.parametrize(
    ("key", "joined"),
    [
        ("vit", ["blocks.0", "blocks.1"]),  # the block's residual goes around the attention
        ("gemma", ["encoder", "encoder.blocks.1"]),
        ("tnt", ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]),
    ],
)
def test_masks_never_join_one_module_too_far_in(key: str, joined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in REPRESENTATIVES[key].classes:
        broken_site(monkeypatch, path, joins_itself=True)
    report = checked(key)
    assert report.failures == []
    assert [one.join for one in report.layers] == joined


def test_masks_join_nowhere_if_only_modules_too_far_in_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_site(monkeypatch, ATTENTION, joins_itself=True)
    candidates = joins._candidates
    monkeypatch.setattr(joins, "_candidates", lambda *args: candidates(*args)[:1])
    assert failed(checked("vit")) == {"join": [0, 1]}


def test_a_growing_pass_that_copies_the_wrong_rows_fails_join_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = arguments.grown

    def flipped(args: Any, kwargs: Any, batched: Any, images: int, copied: Any) -> Any:
        (first, *others), named = grown(args, kwargs, batched, images, copied)
        return (torch.cat([first[:images], first[images:].flip(0)]), *others), named

    monkeypatch.setattr(growing, "grown", flipped)
    assert failed(checked("vit")) == {"join": [0, 1]}


# -- (g) map ---------------------------------------------------------------------------------------------------------


def fused_by(monkeypatch: pytest.MonkeyPatch, **wrong: Callable[[FusedAttention], Any]) -> None:
    """Replace some of what is noted of each fused call."""

    def noted(*args: Any) -> FusedAttention:
        right = FusedAttention(*args)
        return replace(right, **{name: of(right) for name, of in wrong.items()})

    monkeypatch.setattr(seen_attention, "FusedAttention", noted)


@pytest.mark.parametrize("key", ["vit", "hiera", "gemma_grouped_query", "vit_differential"])
def test_a_wrong_scale_fails_map_at_every_layer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_by(monkeypatch, scale=lambda right: 1.1 * right.scale)
    assert failed(checked(key)) == {"map": list(range(len(REPRESENTATIVES[key].heads)))}


@pytest.mark.parametrize("key", ["beit", "relpos", "maxvit"])
def test_a_missing_bias_fails_map_at_every_layer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_by(monkeypatch, mask=lambda _: None)
    assert failed(checked(key)) == {"map": list(range(len(REPRESENTATIVES[key].heads)))}


def test_a_missing_shift_mask_fails_map_where_windows_are_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("swin")
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.fused_attn = True
        torch.nn.init.zeros_(block.attn.relative_position_bias_table)
    shifted = [number for number, one in enumerate(checked("swin", model).layers) if one.layer.shift != (0, 0)]
    assert shifted == [1, 3]

    def bias_alone(right: FusedAttention) -> Tensor | None:
        return None if right.mask is None else right.mask.clamp(min=-50)[:1]  # the first window meets no edge

    fused_by(monkeypatch, mask=bias_alone)
    assert failed(checked("swin", model)) == {"map": shifted}


@pytest.mark.parametrize(("key", "layers"), [("swin", [0, 1, 2, 3]), ("xcit", [0, 1]), ("convit", [0, 1, 2])])
def test_transposed_weights_fail_map_where_they_are_used(
    key: str, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_attention, "PlainAttention", lambda _, result: PlainAttention(None, result.mT))
    assert failed(checked(key)) == {"map": layers}


@pytest.mark.parametrize("key", ["levit", "levit_conv"])
def test_transposed_weights_fail_map_also_where_keys_are_not_queries(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_attention, "PlainAttention", lambda _, result: PlainAttention(None, result.mT))
    assert set(failed(checked(key))) == {"map"}


def test_heads_of_weights_in_another_order_fail_map(monkeypatch: pytest.MonkeyPatch) -> None:
    rolled = lambda _, result: PlainAttention(None, result.roll(1, 1))  # noqa: E731
    monkeypatch.setattr(seen_attention, "PlainAttention", rolled)
    assert failed(checked("levit")) == {"map": [0, 1, 2, 3, 4]}


# -- classes that the table does not know ----------------------------------------------------------------------------


class HomeMade(nn.Module):
    """Attention as anyone would write it."""

    def __init__(self, dim: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def together(self, heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(self.together(self.attend(query, key, value)))
        return out


class InPlainProducts(HomeMade):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1) @ value


class Interleaving(HomeMade):
    def together(self, heads: Tensor) -> Tensor:
        return heads.permute(0, 2, 3, 1).flatten(2)


class MixingHeads(HomeMade):
    """A norm over all heads, which is no module and so has no hook, comes before the projection."""

    def together(self, heads: Tensor) -> Tensor:
        return F.layer_norm(super().together(heads), (self.proj.in_features,))


class Nameless(nn.Module):
    """Attention without anything to tell it by."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def __init__(self) -> None:
        super().__init__()
        self.inner_maps, self.out = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inner_maps(x).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return out


class NamelessInPlainProducts(Nameless):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1) @ value


class Residual(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm(x))
        return out


class HomeMadeModel(nn.Module):
    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 8, 8)
        self.blocks = nn.Sequential(*map(Residual, attentions))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(x).flatten(2).mT).mean(dim=1))
        return out


def home_made(*classes: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return HomeMadeModel(*(cls() for cls in classes))


@pytest.mark.parametrize("cls", [HomeMade, InPlainProducts])
def test_an_unknown_class_in_the_usual_form_is_accepted_and_said_to_be_unknown(cls: type[nn.Module]) -> None:
    model = home_made(cls, cls)
    report = check_backbone(model, SIZE, "home-made")
    assert report.failures == []
    assert [one.layer.known for one in report.layers] == [False, False]
    assert [one.join for one in report.layers] == ["blocks.0", "blocks.1"]
    assert {verdict.passed for one in report.layers for verdict in one.proofs.values()} == {True}
    assert report.notes[0].startswith(f"{__name__}.{cls.__name__}: not in headprobe's table")
    prove_masks(model, find_heads(model, SIZE, "home-made"))


@pytest.mark.parametrize("cls", [Interleaving, MixingHeads])
def test_an_unknown_class_of_another_form_fails_and_is_not_run(cls: type[nn.Module]) -> None:
    model = home_made(HomeMade, cls)
    report = check_backbone(model, SIZE, "home-made")
    assert failed(report) == {"operator": [1]}
    assert not report.passed
    with pytest.raises(UsageError, match=rf"'blocks\.1\.attention' \(.*{cls.__name__}\) is not zeroing them"):
        prove_masks(model, find_heads(model, SIZE, "home-made"))


def test_attention_without_heads_to_be_found_is_refused() -> None:
    with pytest.raises(UsageError, match=r"attention in 'blocks\.0\.attention' .*Nameless.* headprobe cannot mask it"):
        check_backbone(home_made(Nameless), SIZE, "home-made")
    with pytest.raises(UsageError, match=r"attention in 'blocks\.1\.attention' .*Nameless.* headprobe cannot mask it"):
        check_backbone(home_made(HomeMade, Nameless), SIZE, "home-made")


def test_several_heads_in_plain_products_that_are_not_to_be_found_are_refused() -> None:
    with pytest.raises(UsageError, match=r"attention in 'blocks\.1\.attention' .*Nameless.* headprobe cannot mask it"):
        check_backbone(home_made(HomeMade, NamelessInPlainProducts), SIZE, "home-made")


class _Sigmoid(nn.Module):
    """Attention whose weights a sigmoid makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, 3, 16).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT).sigmoid() @ v).transpose(1, 2).reshape(images, tokens, width))


def test_weights_that_no_softmax_makes_are_named_so() -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model: Any = timm.create_model("vit_tiny_patch16_224", **options)
    model.blocks[0].attn = _Sigmoid()
    assert "no softmax and no fused attention was seen" in str(check_backbone(model.eval(), (3, 32, 32), "mine"))
