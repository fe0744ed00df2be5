"""A timm model in hand loses heads, is saved and loaded, in Python alone."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import headprobe
from headprobe.backbone.sandbox import relative
from headprobe.errors import RunError, UsageError
from tests.conftest import TINY, tiny


@pytest.mark.parametrize("name", ["vit", "distilled", "swin", "dinov3", "swin_v2"])
def test_a_smaller_copy_computes_what_ablate_makes_the_model_compute(tmp_path: Path, name: str) -> None:
    model, size = tiny(name), (3, 160, 160) if name == "vit" else (3, 64, 64)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    spec = "head:0.1+layer:1"
    with torch.inference_mode():
        before = model(images)
        with headprobe.ablate(model, spec, input_size=size):
            expected = model(images)
        smaller = headprobe.remove_heads(model, spec, input_size=size)
        assert relative(smaller(images), expected) < 1e-5
        assert torch.equal(model(images), before)
    headprobe.save_pruned(smaller, tmp_path / "small", TINY[name][1])
    with torch.inference_mode():
        assert torch.equal(headprobe.load_pruned(tmp_path / "small")(images), smaller(images))


def test_a_model_that_its_options_do_not_build_is_not_saved(tmp_path: Path) -> None:
    smaller = headprobe.remove_heads(tiny("swin"), "head:0.1", input_size=(3, 64, 64))
    options: dict[str, Any] = {**TINY["swin"][1], "mlp_ratio": 3.0}
    with pytest.raises(UsageError, match="are not those of"):
        headprobe.save_pruned(smaller, tmp_path / "small", options)
    other = {**TINY["swin"][1], "img_size": 128}
    with pytest.raises(RunError, match="is not the one that was made"):
        headprobe.save_pruned(smaller, tmp_path / "small", other)
    smaller.layers[0].blocks[0].mlp.act = torch.nn.ReLU()  # type: ignore[index,union-attr]
    with pytest.raises(RunError, match="is not the one that was made"):
        headprobe.save_pruned(smaller, tmp_path / "small", TINY["swin"][1])
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_pruned_model_or_no_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes a model that remove_heads returned"):
        headprobe.save_pruned(timm.create_model("test_vit"), tmp_path / "small")
    with pytest.raises(UsageError, match="must hit heads that are to be removed, got random:0"):
        headprobe.remove_heads(tiny("vit"), "random:0")
    with pytest.raises(UsageError, match="expected a spec of one mask and one ablation"):
        headprobe.remove_heads(tiny("vit"), "each:layer")
    with pytest.raises(UsageError, match="the ablation mean needs constants"):
        headprobe.remove_heads(tiny("vit"), "layer:1", ablation="mean")
    with pytest.raises(UsageError, match=r"a model must be a torch\.nn\.Module"):
        headprobe.remove_heads("digits_vit", "layer:1")  # type: ignore[arg-type]
