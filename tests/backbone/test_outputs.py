"""Logits and the pooled feature come out of one forward pass, as plain timm gives them."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.trials import find_shortcuts, trial_masks
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.outputs import Outputs, embeds, outputs_of
from headprobe.backbone.sandbox import copied
from headprobe.errors import RunError
from tests.conftest import tiny
from tests.families import REPRESENTATIVES, build

UNREADABLE = {"resnet_clip"}
"""Its attention pool projects by itself, and must not run twice."""

TWICE = {"vit_distilled", "sam", "efficientvit_msra", "crossvit", "levit", "levit_conv"} | {
    "efficientformer",
    "efficientformer_v2",
}
"""Models with several classifiers, or with one that timm does not name."""


def noise(size: tuple[int, int, int], images: int = 3) -> Tensor:
    return torch.randn(images, *size, generator=torch.Generator().manual_seed(7))


def plain_feature(model: Any, images: Tensor) -> Tensor:
    features = model.forward_features(images)
    pooled = model.forward_head(**features, pre_logits=True) if isinstance(features, dict) else None
    return (model.forward_head(features, pre_logits=True) if pooled is None else pooled).flatten(1)


@pytest.mark.parametrize("key", sorted(REPRESENTATIVES))
def test_logits_and_feature_are_those_of_plain_timm_bit_for_bit(key: str) -> None:
    model, size = build(key, classes=5), REPRESENTATIVES[key].input_size
    outputs = outputs_of(model, size)
    assert outputs.classes == 5
    assert bool(outputs.features) == (key not in UNREADABLE) == (not outputs.reason)
    images = noise(size)
    with torch.inference_mode():
        logits = model(images)
        with outputs.reading(model):
            found = model(images)
        assert torch.equal(model(images), logits)  # all is undone
    if outputs.features:
        assert outputs.way == ("twice" if key in TWICE else "classifier")
        with torch.inference_mode():
            assert torch.equal(outputs.split(found)[0], logits)
            assert torch.equal(outputs.split(found)[1], plain_feature(model, images))


@pytest.mark.parametrize("key", ["vit", "siglip", "dinov3", "swin", "hiera", "sam", "resnet_clip", "vit_registers"])
def test_the_output_of_a_model_without_a_classifier_is_its_feature(key: str) -> None:
    model, size = build(key, classes=0), REPRESENTATIVES[key].input_size
    outputs = outputs_of(model, size)
    with torch.inference_mode(), outputs.reading(model):
        found = model(noise(size))
        assert (outputs.classes, outputs.features, outputs.way) == (0, found.shape[1], "output")
        assert torch.equal(found, plain_feature(model, noise(size)))


def test_a_model_that_pools_nothing_has_no_feature_and_says_so() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, global_pool="", num_classes=0).eval()
    assert outputs_of(model, (3, 32, 32)).reason == "the model gives [5, 192] for an image, not one vector"


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = tiny("vit", classes=5)
    outputs = outputs_of(model, (3, 64, 64))
    with pytest.raises(RuntimeError, match="inside"), outputs.reading(model):
        raise RuntimeError("inside")
    assert "forward_head" not in vars(model)
    assert not model.head._forward_pre_hooks


def test_a_copy_made_meanwhile_reads_its_own_weights() -> None:
    model = tiny("vit", classes=5)
    outputs = outputs_of(model, (3, 64, 64))
    with outputs.reading(model), torch.inference_mode():
        copy = copied(model, "vit")
        copy.get_parameter("head.weight").data.zero_()
        assert not torch.equal(copy(noise((3, 64, 64)))[:, :5], model(noise((3, 64, 64)))[:, :5])


def test_outputs_of_another_width_are_refused() -> None:
    with pytest.raises(RunError, match="5 logits and 3 numbers of its feature, got 5"):
        Outputs(5, 3, "classifier").split(torch.zeros(2, 5))


@pytest.mark.parametrize("key", ["vit", "vit_distilled", "siglip", "dinov3", "swin", "vit_registers"])
def test_the_growing_pass_gives_the_features_of_plain_masked_passes(key: str) -> None:
    model, size = build(key, classes=5), REPRESENTATIVES[key].input_size
    layout = find_heads(model, size, key)
    outputs, images, keep = outputs_of(model, size), noise(size), trial_masks(layout, torch.device("cpu"), seed=5)
    with torch.inference_mode(), outputs.reading(model):
        joins, companies, calls = find_joins(model, layout, outputs=outputs)
        assert len(companies[0].rounding) == 2
        shortcuts = find_shortcuts(model, layout, joins, companies, calls)
        with GrowingPass(model, layout, joins, keep, shortcuts) as growing:
            found = growing.logits(images, growing.plan(len(images), 100))
        expected = torch.stack([model(images), *(masked_logits(model, layout, images, mask) for mask in keep)])
    for one, other in zip(outputs.parts(found), outputs.parts(expected), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "embedding"),
    [
        ("vit_base_patch32_clip_224.openai", {}, True),
        ("vit_base_patch32_clip_224.laion2b", {}, True),
        ("vit_pe_core_tiny_patch16_384.fb", {}, True),
        ("vitamin_small_224.datacomp1b_clip", {}, True),
        ("vit_base_patch32_clip_224.laion2b_ft_in12k_in1k", {}, False),
        ("vit_base_patch32_clip_224.openai", {"num_classes": 10}, False),  # a classifier of the user's own
        ("vit_base_patch32_clip_224.openai", {"num_classes": 0}, False),
        ("vit_small_patch14_dinov2.lvd142m", {}, False),
        ("vit_tiny_patch16_224", {}, False),
    ],
)
def test_an_embedding_in_place_of_the_classifier_is_known_from_timms_configuration(
    name: str, options: dict[str, Any], embedding: bool
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert embeds(model) is embedding


def test_a_users_own_classifier_of_the_same_width_is_no_embedding_where_it_has_a_bias() -> None:
    model = timm.create_model("vit_base_patch32_clip_224.openai", depth=1, embed_dim=48, num_heads=4)
    assert embeds(model, own_weights=True)
    torch.nn.init.ones_(model.head.bias)
    assert not embeds(model, own_weights=True)
