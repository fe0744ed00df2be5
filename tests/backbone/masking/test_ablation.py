from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadChannels, HeadLayout
from headprobe.backbone.masking.ablation import ablating, masked_logits, masks_of_rows
from headprobe.backbone.masking.replacement import WITH_ZERO, LayerSlots, Replacement, replace_heads
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.sandbox import example_images
from headprobe.errors import RunError, UsageError
from tests.conftest import tiny


def setup(kind: str) -> tuple[Any, HeadLayout, torch.Tensor]:
    model = tiny(kind)
    layout = find_heads(model, (3, *model.patch_embed.img_size), kind)
    return model, layout, example_images(model, layout.input_size, 3)


def random_keep(layout: HeadLayout, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, len(layout.layers), max(layout.heads_per_layer), generator=generator) < 0.6


def zeroed_operator_logits(model: Any, layout: HeadLayout, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Zero the value projection's output, an oracle that never meets the point: no value, no output."""
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):
            module = model.get_submodule(layer.name)
            kept = keep[number, : layer.heads].repeat_interleave(layer.head_dim).to(images.dtype)
            stack.callback(_scale_values(module, kept).remove)
        return model(images)


def _scale_values(module: Any, kept: torch.Tensor) -> Any:
    def scale(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        values = kept.numel()
        return torch.cat([out[..., :-values], out[..., -values:] * kept], dim=-1)

    if getattr(module, "v_proj", None) is not None:
        return module.v_proj.register_forward_hook(scale)
    if getattr(module, "kv", None) is not None:
        return module.kv.register_forward_hook(scale)
    return module.qkv.register_forward_hook(scale)


VALUE_HOOKABLE = [
    "vit",
    "vit_registers",
    "distilled",
    "eva_inner_norm",
    "dinov3",
    "clip",
    "siglip",
    "swin",
    "swin_v2_cr",
]


@pytest.mark.parametrize("kind", VALUE_HOOKABLE)
@torch.inference_mode()
def test_masking_equals_heads_without_values(kind: str) -> None:
    model, layout, images = setup(kind)
    keep = random_keep(layout, 1)
    expected = zeroed_operator_logits(model, layout, images, keep)
    assert (expected - model(images)).abs().max() > 1e-3
    torch.testing.assert_close(masked_logits(model, layout, images, keep), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_masking_equals_zeroed_columns_of_the_output_projection(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    if any(layer.inner_norm for layer in layout.layers):
        pytest.skip("a norm over all heads stands between: masking rescales the other heads too")
    keep = random_keep(layout, 2)
    masked = masked_logits(model, layout, images, keep)
    for number, layer in enumerate(layout.layers):
        weight = model.get_submodule(layer.name).proj.weight
        weight.data[:, ~keep[number, : layer.heads].repeat_interleave(layer.head_dim)] = 0
    torch.testing.assert_close(masked, model(images), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_each_row_may_carry_its_own_mask_windows_included(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    keep = random_keep(layout, 3, len(images))
    together = masked_logits(model, layout, images, keep)
    for row in range(len(images)):
        alone = masked_logits(model, layout, images[row : row + 1], keep[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_mask_that_keeps_all_heads_changes_no_bit(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    ones = torch.ones(len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    assert torch.equal(masked_logits(model, layout, images, ones), model(images))
    kept = torch.ones(3, layout.layers[0].heads, dtype=torch.bool)
    with ablating(model, layout, lambda layer: kept[:, :1].expand(3, layout.layers[layer].heads)):
        assert torch.equal(model(images), tiny(tiny_kind)(images))  # also where the fill really runs


@torch.inference_mode()
def test_afterwards_the_model_is_as_before_also_after_an_exception() -> None:
    model, layout, images = setup("swin")
    plain = model(images)

    class BoomError(Exception):
        pass

    def explode(layer: int) -> torch.Tensor | None:
        if layer == 2:
            raise BoomError
        return torch.zeros(1, layout.layers[layer].heads, dtype=torch.bool)

    with pytest.raises(BoomError), ablating(model, layout, explode):
        model(images)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(images), plain)


def test_a_masked_head_is_zero_even_where_it_overflowed() -> None:
    heads = torch.full((2, 3, 8), float("inf"))
    keep = torch.tensor([[True, False]])
    out = replace_heads(LayerSlots(0, heads, keep, HeadChannels(2, 4)), [WITH_ZERO])
    assert torch.equal(out[..., 4:], torch.zeros(2, 3, 4))
    assert torch.equal(out[..., :4], heads[..., :4])


def test_rows_that_do_not_divide_into_groups_are_an_error() -> None:
    slots = LayerSlots(0, torch.zeros(7, 2, 4), torch.ones(2, 2, dtype=torch.bool), HeadChannels(2, 2))
    with pytest.raises(RunError, match=r"7 rows .* do not divide into 2 groups"):
        replace_heads(slots, [WITH_ZERO])


@torch.inference_mode()
def test_a_hook_that_does_not_fire_is_an_error() -> None:
    model, layout, _ = setup("vit")
    with ablating(model, layout, masks_of_rows(torch.ones(3, 6, 2, dtype=torch.bool))) as count:
        model.blocks[:3](torch.zeros(1, 101, 64))
    with pytest.raises(RunError, match=r"blocks\.3\.attn.*0 times"):
        count.check(layout)


@torch.inference_mode()
def test_fused_attention_stays_on_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, images = setup("vit")
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    masked_logits(model, layout, images, random_keep(layout, 4))
    assert len(calls) == len(layout.layers)


def test_the_proofs_pass_on_every_kind_and_leave_the_weights_alone(tiny_kind: str) -> None:
    model, layout, _ = setup(tiny_kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prove_masks(model, layout)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_proofs_catch_heads_laid_out_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, _ = setup("vit")

    def interleaved(slots: LayerSlots, _: Sequence[Replacement]) -> torch.Tensor:
        heads_out, keep = slots.heads_out, slots.keep
        by_row = keep.repeat_interleave(heads_out.shape[0] // keep.shape[0], dim=0)
        return heads_out.unflatten(-1, (-1, keep.shape[1])).masked_fill(~by_row[:, None, None], 0).flatten(-2)

    monkeypatch.setattr("headprobe.backbone.masking.ablation.replace_heads", interleaved)
    with pytest.raises(UsageError, match="is not zeroing them"):
        prove_masks(model, layout)
