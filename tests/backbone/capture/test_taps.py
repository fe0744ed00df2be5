"""The oracle for attention weights is timm with fused attention switched off, read at its own `attn_drop`."""

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.capture.layer_record import LayerRecord, PlainAttention
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.sandbox import example_images
from headprobe.errors import RunError
from tests.conftest import tiny


def fresh(kind: str) -> tuple[Any, HeadLayout, Tensor]:
    model = tiny(kind)
    layout = find_heads(model, (3, *model.patch_embed.img_size), kind)
    return model, layout, example_images(model, layout.input_size, 3)


setup = cache(fresh)  # for tests that leave the model as it was


def record(model: Any, layout: HeadLayout, images: Tensor, **options: Any) -> list[LayerRecord]:
    records: list[LayerRecord] = []
    with torch.inference_mode(), tapping(model, layout, [Tap(records.append, **options)]):
        model(images)
    return records


def whole(one: LayerRecord, chunk: int) -> Tensor:
    """All weights `[rows, heads, queries, keys]`, put together from chunks."""
    assert one.attention is not None
    rows, heads, queries, keys = one.attention.shape
    out = torch.full((rows, heads, queries, keys), torch.nan)
    for part in one.weights(chunk):
        assert part.weights.numel() <= max(chunk, one.windows * heads * keys)
        out[part.rows, :, part.queries] = part.weights
    return out


def unfused_weights(model: Any, layout: HeadLayout, images: Tensor) -> list[Tensor]:
    """What timm's own softmax gives, in the order of the layers."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for layer in layout.layers:
            module = model.get_submodule(layer.name)
            stack.callback(setattr, module, "fused_attn", getattr(module, "fused_attn", False))
            module.fused_attn = False
            if layer.kind == "pool":
                stack.callback(module.register_forward_pre_hook(lambda m, args: found.append(pool(m, args[0]))).remove)
            else:
                stack.callback(module.attn_drop.register_forward_hook(lambda *call: found.append(call[2])).remove)
        with torch.inference_mode():
            model(images)
    return found


def pool(module: Any, tokens: Tensor) -> Tensor:
    """SigLIP's pooling head by its paper: one learned query over all tokens."""
    heads = lambda x: x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)  # noqa: E731
    key = heads(module.kv(tokens).chunk(2, dim=-1)[0])
    query = heads(module.q(module.latent.expand(len(tokens), -1, -1)))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)


