"""timm's pretrained weights: what they do not fill is never scored, and what timm adapts is said."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from headprobe.backbone.pretrained import watched_loads
from headprobe.backbone.weights import ModelSource, create_backbone, create_classifier
from headprobe.errors import UsageError
from headprobe.module import HeadProbe
from headprobe.text import Decision
from tests.backbone.hub_cache import offline, released

DINO = "vit_small_patch14_dinov2"
SMALL = {"img_size": 56, "embed_dim": 48, "num_heads": 3, "depth": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    offline(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


def told(source: ModelSource) -> dict[str, Decision]:
    return {decision.about: decision for decision in create_classifier(source).decisions}


@pytest.mark.parametrize("asked", [{"num_classes": 10}, {"options": {"num_classes": 10}}])
def test_a_classifier_that_timm_would_start_anew_is_refused(cache: Path, asked: dict[str, Any]) -> None:
    released(cache, "test_vit")
    with pytest.raises(UsageError, match=r"1,000 classes, and timm would start a new, random classifier \(head.weight"):
        create_classifier(ModelSource("test_vit", **asked))


def test_a_classifier_for_weights_without_one_is_refused(cache: Path) -> None:
    released(cache, DINO, dict(timm.create_model(DINO, **SMALL).state_dict()))
    with pytest.raises(UsageError, match=r"have no classifier, and timm would start a new.*got num_classes 10"):
        create_classifier(ModelSource(DINO, num_classes=10, options=SMALL))
    with pytest.raises(UsageError, match="has no classifier to score: its weights were trained without one"):
        create_classifier(ModelSource(DINO, options=SMALL))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_values": 0.1}, "ls1.gamma"),
        ({"qk_norm": True}, "q_norm.weight"),
        ({"global_pool": "map"}, "attn_pool"),
        ({"fc_norm": True}, "fc_norm.weight"),
        ({"reg_tokens": 4}, "reg_token"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token|pos_embed"),
        ({"depth": 8}, "blocks.6"),
        ({"depth": 2}, "the model lacks blocks"),
        ({"embed_dim": 96}, "size mismatch"),
    ],
)
def test_options_that_need_other_weights_are_refused_by_name(cache: Path, options: dict[str, Any], named: str) -> None:
    released(cache, "test_vit")
    with pytest.raises(UsageError, match=named) as refused:
        create_classifier(ModelSource("test_vit", options=options))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"got {options}")


def test_a_norm_that_no_weights_fill_is_refused_where_timm_itself_is_lenient(cache: Path) -> None:
    # timm loads SigLIP's weights leniently if the pooling is another
    name, size = "vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2}
    released(cache, name, dict(timm.create_model(name, num_classes=0, **size).state_dict()))
    with pytest.raises(UsageError, match="random"):
        create_classifier(ModelSource(name, num_classes=10, options={**size, "global_pool": "avg", "fc_norm": True}))


def test_weights_that_fill_the_whole_model_are_taken(cache: Path) -> None:
    state = released(cache, "test_vit")
    classifier = create_classifier(ModelSource("test_vit", num_classes=1000))
    assert all(torch.equal(value, state[key]) for key, value in classifier.backbone.state_dict().items())
    assert not any(decision.shown for decision in classifier.decisions)


def test_a_model_that_is_not_scored_may_have_a_new_classifier(cache: Path) -> None:
    released(cache, "test_vit")
    assert create_backbone(ModelSource("test_vit", num_classes=10)).num_classes == 10
    assert create_classifier(ModelSource("test_vit", num_classes=10), trained=False).num_classes == 10


def test_a_first_layer_for_other_channels_is_timms_and_said(cache: Path) -> None:
    state = released(cache, "test_vit")
    gray = {"input_size": [1, 160, 160], "mean": [0.5], "std": [0.25]}
    source = ModelSource("test_vit", options={"in_chans": 1, "pretrained_cfg_overlay": gray})
    classifier = create_classifier(source)
    summed = state["patch_embed.proj.weight"].sum(dim=1, keepdim=True)  # what gray pixels in all channels would give
    torch.testing.assert_close(classifier.backbone.state_dict()["patch_embed.proj.weight"], summed)
    assert list(classifier.data_config["input_size"]) == [1, 160, 160]
    said = {decision.about: decision for decision in classifier.decisions}["first layer"]
    assert said.shown
    assert "for 1 channels from those for 3" in said.text


def test_random_weights_are_said_in_the_heading_and_in_titles() -> None:
    source = ModelSource("test_vit", pretrained=False)
    assert told(source)["weights"].shown
    assert "random" in told(source)["weights"].text
    probe = HeadProbe("test_vit", pretrained=False)
    assert probe.title == "test_vit with random weights"
    assert probe.identity()["title"] == probe.title
    assert HeadProbe().title == "digits_vit"


def test_watching_leaves_no_hook() -> None:
    with watched_loads() as record:
        model = nn.Sequential(nn.Linear(2, 2))
        model.load_state_dict({"0.weight": torch.ones(2, 2)}, strict=False)
    assert record.seen
    assert record.missing == ["0.bias"]
    assert not model[0]._load_state_dict_pre_hooks
    later = nn.Sequential(nn.Linear(2, 2))
    assert not later[0]._load_state_dict_pre_hooks
