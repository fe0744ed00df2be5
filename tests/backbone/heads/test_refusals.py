"""Attention that no mask would reach is refused, with the reason; what is correct is not."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import headprobe
from headprobe.errors import UsageError
from tests.conftest import perturbed
from tests.families import REPRESENTATIVES, build

SIZE = (3, 32, 32)


def small() -> Any:
    torch.manual_seed(0)
    return perturbed(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10))


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))


class OneCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(192, 3, batch_first=True)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


class OtherNames(nn.Module):
    """Three heads by the names of no timm class."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(192, 192) for _ in range(4))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = (torch.unflatten(part(x), -1, (3, 64)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out: Tensor = self.out(((q @ k.mT / 8).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return out


class Twice(Attention):  # type: ignore[misc]
    """Attends again behind its output projection."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        again = torch.unflatten(y, -1, (3, 64)).transpose(1, 2)
        return y + F.scaled_dot_product_attention(again, again, again).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("hidden", [OneCall, OtherNames, lambda: Twice(192, num_heads=3)])
def test_a_layer_whose_heads_no_mask_would_reach_is_refused(hidden: Any) -> None:
    model = small()
    model.blocks[0].attn = hidden()
    for call in (headprobe.check, lambda one: headprobe.ablate(one, "layer:0").__enter__()):
        with pytest.raises(UsageError, match=r"computes attention in 'blocks\.0\.attn.* cannot mask"):
            call(model.eval())


def test_a_transformer_layer_of_torch_on_top_is_refused() -> None:
    model = small()
    model.norm = nn.Sequential(model.norm, nn.TransformerEncoderLayer(192, 3, batch_first=True))
    with pytest.raises(UsageError, match=r"norm\.1.* cannot mask"):
        headprobe.check(model.eval())


def test_a_model_all_of_whose_attention_is_hidden_is_not_said_to_have_no_heads() -> None:
    model = small()
    for block in model.blocks:
        block.attn = OneCall()
    with pytest.raises(UsageError, match="hides its heads in one call"):
        headprobe.check(model.eval())


class ByKeyword(Attention):  # type: ignore[misc]
    """Hands its heads on by keyword."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (torch.unflatten(part, -1, (3, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(self.norm(input=heads))
        return out


def test_heads_that_are_handed_on_by_keyword_are_refused_with_that_reason() -> None:
    model = small()
    model.blocks[1].attn = ByKeyword(192, num_heads=3)
    with pytest.raises(UsageError, match=r"^attention module 'blocks\.1\.attn' .* as a keyword argument"):
        headprobe.check(model.eval())


@pytest.mark.parametrize("semantics", ["Attention", "both", ""])
def test_semantics_that_do_not_exist_are_refused(semantics: Any) -> None:
    with pytest.raises(UsageError, match="semantics must be one of slot, attention, got"):
        headprobe.check(small(), semantics=semantics)


@pytest.mark.parametrize("size", [32, (3, 32), ("3", 32, 32), (3, 32, 32.5), (3, 32, 0)])
def test_an_input_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match="input_size must be three whole numbers"):
        headprobe.check(small(), input_size=size)


def test_a_model_that_gives_nan_is_refused_for_that() -> None:
    model = small()
    model.head.bias.data[3] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite logits"), headprobe.ablate(model, "layer:0"):
        pass


def test_a_size_that_a_model_refuses_without_a_word_is_still_one_message() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    model = small()
    model.patch_embed = Silent()
    with pytest.raises(UsageError, match=r"does not take images of 3 x 32 x 32 \(AssertionError\)"):
        headprobe.check(model, input_size=SIZE)


def test_a_part_compiled_before_is_refused() -> None:
    model = small()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(UsageError, match="is compiled"):
        headprobe.check(model)


def test_a_model_that_cannot_be_copied_is_refused_by_check_and_masked_by_ablate() -> None:
    model = small()
    prune.l1_unstructured(model.blocks[1].attn.proj, "weight", 0.5)
    model(images())
    with pytest.raises(UsageError, match="cannot be copied"):
        headprobe.check(model)
    with torch.inference_mode(), headprobe.ablate(model, "layer:1"):
        model(images())


def test_a_replaced_forward_that_holds_the_original_is_refused_by_check() -> None:
    model = small()
    original = model.forward
    model.forward = lambda x: 2 * original(x)
    with pytest.raises(UsageError, match="does not call its own modules"):
        headprobe.check(model)


class LowRank(nn.Module):
    """A projection with a low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(192, 4, bias=False), nn.Linear(4, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("wrap", [weight_norm, LowRank])
def test_a_projection_that_is_more_than_its_weights_is_proven_at_the_operator(wrap: Any) -> None:
    model = small()
    model.blocks[1].attn.proj = wrap(model.blocks[1].attn.proj)
    report = headprobe.check(model)
    assert report.passed
    assert [layer.proofs["columns"].passed for layer in report.layers] == [True, None, True]


@pytest.mark.parametrize("key", ["levit", "tiny_vit", "efficientformer", "efficientvit_msra"])
@torch.inference_mode()
def test_a_check_leaves_no_bias_of_other_weights_in_timms_caches(key: str) -> None:
    model, other, fresh = build(key), build(key), build(key)
    perturbed(other, seed=5)
    size = REPRESENTATIVES[key].input_size
    headprobe.check(model, input_size=size)
    weights = copy.deepcopy(other.state_dict())
    model.load_state_dict(weights)
    fresh.load_state_dict(weights)
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(noise), fresh(noise))


@torch.inference_mode()
def test_parts_of_the_model_that_are_called_are_masked_too() -> None:
    model, without = small(), small()
    without.blocks[1].attn.proj.weight.zero_()
    with headprobe.ablate(model, "layer:1"):
        found = model.forward_features(images())
    torch.testing.assert_close(found, without.forward_features(images()), atol=1e-5, rtol=1e-5)


def test_pooling_by_prr_is_a_layer_of_its_own() -> None:
    model = timm.create_model("test_vit", global_pool="prr", class_token=False, num_classes=5)
    report = headprobe.check(model)
    assert report.passed
    assert report.layers[-1].layer.kind == "pool"
