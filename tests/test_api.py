"""`headprobe.check` and `headprobe.ablate` on a model that a user holds."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import headprobe
from headprobe.backbone.sandbox import HOOKS, hook_count, quiet
from headprobe.errors import RunError, UsageError
from tests.conftest import tiny

SIZE = (3, 160, 160)


def images(count: int = 2, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def without_heads(model: Any, layer: int) -> Any:
    """The oracle: a copy whose output projection of one layer is zero but for its bias."""
    other = copy.deepcopy(model)
    other.blocks[layer].attn.proj.weight.data.zero_()
    return other


@torch.inference_mode()
def test_a_masked_layer_gives_the_logits_of_a_layer_without_weights() -> None:
    model = tiny("vit")
    expected = without_heads(model, 3)(images())
    with headprobe.ablate(model, "layer:3"):
        found = model(images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_afterwards_the_model_is_as_before() -> None:
    model = tiny("vit")
    plain = model(images())
    with headprobe.ablate(model, "layer:3"):
        assert not torch.equal(model(images()), plain)
    assert torch.equal(model(images()), plain)
    assert hook_count(model) == 0


@torch.inference_mode()
def test_also_after_an_exception_inside() -> None:
    model = tiny("vit")
    with pytest.raises(KeyError), headprobe.ablate(model, "layer:3"):
        raise KeyError
    assert hook_count(model) == 0


@torch.inference_mode()
def test_nested_masks_take_the_heads_of_both() -> None:
    model = tiny("vit")
    with headprobe.ablate(model, "layer:1+layer:3"):
        expected = model(images())
    with headprobe.ablate(model, "layer:1"), headprobe.ablate(model, "layer:3"):
        assert torch.equal(model(images()), expected)


@torch.inference_mode()
def test_own_hooks_see_the_masked_model_and_never_the_noise_of_the_proofs() -> None:
    model = tiny("vit")
    seen: list[Tensor] = []
    handle = model.blocks[3].attn.register_forward_hook(lambda _, __, out: seen.append(out))
    with headprobe.ablate(model, "layer:3"):
        assert seen == []
        model(images())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model.blocks[3].attn.proj.bias.expand_as(seen[0]))
    headprobe.check(model)
    assert len(seen) == 1
    handle.remove()
    assert hook_count(model) == 0


def test_hooks_are_put_back_in_their_order() -> None:
    model = nn.Linear(2, 2)
    order: list[str] = []
    for name in "abc":
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    with quiet(model):
        model(torch.zeros(1, 2))
    assert order == []
    model(torch.zeros(1, 2))
    assert order == ["a", "b", "c"]


def test_torch_keeps_hooks_where_quiet_looks_for_them() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None)
    assert [len(getattr(model, name)) for name in HOOKS] == [1, 1]


def test_gradients_flow_through_a_mask() -> None:
    model = tiny("vit")
    with headprobe.ablate(model, "head:3.0"):
        model(images()).sum().backward()
    by_head = model.blocks[3].attn.proj.weight.grad.unflatten(1, (2, -1)).abs().amax(dim=(0, 2))
    assert by_head[0] == 0 < by_head[1]


@torch.inference_mode()
def test_a_mask_under_which_nothing_ran_is_an_error() -> None:
    model, other = tiny("vit"), tiny("vit")
    with (
        pytest.raises(RunError, match=r"no forward pass of .* ran under layer:3"),
        headprobe.ablate(model, "layer:3"),
    ):
        other(images())


@torch.inference_mode()
def test_a_forward_pass_that_skips_a_layer_is_an_error() -> None:
    model = tiny("vit")
    with headprobe.ablate(model, "layer:3"):
        model(images())
        model.blocks[3].attn.forward = lambda x, *_, **__: x
        with pytest.raises(RunError, match=r"blocks\.3\.attn.* 0 times"):
            model(images())


@torch.inference_mode()
def test_a_model_compiled_inside_the_context_is_masked() -> None:
    model = tiny("vit")
    with headprobe.ablate(model, "layer:3"):
        expected = model(images())
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images()), expected)


@pytest.mark.parametrize("call", [headprobe.check, lambda model: headprobe.ablate(model, "layer:0").__enter__()])
def test_a_model_compiled_before_is_refused(call: Any) -> None:
    with pytest.raises(UsageError, match="is compiled, so hooks would be ignored"):
        call(torch.compile(tiny("vit"), backend="eager"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("each:layer", "a spec of one mask and one ablation, got each:layer under zero with 6 variants"),
        ("layer:9", "has no layer 9"),
    ],
)
def test_a_spec_that_does_not_suit_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message), headprobe.ablate(tiny("vit"), spec):
        pass


def test_features_only_is_refused() -> None:
    model = timm.create_model("test_vit", features_only=True)
    with pytest.raises(UsageError, match="build it without features_only"):
        headprobe.check(model, input_size=SIZE)


def test_half_precision_and_other_sizes_are_checked_too() -> None:
    model = timm.create_model("test_vit", dynamic_img_size=True, num_classes=5).to(torch.bfloat16)
    report = headprobe.check(model, input_size=(3, 96, 64))
    assert report.passed
    assert report.input_size == (3, 96, 64)
    with torch.inference_mode(), headprobe.ablate(model, "layer:0", input_size=(3, 96, 64)):
        assert model.eval()(images(1, (3, 96, 64)).bfloat16()).shape == (1, 5)


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", "map", ""])
def test_every_kind_of_global_pooling_can_be_checked(pool: str) -> None:
    options: dict[str, Any] = (
        {"class_token": False, "fc_norm": False} if pool in ("map", "avg", "avgmax", "max") else {}
    )
    model = timm.create_model("test_vit", global_pool=pool, num_classes=5, **options)
    assert headprobe.check(model).passed


def test_the_report_prints_as_the_command_does() -> None:
    text = str(headprobe.check(tiny("vit")))
    assert text.startswith("test_vit (3 x 160 x 160): 6 layers, 12 heads\n")
    assert "every proof passed" in text


@pytest.mark.parametrize("spec", [["layer:1"], None, 5])
def test_what_is_no_spec_is_refused_in_one_line(spec: Any) -> None:
    with pytest.raises(UsageError, match="a mask spec must be text"), headprobe.ablate(tiny("vit"), spec):
        pass
