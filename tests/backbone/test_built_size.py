"""The size that a model in hand was built for, however it keeps it; one number means a square."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import headprobe
from headprobe.backbone.built_size import built_size
from headprobe.backbone.preparation import data_config
from headprobe.errors import UsageError


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10, **options).eval()


@pytest.mark.parametrize(
    "kept",
    [
        32,
        np.int64(32),
        torch.tensor(32),
        (32,),
        [32],
        (32, 32),
        np.array([32, 32]),
        torch.Size((32, 32)),
        32.0,
        (3, 32, 32),
    ],
)
def test_one_number_means_a_square_and_numbers_of_any_library_count(kept: Any) -> None:
    model = small()
    model.patch_embed.img_size, model.patch_embed.strict_img_size = kept, False
    assert built_size(model) == data_config(model)["input_size"] == (3, 32, 32)
    assert headprobe.check(model).passed
    with torch.inference_mode(), headprobe.ablate(model, "layer:0"):
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    "kept", ["32", 0, -32, (-1, 32), 32.5, float("nan"), True, None, (), (32, 32, 3), {"height": 32}]
)
def test_what_cannot_be_understood_leaves_the_models_own_configuration(kept: Any) -> None:
    model = small(pretrained_cfg_overlay={"input_size": (3, 48, 48)})
    model.patch_embed.img_size = kept
    assert built_size(model) == data_config(model)["input_size"] == (3, 48, 48)


def test_a_size_that_raises_is_passed_over() -> None:
    class Raising(nn.Module):
        @property
        def img_size(self) -> int:
            raise NotImplementedError

    model = small()
    model.patch_embed = Raising()
    assert built_size(model) == data_config(model)["input_size"] == (3, 224, 224)


def test_where_the_guess_is_wrong_the_message_asks_for_the_size() -> None:
    model = small()
    model.patch_embed.img_size = "32"
    with pytest.raises(UsageError, match=r"does not take images of 3 x 224 x 224 .* input_size in Python"):
        headprobe.check(model)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def keeping(**attributes: Any) -> nn.Module:
    model = Own()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda: keeping(image_size=48), (3, 48, 48)),
        (lambda: keeping(img_size=(48, 64)), (3, 48, 64)),
        (lambda: keeping(config=SimpleNamespace(image_size=48)), (3, 48, 48)),
        (lambda: keeping(default_cfg={"input_size": (1, 28, 28)}), (1, 28, 28)),
        (lambda: keeping(pretrained_cfg={"input_size": (1, 28, 28)}, image_size=48), (1, 28, 28)),
        (lambda: keeping(pretrained_cfg={"input_size": "large"}), (3, 224, 224)),
        (lambda: keeping(pretrained_cfg=None), (3, 224, 224)),
        (lambda: keeping(patch_embed=keeping(image_size=48)), (3, 48, 48)),
        (lambda: nn.DataParallel(small()), (3, 32, 32)),
        (Own, (3, 224, 224)),
    ],
)
def test_models_without_timms_patch_embedding_keep_their_size_elsewhere(
    model: Callable[[], nn.Module], size: tuple[int, int, int]
) -> None:
    assert built_size(model()) == size


def test_a_wrapper_for_several_devices_on_one_is_masked_and_called_by_its_models_name() -> None:
    wrapped = nn.DataParallel(small())
    assert headprobe.check(wrapped).model == "vit_tiny_patch16_224"
    with torch.inference_mode(), headprobe.ablate(wrapped, "layer:0"):
        masked = wrapped(torch.ones(1, 3, 32, 32))
    assert not torch.equal(masked, wrapped(torch.ones(1, 3, 32, 32)))
