"""A pruned model's logits are those of the masked one, by plain hooks, in every class that can be pruned."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.replacement import WITH_ZERO, AffineMap, Constant, Linear, Position, Replacement
from headprobe.backbone.pruned.no_heads import NoHeads
from headprobe.backbone.pruned.record import record_of
from headprobe.backbone.sandbox import example_images, relative
from headprobe.errors import RunError, UsageError
from headprobe.pruning.cost import parameters_of
from headprobe.pruning.remove import prove_same, without_heads
from tests.conftest import perturbed
from tests.families import REPRESENTATIVES
from tests.pruning.hand_hooks import Stand, hooked

PLAIN = ("vit", "vit_registers", "vit_distilled", "vit_mean", "vit_dynamic", "clip", "vit_side_by_side", "swin",
         "vit_hybrid", "pit")  # fmt: skip
OURS = ("eva", "dinov3", "beit", "swin_v2", "rope", "rope_mixed", "rope_latent_pool", "qwen", "naflex_gated")

VARIED: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, q and k norms": ("vit", {"qk_norm": True}),
    "vit, no biases": ("vit", {"qkv_bias": False, "proj_bias": False}),
    "vit, layer scale and drop path": ("vit", {"init_values": 0.1, "drop_path_rate": 0.2}),
    "dinov3, q, k, v apart": ("dinov3", {"qkv_fused": False}),
    "beit, shared biases": ("beit", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "swin, padded": ("swin", {"img_size": (56, 72)}),
    "swin v2, padded": ("swin_v2", {"img_size": (56, 72)}),
}
"""What further models a class builds, with a representative's name and the options that change it."""

MASKS = ("random", "whole layer", "all", "one left", "different numbers")


def built(name: str, fused: bool | None = None) -> tuple[nn.Module, HeadLayout]:
    """A tiny model with perturbed weights; its attention fused as timm has it, or as is said."""
    known, changed = VARIED.get(name, (name, {}))
    small = REPRESENTATIVES[known]
    torch.manual_seed(0)
    options = {**small.options, **changed}
    model = perturbed(timm.create_model(small.name, num_classes=7, **options))
    for part in model.modules():
        if fused is not None and hasattr(part, "fused_attn"):
            part.fused_attn = fused  # type: ignore[assignment]  # timm: bool
    sides = changed.get("img_size", small.input_size[1:])
    return model, find_heads(model, (3, *((sides, sides) if isinstance(sides, int) else sides)), name)


def prunable(layout: HeadLayout) -> list[int]:
    """Layers without those of a pooling head, which no head can be taken out of."""
    return [number for number, layer in enumerate(layout.layers) if layer.kind != "pool"]


