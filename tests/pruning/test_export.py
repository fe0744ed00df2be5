"""A pruned model leaves PyTorch: torch.export and ONNX give its logits, also where layers have no heads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headprobe.backbone.sandbox import example_images, relative
from headprobe.pruning.load import load_pruned
from tests.families import REPRESENTATIVES
from tests.pruning.test_saving import saved

NAMES = ("vit", "vit_registers", "swin", "swin_v2", "eva", "dinov3", "beit", "rope_mixed")


def unfuse(model: Any) -> None:
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False


@pytest.mark.parametrize("mask", ["different numbers", "whole layer"])
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_gives_the_same_logits(tmp_path: Path, name: str, mask: str) -> None:
    saved(tmp_path / "small", name, mask)
    model = load_pruned(tmp_path / "small")
    images = example_images(model, REPRESENTATIVES[name].input_size, 2)
    exported = torch.export.export(model, (images,)).module()
    with torch.inference_mode():
        assert relative(exported(images), model(images)) < 1e-4


@pytest.mark.parametrize("mask", ["different numbers", "whole layer"])
@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_gives_the_same_logits(tmp_path: Path, name: str, mask: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is absent: pip install headprobe[test]")
    pytest.importorskip("onnxscript", reason="onnxscript is absent, by which PyTorch writes ONNX")
    saved(tmp_path / "small", name, mask)
    model = load_pruned(tmp_path / "small")
    if name == "beit":  # torch 2.14 cannot write the fused attention with biases of timm's own BEiT either
        unfuse(model)
    images = example_images(model, REPRESENTATIVES[name].input_size, 2)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), str(file), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        assert relative(torch.from_numpy(found), model(images)) < 1e-4


def test_an_exported_program_takes_any_number_of_images(tmp_path: Path) -> None:
    saved(tmp_path / "small", "vit", "whole layer")
    model = load_pruned(tmp_path / "small")
    images = example_images(model, (3, 64, 64), 5)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
    with torch.inference_mode():
        assert relative(exported(images), model(images)) < 1e-4


def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    saved(tmp_path / "small", "dinov3", "whole layer")
    model = load_pruned(tmp_path / "small")
    images = example_images(model, (3, 64, 96), 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert relative(compiled(images), model(images)) < 1e-4
