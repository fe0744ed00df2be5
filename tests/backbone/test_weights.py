import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from headprobe.backbone.preparation import data_config
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone, save_backbone, weights_digest
from headprobe.errors import UsageError
from tests.conftest import tiny


def saved(tmp_path: Path, kind: str = "vit", classes: int = 7) -> Path:
    path = tmp_path / f"{kind}.safetensors"
    save_file(tiny(kind, classes).state_dict(), path)
    return path


def test_local_weights_give_the_same_logits_and_their_own_number_of_classes(tmp_path: Path) -> None:
    model = create_backbone(ModelSource("test_vit", str(saved(tmp_path))))
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(images), tiny("vit", 7)(images))


def test_weights_of_another_model_are_refused_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not those of 'vit_tiny_patch16_224': of 152 tensors .*missing.*--model"):
        create_backbone(ModelSource("vit_tiny_patch16_224", str(saved(tmp_path))))


def test_weights_without_a_classifier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "headless.safetensors"
    save_file({name: value for name, value in tiny("vit").state_dict().items() if "head" not in name}, path)
    with pytest.raises(UsageError, match=r"no classifier 'head.weight'"):
        create_backbone(ModelSource("test_vit", str(path)))


def test_files_that_are_not_safetensors_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UsageError, match="not readable as safetensors"):
        create_backbone(ModelSource("test_vit", str(path)))


def test_a_missing_weights_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"'nowhere.safetensors' does not exist"):
        create_backbone(ModelSource("test_vit", "nowhere.safetensors"))


def test_an_unknown_name_gets_near_misses() -> None:
    with pytest.raises(UsageError, match="no model called 'deit_tiny_patch16_22'; did you mean deit_tiny_patch16_224"):
        create_backbone(ModelSource("deit_tiny_patch16_22"))


def test_options_that_timm_refuses_are_named() -> None:
    with pytest.raises(UsageError, match=r"cannot build 'test_vit' with the options \{'nonsense': 1\}"):
        create_backbone(ModelSource("test_vit", pretrained=False, options={"nonsense": 1}))


def test_features_only_is_refused() -> None:
    with pytest.raises(UsageError, match="features_only"):
        create_backbone(ModelSource("test_vit", pretrained=False, options={"features_only": True}))


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_small_and_complete(name: str) -> None:
    model = create_backbone(ModelSource(name))
    assert model.num_classes == 10
    assert data_config(model)["input_size"] == (3, 32, 32)


def test_all_bundled_files_together_are_under_3_megabytes() -> None:
    folder = Path(create_backbone.__code__.co_filename).parents[1] / "data" / "digits"
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 3_000_000


def test_a_saved_model_carries_what_is_needed_to_build_it_again(tmp_path: Path) -> None:
    source = ModelSource("test_vit", pretrained=False, num_classes=4, options={"img_size": 64, "depth": 2})
    model = create_backbone(source)
    save_backbone(model, tmp_path / "model.safetensors", source)
    again = create_backbone(ModelSource("test_vit", str(tmp_path / "model.safetensors")))
    assert weights_digest(again) == weights_digest(model)
    with pytest.raises(UsageError, match=r"were trained as 'test_vit'; give --model.name test_vit, got 'test_vit2'"):
        create_backbone(ModelSource("test_vit2", str(tmp_path / "model.safetensors")))


def test_the_digest_sees_every_value_and_no_place() -> None:
    one, same, other = tiny("vit"), tiny("vit"), tiny("vit")
    with torch.no_grad():
        other.blocks[0].attn.proj.bias[0] += 1e-6
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)


def test_the_image_size_is_the_one_the_model_was_built_for() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=96)
    assert data_config(model)["input_size"] == (3, 96, 96)


def test_the_recipe_is_plain_json(tmp_path: Path) -> None:
    from safetensors import safe_open

    source = ModelSource("test_vit", pretrained=False, num_classes=4)
    save_backbone(create_backbone(source), tmp_path / "model.safetensors", source)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["headprobe"]) == {"name": "test_vit", "num_classes": 4, "options": {}}


def test_a_users_overlay_changes_only_what_it_names() -> None:
    model = create_backbone(ModelSource("digits_swin", options={"pretrained_cfg_overlay": {"crop_pct": 0.9}}))
    config = data_config(model)
    assert (config["crop_pct"], list(config["mean"])) == (0.9, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", ["digits_vit", "vit_tiny_patch16_224"])
def test_a_bundled_model_trained_again_can_be_loaded_by_either_name(tmp_path: Path, name: str) -> None:
    source = ModelSource("digits_vit", pretrained=False)
    model = create_backbone(source)
    save_backbone(model, tmp_path / "model.safetensors", source)
    again = create_backbone(ModelSource(name, str(tmp_path / "model.safetensors")))
    assert weights_digest(again) == weights_digest(model)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("option", ["pretrained_cfg_overlay", "pretrained_cfg"])
@pytest.mark.parametrize(
    "entry", ["file", "url", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load"]
)
def test_weights_are_not_taken_from_an_option(option: str, entry: str, pretrained: bool) -> None:
    options = {option: {entry: "other.pth"}}
    with pytest.raises(UsageError, match=rf"model.options.{option}.{entry} is not read.*--model.weights"):
        create_backbone(ModelSource("test_vit", pretrained=pretrained, options=options))


def test_pretrained_is_no_option() -> None:
    with pytest.raises(UsageError, match=r"--model.pretrained false"):
        create_backbone(ModelSource("test_vit", options={"pretrained": False}))