def keep_of(layout: HeadLayout, kind: str) -> torch.Tensor:
    layers = prunable(layout)
    keep = torch.ones(len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    draw = torch.Generator().manual_seed(5)
    for number in layers:
        heads = layout.layers[number].heads
        match kind:
            case "random":
                keep[number, :heads] = torch.rand(heads, generator=draw) < 0.6
            case "whole layer":
                keep[number, :heads] = number != layers[1]
            case "all":
                keep[number, :heads] = False
            case "one left":
                keep[number, :heads] = torch.arange(heads) == heads - 1
            case "different numbers":
                keep[number, :heads] = torch.arange(heads) % (2 + number % 2) == 0
    return keep


def drawn(layout: HeadLayout, keep: torch.Tensor, kind: str) -> tuple[Replacement, dict[str, Stand]]:
    """What fills the masked slots, as headprobe has it and as the hooks take it."""
    draw = np.random.default_rng(7)
    constants, maps, stands = [], [], {}
    for number, layer in enumerate(layout.layers):
        kept = keep[number, : layer.heads].numpy()
        wide = np.repeat(kept, layer.head_dim)
        values = draw.normal(size=wide.size) * (kind != "zero")
        slopes = draw.normal(size=(int((~wide).sum()), int(wide.sum()))) / max(wide.sum(), 1)
        masked = frozenset(np.flatnonzero(~kept).tolist())
        constants.append(torch.from_numpy(values.reshape(layer.heads, -1)).float())
        affine = [np.flatnonzero(wide), np.flatnonzero(~wide), slopes, values[~wide]]
        numbers = [torch.from_numpy(part) for part in affine]
        maps.append(AffineMap(numbers[0], numbers[1], numbers[2].float(), numbers[3].float()) if masked else None)
        if masked:
            stands[layer.name] = Stand(layer.heads, masked, values, slopes if kind == "linear" else None)
    fills = {"zero": WITH_ZERO, "mean": Constant("mean", constants), "optimal": Constant("optimal", constants)}
    return fills.get(kind, Linear(maps)), stands


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [*PLAIN, *OURS, *VARIED])
@torch.inference_mode()
def test_a_pruned_model_gives_the_logits_of_the_masked_one(name: str, mask: str) -> None:
    model, layout = built(name, fused=True)
    images = example_images(model, layout.input_size, 3)
    plain = model(images)
    for kind in ("zero",) if name == "naflex_gated" else ("zero", "linear"):
        keep = keep_of(layout, mask)
        fill, stands = drawn(layout, keep, kind)
        with hooked(model, stands):
            expected = model(images)
        assert relative(plain, expected) > 1e-3
        smaller = without_heads(model, layout, keep, fill)
        assert relative(smaller(images), expected) < 1e-5
        assert prove_same(smaller, model, layout, keep, fill) < 1e-5
        assert parameters_of(smaller) < parameters_of(model)
    assert torch.equal(model(images), plain)


