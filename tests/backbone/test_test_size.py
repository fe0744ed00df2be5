"""The image size of a run is the one that timm tests a model with."""

from typing import Any

import pytest
import timm
from timm.data import resolve_data_config

from headprobe.backbone.preparation import data_config
from headprobe.backbone.weights import ModelSource, create_classifier

HYBRID = "mobilenetv4_hybrid_medium.e500_r224_in1k"
TESTED = timm.list_models("edgenext*", pretrained=True)[:2]


def by_validate(name: str) -> dict[str, Any]:
    """Return the transform of timm's validate.py, which knows the configuration alone."""
    return resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=True)


@pytest.mark.parametrize("name", [HYBRID, *TESTED, "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_images_are_prepared_as_validate_py_does(name: str) -> None:
    ours = create_classifier(ModelSource(name, pretrained=False)).data_config
    assert {key: tuple(ours[key]) if key == "input_size" else ours[key] for key in by_validate(name)} == by_validate(
        name
    )


def test_another_size_in_tests_is_said_with_the_option_for_that_of_training() -> None:
    tested = create_classifier(ModelSource(HYBRID, pretrained=False))
    (said,) = (decision for decision in tested.decisions if decision.about == "image size")
    assert said.shown
    assert said.text.startswith("256 x 256 pixels with crop_pct 1, as timm tests it")
    assert "--model.train_size true" in said.text
    trained = create_classifier(ModelSource(HYBRID, pretrained=False, train_size=True))
    assert (tuple(trained.data_config["input_size"]), trained.data_config["crop_pct"]) == ((3, 224, 224), 0.95)


def test_nothing_is_said_of_a_model_with_one_size() -> None:
    decisions = create_classifier(ModelSource("test_vit", pretrained=False)).decisions
    assert "image size" not in {decision.about for decision in decisions}


@pytest.mark.parametrize("train_size", [False, True])
def test_a_size_and_crop_that_the_user_gives_are_used(train_size: bool) -> None:
    overlay = {"input_size": [3, 192, 192], "crop_pct": 0.875}
    source = ModelSource(HYBRID, pretrained=False, options={"pretrained_cfg_overlay": overlay}, train_size=train_size)
    config = create_classifier(source).data_config
    assert (list(config["input_size"]), config["crop_pct"]) == ([3, 192, 192], 0.875)


def test_a_model_built_for_one_size_is_tested_at_it() -> None:
    overlay = {"test_input_size": (3, 192, 192)}
    fixed = timm.create_model("test_vit", dynamic_img_size=False, pretrained_cfg_overlay=overlay)
    assert tuple(data_config(fixed)["input_size"]) == (3, 160, 160)
    flexible = timm.create_model("test_vit", dynamic_img_size=True, pretrained_cfg_overlay=overlay)
    assert tuple(data_config(flexible)["input_size"]) == (3, 192, 192)
    assert tuple(data_config(flexible, train_size=True)["input_size"]) == (3, 160, 160)
