"""Models whose forward pass needs gradients are proven with gradients on, and nothing of it remains."""

import copy
import gc
import weakref
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import headprobe
from headprobe.errors import UsageError

SIZE = (3, 32, 32)
WAYS = ("register_hook", "retain_grad", "autograd.grad", "backward")


class Explained(nn.Module):
    """timm's attention written out, with the map and its gradient kept, as code for relevance maps does."""

    def __init__(self, built: Any, way: str) -> None:
        super().__init__()
        self.num_heads, self.scale, self.qkv, self.proj = built.num_heads, built.scale, built.qkv, built.proj
        self.way = way
        self.attention: Tensor | None = None
        self.gradient: Tensor | None = None
        self.maps: list[Tensor] = []

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def forward(self, x: Tensor, **_: object) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        self.attention = attention
        self.maps.append(attention)
        together = (attention @ v).transpose(1, 2).reshape(rows, tokens, width)
        if self.way == "register_hook":
            attention.register_hook(self.keep)
        elif self.way == "retain_grad":
            attention.retain_grad()
        elif self.way == "autograd.grad":
            (self.gradient,) = torch.autograd.grad(together.sum(), attention, retain_graph=True)
        elif self.way == "backward":
            together.sum().backward(retain_graph=True)
        out: Tensor = self.proj(together)
        return out


def small(way: str = "") -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
    for block in model.blocks:
        block.attn = Explained(block.attn, way)
    return model


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))


def state_of(model: nn.Module) -> list[object]:
    """All that a forward pass may leave behind: attributes, lists, gradients, modes, hooks."""
    parameters = [(one.requires_grad, one.grad is None) for one in model.parameters()]
    attributes = [{name: id(value) for name, value in vars(part).items()} for part in model.modules()]
    maps = [[id(kept) for kept in part.maps] for part in model.modules() if isinstance(part, Explained)]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    return [parameters, attributes, maps, hooks]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ran_before", [False, True])
def test_such_a_model_passes_the_proofs_and_is_left_as_it_was(way: str, frozen: bool, ran_before: bool) -> None:
    model = small(way).requires_grad_(not frozen)
    if ran_before:
        model(images().requires_grad_()).sum().backward()
    before = state_of(model)

    report = headprobe.check(model)
    assert report.passed, report.failures
    assert {one.proofs["join"].passed for one in report.layers} == {None}
    assert {one.proofs["keep"].passed and one.proofs["operator"].passed for one in report.layers} == {True}
    assert state_of(model) == before
    with headprobe.ablate(model, "layer:1"):
        assert state_of(model)[:3] == before[:3]
        model(images().requires_grad_())


@pytest.mark.parametrize("way", ["register_hook", "retain_grad"])
def test_the_gradients_under_a_mask_are_those_of_a_model_without_the_heads(way: str) -> None:
    model, plain = small(way), small()
    without = copy.deepcopy(plain)
    without.blocks[1].attn.proj.weight.data[:, :64] = 0  # the columns of head 1.0
    with headprobe.ablate(model, "head:1.0"):
        found = model(images())
        found[:, 0].sum().backward()
    expected = without(images())
    expected[:, 0].sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight.grad, without.blocks[0].attn.qkv.weight.grad, atol=1e-5, rtol=1e-4
    )
    kept = model.blocks[1].attn
    gradient = kept.gradient if way == "register_hook" else kept.attention.grad
    assert gradient is not None
    by_head = gradient.abs().amax(dim=(0, 2, 3))
    assert by_head[0] == 0 < by_head[1]


def test_an_own_gradient_stays_as_it_is() -> None:
    model = small("backward")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    headprobe.check(model)
    with headprobe.ablate(model, "layer:0"):
        assert all(bool((one.grad == 7).all()) for one in model.parameters())
        model(images())


def test_no_copy_of_the_model_outlives_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    original = Explained.forward

    def noted(self: Explained, x: Tensor, **kwargs: object) -> Tensor:
        out = original(self, x, **kwargs)
        assert self.attention is not None
        made.append(weakref.ref(self.attention))
        return out

    monkeypatch.setattr(Explained, "forward", noted)
    headprobe.check(small("register_hook"))
    gc.collect()
    assert made
    assert not [ref for ref in made if ref() is not None]


def test_half_precision_and_a_callers_inference_mode_are_no_hindrance() -> None:
    model = small("register_hook").bfloat16()
    with headprobe.ablate(model, "layer:1"):
        model(images().bfloat16()).sum().backward()
    model = small("register_hook")
    with torch.inference_mode():
        assert headprobe.check(model).passed


def test_a_wrong_size_of_such_a_model_is_said_to_be_a_wrong_size() -> None:
    with pytest.raises(UsageError, match=r"does not take images of 3 x 48 x 48 .*Input height"):
        headprobe.check(small("register_hook"), input_size=(3, 48, 48))


def test_a_model_that_fails_with_gradients_too_is_said_to_need_them() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not x.requires_grad:
                x.register_hook(print)
            raise RuntimeError("no such thing")

    model = small()
    model.norm = Never()
    with pytest.raises(UsageError, match=r"needs gradients \(cannot register a hook .*\(no such thing\)"):
        headprobe.check(model)


def test_a_test_refuses_such_a_model_and_speaks_of_gradients_not_of_sizes() -> None:
    probe = headprobe.HeadProbe("digits_vit")
    probe.backbone, probe.data_config["input_size"] = small("retain_grad"), SIZE
    with pytest.raises(UsageError, match=r"forward pass of model 'digits_vit' needs gradients, .* headprobe\.ablate"):
        probe.choose_masks("layer:1")


def test_what_a_model_without_gradients_keeps_of_noise_is_taken_back_too() -> None:
    model = small()
    with headprobe.ablate(model, "layer:1"):
        assert [part.maps for part in model.modules() if isinstance(part, Explained)] == [[], []]
        model(images())
    assert len(model.blocks[0].attn.maps) == 1
