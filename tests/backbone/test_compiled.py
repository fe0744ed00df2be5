import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from headprobe.backbone.compiled import compile_parts
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.errors import UsageError
from tests.backbone.growing.test_growing_pass import setup, single_head_masks


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without a compiler: the graphs are torch's own, no code is made from them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("eager")
@torch.inference_mode()
def test_masks_of_a_compiled_model_give_the_logits_of_the_model_as_it_was(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    joins, keep = find_joins(model, layout), single_head_masks(layout)

    def sweep() -> torch.Tensor:
        with GrowingPass(model, layout, joins, keep) as growing:
            plan = growing.plan(3, 30)
            return torch.cat([growing.logits(part, plan) for part in images.split(plan.images)], dim=1)

    expected = sweep()
    assert compile_parts(model, layout) >= 2 * len(layout.layers)
    torch.testing.assert_close(sweep(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("eager")
@torch.inference_mode()
def test_hooks_that_come_after_compiling_still_take_effect() -> None:
    model, layout, images = setup("vit")
    compile_parts(model, layout)
    before = model(images)
    block: Any = model.get_submodule("blocks.0")
    handle = block.mlp.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(model(images), before)
    handle.remove()
    assert torch.equal(model(images), before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
@torch.inference_mode()
def test_code_that_is_really_compiled_gives_the_same_logits() -> None:
    model, layout, images = setup("vit")
    expected = model(images)
    compile_parts(model, layout)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_a_machine_that_cannot_compile_is_told_so_and_the_model_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(forward: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand more")

        return call

    model, layout, images = setup("vit")
    expected = model(images)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"does not work for 'vit' on this machine \(no C\+\+ compiler\); leave"):
        compile_parts(model, layout)
    assert torch.equal(model(images), expected)


def test_compiled_code_that_gives_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(forward: Any, **_: Any) -> Any:
        return lambda *args: forward(*args) + 1

    model, layout, images = setup("vit")
    expected = model(images)
    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(UsageError, match="gives other logits when compiled"):
        compile_parts(model, layout)
    assert torch.equal(model(images), expected)


def test_parts_with_attention_are_never_compiled() -> None:
    from headprobe.backbone.compiled import _parts

    for kind in ("vit", "swin"):
        model, layout, _ = setup(kind)
        parts = list(_parts(model, layout))
        attention = [model.get_submodule(layer.name) for layer in layout.layers]
        assert parts
        assert not any(layer is inner for part in parts for inner in part.modules() for layer in attention)
        assert all(isinstance(part, nn.Module) for part in parts)
