"""Own weights at another size, with names of other programs, and those that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from headprobe.backbone.checkpoints import find_weights
from headprobe.backbone.weights import ModelSource, create_classifier
from headprobe.errors import UsageError
from tests.backbone.hub_cache import offline, released
from tests.conftest import tiny

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def saved(path: Path, name: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {key: value + 0.01 for key, value in timm.create_model(name, **options).state_dict().items()}
    save_file(state, path)
    return state


def test_a_position_embedding_is_resampled_as_timm_does_for_its_own_and_said(tmp_path: Path) -> None:
    file = tmp_path / "at32.safetensors"
    saved(file, "vit_tiny_patch16_224", num_classes=10, img_size=32, **VIT)
    ours = create_classifier(ModelSource("vit_tiny_patch16_224", str(file), options={**VIT, "img_size": 64}))
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, num_classes=10, img_size=64, **VIT,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 10},
    )  # fmt: skip
    own, other = ours.backbone.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in other)
    (said,) = (decision for decision in ours.decisions if decision.about == "weights made to fit")
    assert said.shown
    assert "resampled pos_embed from [1, 17, 48] to [1, 65, 48]" in said.text
    assert list(ours.data_config["input_size"]) == [3, 64, 64]
    assert "state_dict" not in ours.backbone.pretrained_cfg  # type: ignore[operator]  # a dict


def test_tables_of_relative_positions_are_resampled(tmp_path: Path) -> None:
    name, file = "swin_tiny_patch4_window7_224", tmp_path / "swin.safetensors"
    saved(file, name, num_classes=5, img_size=64, window_size=4, **SWIN)
    made = create_classifier(ModelSource(name, str(file), options={"img_size": 128, "window_size": 8, **SWIN}))
    (said,) = (decision for decision in made.decisions if decision.about == "weights made to fit")
    assert "relative_position_bias_table from [49, 2] to [225, 2] and 3 other tensors" in said.text
    assert made.num_classes == 5


def test_names_of_an_official_release_are_accepted(tmp_path: Path) -> None:
    # MAE's and DINO's names are timm's; BEiT's release keeps relative positions that timm computes
    name, options = "beit_base_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2}
    state = saved(tmp_path / "plain.safetensors", name, num_classes=6, **options)
    index = torch.zeros(17, 17, dtype=torch.int64)
    save_file({**state, "blocks.0.attn.relative_position_index": index}, tmp_path / "beit.safetensors")
    made = create_classifier(ModelSource(name, str(tmp_path / "beit.safetensors"), options=options))
    assert made.num_classes == 6
    (said,) = (decision for decision in made.decisions if decision.about == "weights made to fit")
    assert "left out 1 tensor" in said.text


def test_weights_that_fit_are_loaded_as_they_are(tmp_path: Path) -> None:
    state = saved(tmp_path / "a.safetensors", "test_vit", num_classes=4)
    made = create_classifier(ModelSource("test_vit", str(tmp_path / "a.safetensors")))
    assert all(torch.equal(value, state[key]) for key, value in made.backbone.state_dict().items())
    assert [decision.about for decision in made.decisions] == ["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "have 'module.' from a wrapper"),
        (lambda state: {f"model.timm_model.{key}": value for key, value in state.items()}, "'model.timm_model.'"),
        (lambda state: {f"model.{k}": v for k, v in state.items()} | {"loss.weight": torch.ones(3)}, "'model.'"),
        (lambda state: {key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in state.items()}, "_orig_mod"),
        (lambda state: state | {"extra": torch.ones(1)}, r"1 unknown \(first: extra\)"),
        (lambda state: {k: v for k, v in state.items() if k != "norm.bias"}, r"1 missing \(first: norm.bias\)"),
        (lambda state: {k: v for k, v in state.items() if "head" not in k}, "have no classifier 'head.weight'"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path, change: Any, message: str) -> None:
    state = saved(tmp_path / "a.safetensors", "test_vit", num_classes=4)
    file = tmp_path / "b.safetensors"
    save_file(change(state), file)
    with pytest.raises(UsageError, match=message) as refused:
        create_classifier(ModelSource("test_vit", str(file)))
    if "wrapper" in message or "'model" in message or "_orig" in message:
        assert f"headprobe convert {file} OUT.safetensors" in str(refused.value)


def test_another_number_of_classes_than_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved(file, "test_vit", num_classes=4)
    with pytest.raises(UsageError, match=r"has 4 classes; leave the number of classes out, .*got num_classes 7"):
        create_classifier(ModelSource("test_vit", str(file), num_classes=7))


def test_a_folder_and_a_pickle_are_refused_with_the_remedy(tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors", "test_vit", num_classes=4)
    with pytest.raises(UsageError, match=r"is a folder; .*local-dir:.*--model.weights .*model.safetensors"):
        create_classifier(ModelSource("test_vit", str(tmp_path)))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"headprobe convert .*model.pth OUT.safetensors"):
        create_classifier(ModelSource("test_vit", str(tmp_path / "model.pth")))


def _decided(source: ModelSource) -> dict[str, tuple[str, bool]]:
    return {one.about: (one.text, one.shown) for one in create_classifier(source).decisions}


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "int8.safetensors"
    save_file({name: (value * 10).to(torch.int8) for name, value in tiny("vit").state_dict().items()}, file)
    with pytest.raises(UsageError, match=r"whole numbers.* as int8"):
        create_classifier(ModelSource("test_vit", str(file)))
    with pytest.raises(UsageError, match=r"whole numbers.* as int8"):
        find_weights(load_file(file))


def test_another_type_of_floating_point_is_said(tmp_path: Path) -> None:
    file = tmp_path / "double.safetensors"
    save_file({name: value.double() for name, value in tiny("vit", 7).state_dict().items()}, file)
    text, shown = _decided(ModelSource("test_vit", str(file)))["types of weights"]
    assert "of float64 as float32" in text
    assert not shown
    save_file(tiny("vit", 7).state_dict(), tmp_path / "single.safetensors")
    assert "types of weights" not in _decided(ModelSource("test_vit", str(tmp_path / "single.safetensors")))


def test_other_heads_than_those_of_the_recipe_are_said() -> None:
    own = create_classifier(ModelSource("digits_vit")).options["num_heads"]
    found = _decided(ModelSource("digits_vit", options={"num_heads": 2 * own}))
    assert found["options"] == (f"num_heads {2 * own} where the weights' own recipe has {own}", True)
    assert "options" not in _decided(ModelSource("digits_vit", options={"num_heads": own}))


def test_other_heads_than_those_of_a_config_are_said(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, depth=1, embed_dim=48, num_heads=3)
    save_for_hf(model, str(tmp_path / "mine"), safe_serialization=True)
    found = _decided(ModelSource(f"local-dir:{tmp_path / 'mine'}", options={"num_heads": 6}))
    assert found["options"] == ("num_heads 6 where its config.json has 3", True)


def test_options_beside_released_weights_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released(tmp_path, "test_vit")
    offline(monkeypatch, tmp_path)
    text, shown = _decided(ModelSource("test_vit", options={"num_heads": 4}))["options"]
    assert "num_heads 4, given beside the released weights" in text
    assert shown
