from typing import Any

import pytest
import timm
import torch
from torch import nn

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.heads.sites import SITES
from headprobe.backbone.sandbox import example_images
from headprobe.errors import UsageError
from tests.conftest import tiny
from tests.families import REPRESENTATIVES, build

SIZE = (3, 64, 64)


def layout_of(name: str, **options: Any) -> HeadLayout:
    model = timm.create_model(name, num_classes=10, **options)
    size = getattr(model.patch_embed, "img_size", (224, 224))
    return find_heads(model, (3, *size), name)


def test_deit_tiny_has_12_layers_of_3_heads_of_64_channels() -> None:
    layout = layout_of("deit_tiny_patch16_224")
    assert layout.heads_per_layer == (3,) * 12
    assert {layer.head_dim for layer in layout.layers} == {64}
    assert [layer.name for layer in layout.layers] == [f"blocks.{i}.attn" for i in range(12)]


def test_swin_tiny_has_the_heads_of_its_paper_with_windows_and_shifts() -> None:
    layout = layout_of("swin_tiny_patch4_window7_224")
    assert layout.heads_per_layer == (3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24)
    assert [layer.stage for layer in layout.layers] == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3]
    assert [layer.grid for layer in layout.layers][::2] == [(56, 56), (28, 28), (14, 14), (14, 14), (14, 14), (7, 7)]
    assert {layer.window for layer in layout.layers} == {(7, 7)}
    assert [layer.shift for layer in layout.layers] == [(0, 0), (3, 3)] * 5 + [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("kind", "prefix"), [("vit", 1), ("distilled", 2), ("vit_registers", 5), ("siglip", 0), ("dinov3", 5), ("swin", 0)]
)
def test_prefix_tokens_are_those_with_no_place_on_the_grid(kind: str, prefix: int) -> None:
    model = tiny(kind)
    layout = find_heads(model, (3, *model.patch_embed.img_size), kind)
    assert layout.prefix_tokens == prefix


def test_siglip_pooling_head_is_a_layer_of_its_own_kind() -> None:
    layout = find_heads(tiny("siglip"), SIZE, "siglip")
    assert [layer.kind for layer in layout.layers] == ["global"] * 3 + ["pool"]


def test_inner_norm_is_found_where_a_norm_over_all_heads_precedes_the_projection() -> None:
    assert all(layer.inner_norm for layer in find_heads(tiny("eva_inner_norm"), SIZE, "eva").layers)
    assert not any(layer.inner_norm for layer in find_heads(tiny("clip"), SIZE, "clip").layers)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_model_without_heads_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"model '{name}' has no attention heads"):
        find_heads(timm.create_model(name), (3, 224, 224), name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("shvit_s1", "SHSA"),
        ("swiftformer_xs", "EfficientAdditiveAttention"),
        ("mobilevitv2_050", "LinearSelfAttention"),
        ("iformer_t", "SHMA"),
    ],
)
def test_attention_with_one_head_by_design_is_refused_with_that_reason(name: str, what: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=rf"single head by design .*{what}"):
        find_heads(timm.create_model(name), (3, 224, 224), name)


def test_fused_attention_outside_every_known_layer_is_refused() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("vit")
            self.num_prefix_tokens = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.nn.functional.scaled_dot_product_attention(x, x, x)
            return self.inner(x) + 0 * noise.sum()

    with pytest.raises(UsageError, match="computes attention in"):
        find_heads(Sneaky(), (3, 160, 160), "sneaky")


def test_a_layer_used_twice_is_refused_since_its_heads_cannot_be_told_apart() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("vit")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner(x)

    with pytest.raises(UsageError, match="more than once"):
        find_heads(Looped(), (3, 160, 160), "looped")


def test_torchscript_is_refused() -> None:
    with pytest.raises(UsageError, match="TorchScript"):
        find_heads(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), (3, 8, 8), "scripted")


def test_finding_heads_leaves_no_hook_and_no_changed_mode() -> None:
    model = tiny("swin").train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    find_heads(model, SIZE, "swin")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_class_of_the_table_exists_in_timm_or_is_a_former_home() -> None:
    import importlib

    former = {"timm.models.vision_transformer.Attention"}
    for path in set(SITES) - former:
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type), path


def test_every_class_of_the_table_has_a_tiny_representative() -> None:
    seen = {path for representative in REPRESENTATIVES.values() for path in representative.classes}
    former, optional = "timm.models.vision_transformer.Attention", "timm.layers.attention_pool.AttentionPoolPrr"
    assert set(SITES) - seen == {former, optional}  # tests/backbone/test_refusals.py has the optional one


@pytest.mark.any_timm
@pytest.mark.parametrize("key", sorted(REPRESENTATIVES))
def test_the_heads_of_every_representative_are_found(key: str) -> None:
    representative = REPRESENTATIVES[key]
    layout = find_heads(build(key), representative.input_size, key)
    assert layout.heads_per_layer == representative.heads
    assert {layer.attention_class for layer in layout.layers} == set(representative.classes)
    assert all(layer.known and layer.operator is not None for layer in layout.layers)


def test_example_images_are_the_same_each_time() -> None:
    model = tiny("vit")
    first, second = (example_images(model, (3, 8, 8), 2, seed=5) for _ in range(2))
    assert torch.equal(first, second)
