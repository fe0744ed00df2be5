"""Models on which little or nothing can be proven: one line, never a traceback."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import headprobe
from headprobe.errors import UsageError
from tests.conftest import tiny

SIZE = (3, 32, 32)


def small() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("call", [headprobe.check, lambda model: headprobe.ablate(model, "layer:0").__enter__()])
def test_a_model_with_any_weight_on_the_meta_device_is_refused(call: Any) -> None:
    with torch.device("meta"):
        whole = small()
    part = small()
    part.blocks[1].to("meta")
    for model, first in ((whole, "cls_token"), (part, "blocks.1.norm1.weight")):
        with pytest.raises(UsageError, match=f"is on the meta device .* load its weights .* got '{first}' on meta"):
            call(model)


def test_a_headprobe_built_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        probe = headprobe.HeadProbe("test_vit", pretrained=False)
    with pytest.raises(UsageError, match="model 'test_vit' is on the meta device"):
        probe.choose_masks("layer:0")


class Int8(Tensor):
    """A weight of a class of its own that cannot be written, as torchao's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("add_", "copy_", "__setitem__", "index_put_"):
            raise NotImplementedError(f"Int8 dispatch: {name}")
        out = super().__torch_function__(func, types, args, kwargs or {})
        own = name in ("__get__", "detach", "clone", "to", "float", "requires_grad_")
        return out.as_subclass(Tensor) if isinstance(out, cls) and not own else out

    def __deepcopy__(self, memo: Any) -> "Int8":
        return self.clone()  # type: ignore[return-value]  # torch: Tensor


def quantised() -> Any:
    model = small()
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.data.as_subclass(Int8), requires_grad=False)
    return model


def test_quantised_weights_are_proven_as_they_are_and_said_to_be() -> None:
    model, plain = quantised(), small()
    report = headprobe.check(model)
    assert report.passed, report.failures
    assert "8 weights of the class Int8 (quantised) could not be perturbed" in str(report)
    assert [one.proofs["columns"].passed for one in report.layers] == [None, None]
    with torch.inference_mode():
        with headprobe.ablate(plain, "layer:1"):
            expected = plain(images())
        with headprobe.ablate(model, "layer:1"):
            torch.testing.assert_close(model(images()).as_subclass(Tensor), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamically_quantised_layers_are_masked_and_check_says_that_rows_influence_each_other() -> None:
    model: Any = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    report = headprobe.check(model)
    assert {failure.split(": ")[1] for failure in report.failures} <= {"rows", "join"}
    with torch.inference_mode(), headprobe.ablate(model, "layer:1"):
        model(images())


@pytest.mark.parametrize("kind", ["half", "training", "frozen", "shared"])
def test_half_precision_training_frozen_and_shared_weights_are_no_hindrance(kind: str) -> None:
    model = small()
    if kind == "half":
        model = model.half()
    elif kind == "training":
        model.train()
    elif kind == "frozen":
        model.requires_grad_(False)
    else:
        model.blocks[1].attn.qkv = model.blocks[0].attn.qkv
        model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight
    modes = [part.training for part in model.modules()]
    assert headprobe.check(model).passed
    with torch.inference_mode(), headprobe.ablate(model, "layer:1"):
        assert model(images().to(next(model.parameters()).dtype)).shape == (2, 10)
    assert [part.training for part in model.modules()] == modes


def test_a_type_that_the_device_cannot_compute_is_not_said_to_be_a_size() -> None:
    class NoHalf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float16:
                raise RuntimeError("\"layer_norm\" not implemented for 'Half'")
            return x

    model = small().half()
    model.norm = NoHalf()
    with pytest.raises(UsageError, match=r"does not run in torch\.float16 on cpu .*; use float32"):
        headprobe.check(model)


def test_one_layer_that_runs_twice_is_refused() -> None:
    model = tiny("vit")
    model.blocks[1].attn = model.blocks[0].attn
    with pytest.raises(UsageError, match="more than once"):
        headprobe.check(model)
