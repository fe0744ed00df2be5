"""`convert`, on files that timm's own CheckpointSaver and others write."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import CheckpointSaver, ModelEmaV3

from headprobe.backbone.weights import ModelSource, create_classifier
from tests.cli_runs import command, only_message


def trained(folder: Path, name: str = "test_vit", *, compiled: bool = False, **arguments: Any) -> tuple[Any, Any]:
    """Save a checkpoint as timm's train.py does; return its model and the moving average."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    average = ModelEmaV3(model)
    with torch.no_grad():
        average.module.head.bias.add_(1.0)
    saved = torch.compile(model) if compiled else model
    args = argparse.Namespace(model=name, num_classes=4, **arguments)
    CheckpointSaver(
        model=saved, optimizer=torch.optim.SGD(model.parameters()), args=args, model_ema=average,
        checkpoint_dir=str(folder), recovery_dir=str(folder),
        unwrap_fn=(lambda one: one) if compiled else timm.utils.unwrap_model,
    ).save_checkpoint(0, metric=0.5)  # fmt: skip
    return model, average.module


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_of_train_py_becomes_weights_that_load(tmp_path: Path, compiled: bool) -> None:
    model, average = trained(tmp_path, compiled=compiled)
    taken = command(tmp_path, "convert", "model_best.pth.tar", "ema.safetensors")
    assert taken.code == 0, taken.err
    assert "weights: state_dict_ema, the moving average" in taken.out
    assert "headprobe test --model.name test_vit --model.weights ema.safetensors" in taken.out
    other = command(tmp_path, "convert", "model_best.pth.tar", "raw.safetensors", "--no-ema")
    assert ("_orig_mod" in other.out) == compiled
    for file, expected in (("ema", average), ("raw", model)):
        built = create_classifier(ModelSource("test_vit", str(tmp_path / f"{file}.safetensors"))).backbone
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())


def test_the_preprocessing_of_the_training_comes_along(tmp_path: Path) -> None:
    trained(tmp_path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.7, img_size=96, interpolation="bilinear")
    assert command(tmp_path, "convert", "model_best.pth.tar", "a.safetensors").code == 0
    config = create_classifier(ModelSource("test_vit", str(tmp_path / "a.safetensors"))).data_config
    assert list(config["mean"]) == [0.1, 0.2, 0.3]
    assert list(config["std"]) == [0.4, 0.5, 0.6]
    assert (config["crop_pct"], config["interpolation"], list(config["input_size"])) == (0.7, "bilinear", [3, 96, 96])


def test_no_file_is_replaced(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "a.safetensors").write_text("mine")
    refused = command(tmp_path, "convert", "model_best.pth.tar", "a.safetensors")
    assert refused.code == 2
    assert "must not exist yet" in only_message(refused)
    assert (tmp_path / "a.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.pth", "a.safetensors"), "does not exist"),
        (("model.pth", "a.bin"), "must be called NAME.safetensors, got 'a.bin'"),
        (("model.pth", "nowhere/a.safetensors"), "there is no folder 'nowhere'"),
        (("model.pth", "a.safetensors", "--key", "teacher"), "--key must name"),
    ],
)
def test_a_wrong_use_is_one_message(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    torch.save({"head.weight": torch.ones(2, 3)}, tmp_path / "model.pth")
    refused = command(tmp_path, "convert", *words)
    assert refused.code == 2
    assert message in only_message(refused)


def test_safetensors_with_a_prefix_are_converted_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {
        f"timm_model.{name}": value for name, value in timm.create_model("test_vit", num_classes=4).state_dict().items()
    }
    save_file(state, tmp_path / "wrapped.safetensors")
    refused = command(tmp_path, "test", "--model.name", "test_vit", "--model.weights", "wrapped.safetensors")
    assert "headprobe convert wrapped.safetensors OUT.safetensors" in only_message(refused)
    assert command(tmp_path, "convert", "wrapped.safetensors", "plain.safetensors").code == 0
    assert "head.weight" in load_file(tmp_path / "plain.safetensors")


def test_the_command_is_in_the_help(tmp_path: Path) -> None:
    assert "convert" in command(tmp_path, "--help").out


def test_it_prints_what_the_documentation_shows(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "own_model.md").read_text(encoding="utf-8")
    shown = page.partition("headprobe convert model_best.pth.tar my_model.safetensors\n")[2].partition("```")[0]
    trained(tmp_path, "vit_tiny_patch16_224")
    assert command(tmp_path, "convert", "model_best.pth.tar", "my_model.safetensors").out == shown