def test_linear_is_folded_into_the_weights_as_by_hand() -> None:
    model, layout = built("vit")
    keep = keep_of(layout, "different numbers")
    fill, stands = drawn(layout, keep, "linear")
    smaller = without_heads(model, layout, keep, fill)
    for name, stand in stands.items():
        before, after = (one.get_submodule(f"{name}.proj").state_dict() for one in (model, smaller))
        gone = np.repeat([head in stand.masked for head in range(stand.heads)], len(stand.constants) // stand.heads)
        weight = before["weight"].double().numpy()
        folded = weight[:, ~gone] + weight[:, gone] @ stand.slopes
        assert after["weight"].numpy() == pytest.approx(folded, abs=1e-6)
        bias = before["bias"].double().numpy() + weight[:, gone] @ stand.constants[gone]
        assert after["bias"].numpy() == pytest.approx(bias, abs=1e-6)
    assert len(stands) == 2


@pytest.mark.parametrize("kind", ["mean", "optimal"])
@pytest.mark.parametrize("name", ["vit", "vit, no biases", "dinov3", "beit", "swin", "swin_v2"])
@torch.inference_mode()
def test_constants_fold_into_the_bias(name: str, kind: str) -> None:
    model, layout = built(name)
    images, keep = example_images(model, layout.input_size, 3), keep_of(layout, "different numbers")
    fill, stands = drawn(layout, keep, kind)
    with hooked(model, stands):
        expected = model(images)
    assert relative(without_heads(model, layout, keep, fill)(images), expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["vit", "swin", "eva", "dinov3, q, k, v apart", "beit", "beit, shared biases", "rope_mixed"]
)
@torch.inference_mode()
def test_unfused_attention_is_pruned_too(name: str) -> None:
    model, layout = built(name, fused=False)
    images, keep = example_images(model, layout.input_size, 3), keep_of(layout, "random")
    fill, stands = drawn(layout, keep, "linear")
    with hooked(model, stands):
        expected = model(images)
    assert relative(without_heads(model, layout, keep, fill)(images), expected) < 1e-5


@pytest.mark.parametrize("name", ["vit", "eva", "beit", "beit, shared biases", "swin", "swin_v2", "rope", "rope_mixed"])
@torch.inference_mode()
def test_a_pruned_model_is_pruned_again(name: str) -> None:
    model, layout = built(name)
    images, keep = (
        example_images(model, layout.input_size, 3),
        torch.ones(len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool),
    )
    keep[:, 0] = False
    once = without_heads(model, layout, keep, WITH_ZERO)
    again = find_heads(once, layout.input_size, name)
    assert again.heads_per_layer == tuple(heads - 1 for heads in layout.heads_per_layer)
    second = torch.ones(len(again.layers), max(again.heads_per_layer), dtype=torch.bool)
    second[-1, 1] = False  # head 2 of the architecture
    twice = without_heads(once, again, second, WITH_ZERO)
    keep[-1, 2] = False
    masked = {layer.name: frozenset(torch.nonzero(~keep[number, : layer.heads]).flatten().tolist())
              for number, layer in enumerate(layout.layers)}  # fmt: skip
    widths = {layer.name: layer.channels.channels for layer in layout.layers}
    heads = {layer.name: layer.heads for layer in layout.layers}
    stands = {one: Stand(heads[one], gone, np.zeros(widths[one])) for one, gone in masked.items()}
    with hooked(model, stands):
        expected = model(images)
    assert relative(twice(images), expected) < 1e-5
    assert {name: set(range(layer.heads)) - set(layer.kept) for name, layer in record_of(twice).items()} == masked


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_plain_attention_stays_a_module_of_timm(name: str) -> None:
    model, layout = built(name)
    smaller = without_heads(model, layout, keep_of(layout, "one left"), WITH_ZERO)
    assert [type(smaller.get_submodule(layer.name)) for layer in layout.layers] == [
        type(model.get_submodule(layer.name)) for layer in layout.layers
    ]


def test_a_layer_without_heads_costs_nothing() -> None:
    model, layout = built("vit")
    smaller: Any = without_heads(model, layout, keep_of(layout, "all"), WITH_ZERO)
    block = smaller.blocks[0]
    assert isinstance(block.attn, NoHeads)
    assert [name for name, _ in block.named_parameters() if not name.startswith(("mlp", "norm2"))] == ["attn.bias"]
    out = block.attn(block.norm1(torch.rand(2, 5, 48)))
    assert out.untyped_storage().data_ptr() == block.attn.bias.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit", {"img_size": (96, 96)}),
        ("eva", {"img_size": (112, 112)}),
        ("beit", {"img_size": (96, 96)}),
        ("swin", {"img_size": (128, 128), "window_size": (8, 8)}),
        ("swin_v2", {"img_size": (128, 128), "window_size": (8, 8)}),
    ],
)
@torch.inference_mode()
def test_a_pruned_model_takes_another_image_size_as_timm_sets_it(name: str, size: dict[str, Any]) -> None:
    model, layout = built(name)
    keep = keep_of(layout, "random")
    keep[:2] = False  # both blocks of Swin's first stage, one of which shifts its windows
    smaller: Any = without_heads(model, layout, keep, WITH_ZERO)
    stands = drawn(layout, keep, "zero")[1]
    whole: Any = model
    for one in (whole, smaller):
        one.set_input_size(**size)
        one.eval()
    images = torch.randn(2, 3, *size["img_size"], generator=torch.Generator().manual_seed(0))
    with hooked(model, stands):
        expected = model(images)
    assert relative(smaller(images), expected) < 1e-5


def test_gradients_reach_what_is_left_and_training_mode_works() -> None:
    model, layout = built("vit, layer scale and drop path")
    smaller = without_heads(model, layout, keep_of(layout, "whole layer"), WITH_ZERO).train()
    smaller(example_images(smaller, layout.input_size, 2)).sum().backward()
    assert [name for name, one in smaller.named_parameters() if one.grad is None] == []