@pytest.mark.parametrize("chunk", [700, 1 << 20])
def test_weights_equal_timms_unfused_ones(tiny_kind: str, chunk: int) -> None:
    model, layout, images = setup(tiny_kind)
    found = [whole(one, chunk) for one in record(model, layout, images)]
    for ours, theirs in zip(found, unfused_weights(model, layout, images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_fused_swin_gives_the_weights_of_the_unfused_one() -> None:
    model, layout, images = fresh("swin")
    for layer in layout.layers:
        model.get_submodule(layer.name).fused_attn = True
    layout = find_heads(model, layout.input_size, "swin")
    fused = record(model, layout, images)
    assert not any(isinstance(one.attention, PlainAttention) for one in fused)
    for ours, theirs in zip(fused, unfused_weights(model, layout, images), strict=True):
        torch.testing.assert_close(whole(ours, 5000), theirs, atol=1e-6, rtol=0)


def test_head_outputs_are_weights_times_values(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    for one in record(model, layout, images):
        assert one.values is not None
        expected = (whole(one, 1 << 20) @ one.values).transpose(1, 2)
        torch.testing.assert_close(one.heads_out, expected, atol=1e-5, rtol=1e-5)


def test_the_logits_do_not_change_by_one_bit(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    with torch.inference_mode():
        plain = model(images)
        with tapping(model, layout, [Tap(lambda one: None)]):
            assert torch.equal(model(images), plain)


def test_fused_attention_stays_on() -> None:
    model, layout, images = setup("vit")
    kinds = {type(one.attention).__name__ for one in record(model, layout, images)}
    assert kinds == {"FusedAttention"}


def test_every_layer_is_handed_over_once_and_in_order(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    assert [one.layer for one in record(model, layout, images)] == list(range(len(layout.layers)))


def test_taps_see_heads_after_their_ablation(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    keep = torch.ones(1, len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    keep[:, 1, 0] = False
    with ablating(model, layout, masks_of_rows(keep)):
        records = record(model, layout, images)
    assert (records[1].heads_out[..., 0, :] == 0).all()
    assert (records[1].heads_out[..., 1, :] != 0).any()
    assert (records[0].heads_out[..., 0, :] != 0).any()


@pytest.mark.parametrize("kind", ["vit", "swin", "siglip"])
def test_rows_of_a_mask_in_a_growing_pass_are_those_of_the_mask_alone(kind: str) -> None:
    model, layout, images = setup(kind)
    keep = torch.ones(2, len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    keep[0, 1, 0] = keep[1, 2, 1] = False
    with ablating(model, layout, masks_of_rows(keep[1:])):
        alone = record(model, layout, images)

    def second_mask(layer: int, rows: int) -> slice | None:
        return slice(6, 9) if rows == 9 else None

    with GrowingPass(model, layout, find_joins(model, layout).joins, keep) as growing:
        records: list[LayerRecord] = []
        with torch.inference_mode(), tapping(model, layout, [Tap(records.append, second_mask)]):
            growing.logits(images, growing.plan(3, 9))
    assert [one.layer for one in records] == list(range(2, len(layout.layers)))
    for one in records:
        expected = alone[one.layer]
        torch.testing.assert_close(one.heads_out, expected.heads_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole(one, 1 << 20), whole(expected, 1 << 20), atol=1e-6, rtol=0)
        if expected.stream_before is not None and expected.stream_after is not None:
            torch.testing.assert_close(one.stream_before, expected.stream_before, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.stream_after, expected.stream_after, atol=1e-5, rtol=1e-5)


def test_a_slice_of_rows_is_a_slice_of_the_record(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    everything = record(model, layout, images)
    for part, one in zip(record(model, layout, images, rows=lambda *_: slice(1, 3)), everything, strict=True):
        windows = layout.layers[one.layer].rows
        assert part.images == 2
        assert torch.equal(part.heads_out, one.heads_out[windows:])
        assert torch.equal(whole(part, 1 << 20), whole(one, 1 << 20)[windows:])


@pytest.mark.parametrize("kind", ["vit", "vit_registers", "beit", "eva", "dinov3", "clip", "swin"])
def test_the_stream_after_is_the_stream_before_plus_the_projected_heads(kind: str) -> None:
    model, layout, images = setup(kind)
    facts = layer_facts(model, layout)
    for one in record(model, layout, images):
        projection, module = facts[one.layer].projection, model.get_submodule(layout.layers[one.layer].name)
        assert projection is not None
        assert one.stream_before is not None
        assert one.stream_after is not None
        if one.windows > 1:
            continue  # in another order: the spectrum's tests put windows back
        heads = torch.einsum("hdc,bthc->btd", projection.weight, one.projected)
        added = one.stream_after - one.stream_before - heads
        assert added.std(dim=(0, 1)).max() < 1e-4  # what is left is the projection's bias
        assert module.proj.bias is None or added.abs().max() > 1e-3


def test_a_norm_after_the_projection_is_found(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    post_norm = {one.norm_follows for one in record(model, layout, images)}
    assert post_norm == {tiny_kind in ("swin_v2", "swin_v2_cr")}


def test_an_inner_norm_lies_between_head_outputs_and_what_enters_the_projection() -> None:
    model, layout, images = setup("eva_inner_norm")
    one = record(model, layout, images)[0]
    norm = model.get_submodule(layout.layers[0].point)
    with torch.inference_mode():
        expected = norm(one.heads_out.flatten(-2))
    torch.testing.assert_close(one.projected.flatten(-2), expected)
    same = record(*setup("clip"))[0]
    assert same.projected is same.heads_out


@pytest.mark.parametrize("kind", ["vit", "swin", "swin_v2"])
def test_weights_are_recomputed_in_float32_under_bf16_autocast(kind: str) -> None:
    model, layout, images = setup(kind)
    exact = [whole(one, 1 << 20) for one in record(model, layout, images)]
    found: list[Tensor] = []

    def observe(one: LayerRecord) -> None:
        chunks = list(one.weights(5000))
        assert {part.weights.dtype for part in chunks} == {torch.float32}
        sums = torch.cat([part.weights.sum(dim=-1).flatten() for part in chunks])
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
        found.append(whole(one, 1 << 20))

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), tapping(model, layout, [Tap(observe)]):
        model(images)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).abs().mean() < 0.01


def test_a_model_in_bf16_is_tapped() -> None:
    model, layout, images = fresh("vit")
    records = record(model.to(torch.bfloat16), layout, images.to(torch.bfloat16))
    assert {part.weights.dtype for one in records for part in one.weights()} == {torch.float32}


def test_without_taps_nothing_is_installed() -> None:
    model, layout, _ = setup("vit")
    with tapping(model, layout, []):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fail", [False, True])
def test_all_hooks_and_modes_are_gone_afterwards(fail: bool) -> None:
    model, layout, images = fresh("swin")
    plain = model(images)

    def observe(one: LayerRecord) -> None:
        if fail and one.layer == 1:
            raise ValueError

    with ExitStack() as stack:
        if fail:
            stack.enter_context(pytest.raises(ValueError))  # noqa: PT011  # raised above
        with tapping(model, layout, [Tap(observe)]):
            model(images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(images), plain)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_failure_inside_attention_leaves_no_mode_behind() -> None:
    model, layout, images = fresh("vit")
    handle = model.get_submodule(layout.layers[1].name).qkv.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tapping(model, layout, [Tap(lambda one: None)]):
        model(images)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_layer_that_is_left_out_is_an_error() -> None:
    model, layout, images = fresh("vit")
    model.blocks[-1].forward = lambda x, **_: x
    with pytest.raises(RunError, match=r"ended before layer 'blocks\.\d+\.attn'"):
        record(model, layout, images)


def test_attention_that_cannot_be_tapped_is_an_error() -> None:
    model, layout, images = fresh("vit")
    module = model.get_submodule(layout.layers[0].name)
    module.forward = lambda x, **_: module.proj(module.norm(x))
    with pytest.raises(RunError, match="could not be tapped"):
        record(model, layout, images)


def sum_up(one: LayerRecord) -> None:
    for part in one.weights():
        assert not part.weights.requires_grad


def test_gradients_are_left_alone() -> None:
    model, layout, images = fresh("vit")
    with tapping(model, layout, [Tap(sum_up)]):
        model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