def test_a_frozen_model_stays_frozen() -> None:
    model, layout = built("eva")
    model.requires_grad_(False)
    smaller = without_heads(model, layout, keep_of(layout, "random"), WITH_ZERO)
    assert not any(one.requires_grad for one in smaller.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("siglip", r"'attn_pool' can be removed: .*AttentionPoolLatent"),
        ("vit_scale_norm", r"a norm over all heads stands between"),
        ("eva_scale_norm", r"a norm over all heads stands between"),
        ("rope_grouped_query", r"its heads share keys and values"),
        ("vit_differential", r"got timm.layers.diff_attention.DiffAttention"),
        ("relpos", r"got timm.models.vision_transformer_relpos.RelPosAttention"),
        ("swin_v2_cr", r"got timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(name: str, message: str) -> None:
    model, layout = built(name)
    keep = torch.ones(len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    number = next(n for n, layer in enumerate(layout.layers) if name != "siglip" or layer.kind == "pool")
    keep[number if name != "rope_grouped_query" else 1, 0] = False
    with pytest.raises(UsageError, match=message):
        without_heads(model, layout, keep, WITH_ZERO)


def test_a_layer_that_cannot_be_pruned_hinders_no_other() -> None:
    model, layout = built("siglip")
    keep = keep_of(layout, "random")
    assert prove_same(without_heads(model, layout, keep, WITH_ZERO), model, layout, keep, WITH_ZERO) < 1e-5


def test_what_cannot_be_folded_is_refused() -> None:
    model, layout = built("vit")
    keep = keep_of(layout, "random")
    with pytest.raises(UsageError, match=r"position cannot be folded into weights: .* got position"):
        without_heads(model, layout, keep, Position([]))
    gated, layers = built("naflex_gated")
    with pytest.raises(UsageError, match=r"a gate stands between .* choose zero, got mean"):
        without_heads(gated, layers, keep_of(layers, "random"), Constant("mean", []))


def test_adapters_are_refused() -> None:
    model, layout = built("vit")
    model.get_submodule("blocks.0.attn").qkv = nn.Sequential(nn.Linear(48, 144))
    keep = keep_of(layout, "random")
    keep[0, 0] = False
    with pytest.raises(UsageError, match=r"must be plain linear layers"):
        without_heads(model, layout, keep, WITH_ZERO)


def test_the_proof_notices_a_changed_weight() -> None:
    model, layout = built("vit")
    keep = keep_of(layout, "random")
    smaller = without_heads(model, layout, keep, WITH_ZERO)
    wrong = deepcopy(smaller)
    with torch.no_grad():
        wrong.get_submodule("blocks.0.attn.proj").bias[0] += 1e-2  # type: ignore[operator,index]
    assert prove_same(smaller, model, layout, keep, WITH_ZERO) < 1e-5
    with pytest.raises(RunError, match=r"are not those of the masked model .* where 1e-05 is rounding"):
        prove_same(wrong, model, layout, keep, WITH_ZERO)
    with torch.no_grad():
        wrong.get_submodule("head").bias[0] = float("nan")  # type: ignore[operator]
    with pytest.raises(RunError, match="got a difference of nan"):
        prove_same(wrong, model, layout, keep, WITH_ZERO)


@pytest.mark.any_timm
@pytest.mark.parametrize("name", ["vit", "rope", "swin", "eva", "dinov3", "beit", "swin_v2"])
@torch.inference_mode()
def test_heads_are_removed_or_the_timm_that_is_needed_is_named(name: str) -> None:
    model, layout = built(name)
    keep = keep_of(layout, "different numbers")
    fill, _ = drawn(layout, keep, "linear")
    if name in ("vit", "rope") and not hasattr(model.get_submodule(layout.layers[0].name), "attn_dim"):
        with pytest.raises(UsageError, match=r"install timm 1.0.23 or later to remove heads of 'blocks.0.attn'"):
            without_heads(model, layout, keep, fill)
        return
    assert prove_same(without_heads(model, layout, keep, fill), model, layout, keep, fill) < 1e-5
