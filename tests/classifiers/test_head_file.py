"""Heads from files: the oracles are torch's own linear layer and numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headprobe.classifiers.head_file import read_head
from headprobe.errors import UsageError
from tests.classifiers.drawn import normed

CLASSES, WIDTH = 5, 12
RANDOM = torch.Generator().manual_seed(0)
WEIGHT_TENSOR = torch.randn(CLASSES, WIDTH, generator=RANDOM)
ROWS = torch.randn(3, 8, WIDTH, generator=RANDOM)


def written(folder: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    file = folder / "head.safetensors"
    save_file(tensors, file, metadata=metadata)
    return file


def test_weight_and_bias_are_a_linear_layer(tmp_path: Path) -> None:
    layer = torch.nn.Linear(WIDTH, CLASSES)
    head = read_head(written(tmp_path, {"weight": layer.weight.detach(), "bias": layer.bias.detach()}))
    torch.testing.assert_close(head.logits(ROWS).float(), layer(ROWS).detach(), rtol=1e-5, atol=1e-6)
    assert (head.classes, head.features, head.class_names) == (CLASSES, WIDTH, None)


@pytest.mark.parametrize("bias", [torch.tensor(-16.5), torch.tensor([-16.5]), None])
def test_text_embeddings_with_their_scale_and_bias(tmp_path: Path, bias: Tensor | None) -> None:
    tensors = {"weight": WEIGHT_TENSOR, "logit_scale": torch.tensor(math.log(100.0))}
    head = read_head(written(tmp_path, tensors | ({} if bias is None else {"bias": bias})))
    cosines = normed(ROWS.numpy().astype(np.float64)) @ normed(WEIGHT_TENSOR.numpy().astype(np.float64)).T
    wanted = 100.0 * cosines + (0 if bias is None else -16.5)
    np.testing.assert_allclose(head.logits(ROWS).numpy(), wanted, atol=1e-4)  # the scale is a float32
    assert "100 times the cosine" in head.decisions()[0].text


def test_embeddings_of_length_one_without_a_scale_are_said(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(WEIGHT_TENSOR, dim=1)
    assert "need logit_scale" in read_head(written(tmp_path, {"weight": rows})).decisions()[0].text
    assert "need logit_scale" not in read_head(written(tmp_path, {"weight": 2 * rows})).decisions()[0].text


def test_half_precision_is_read(tmp_path: Path) -> None:
    head = read_head(written(tmp_path, {"weight": WEIGHT_TENSOR.bfloat16()}))
    torch.testing.assert_close(head.weight.float(), WEIGHT_TENSOR.bfloat16().float(), rtol=0, atol=0)


def test_names_of_classes_are_in_the_metadata(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "ë"]
    head = read_head(written(tmp_path, {"weight": WEIGHT_TENSOR}, {"classes": json.dumps(names)}))
    assert head.class_names == names


def test_gradients_pass_through(tmp_path: Path) -> None:
    head = read_head(written(tmp_path, {"weight": WEIGHT_TENSOR, "logit_scale": torch.tensor(1.0)}))
    assert torch.autograd.gradcheck(head.logits, (ROWS[0, :2].double().requires_grad_(),))


def test_equal_rows_are_named_unless_their_biases_differ(tmp_path: Path) -> None:
    weight = torch.cat([WEIGHT_TENSOR, WEIGHT_TENSOR[1:2]])
    decisions = read_head(written(tmp_path, {"weight": weight})).decisions()
    assert any(one.about == "duplicate classes" and "class 1, class 5" in one.text for one in decisions)
    apart = read_head(written(tmp_path, {"weight": weight, "bias": torch.arange(6.0)}))
    assert [one.about for one in apart.decisions()] == ["classifier"]


def test_the_digest_follows_weight_bias_and_scale(tmp_path: Path) -> None:
    heads: list[dict[str, Tensor]] = [
        {"weight": WEIGHT_TENSOR},
        {"weight": WEIGHT_TENSOR + 1e-3},
        {"weight": WEIGHT_TENSOR, "bias": torch.ones(CLASSES)},
        {"weight": WEIGHT_TENSOR, "logit_scale": torch.tensor(2.0)},
    ]
    digests = {read_head(written(tmp_path, tensors)).digest for tensors in heads}
    assert len(digests) == 4
    assert read_head(written(tmp_path, heads[0])).digest in digests


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        (
            {"head.weight": WEIGHT_TENSOR},
            None,
            "must be called weight, and perhaps bias and logit_scale, got head.weight",
        ),
        ({"weight": WEIGHT_TENSOR, "scale": torch.ones(1)}, None, "got scale"),
        ({"bias": torch.ones(3)}, None, "must be called weight"),
        ({"weight": WEIGHT_TENSOR[0]}, None, "weight must be [classes, features], got [12]"),
        ({"weight": WEIGHT_TENSOR, "bias": torch.ones(3)}, None, "bias must be [5], one for each row of weight"),
        ({"weight": WEIGHT_TENSOR.int()}, None, "weight must hold floating point, got int32"),
        ({"weight": WEIGHT_TENSOR * float("inf")}, None, "weight must hold finite numbers"),
        ({"weight": WEIGHT_TENSOR, "logit_scale": torch.tensor(100.0)}, None, "the natural logarithm of the scale"),
        ({"weight": WEIGHT_TENSOR, "logit_scale": torch.ones(2)}, None, "logit_scale must be one number, got [2]"),
        ({"weight": WEIGHT_TENSOR}, {"classes": '["a"]'}, "JSON list of 5 texts"),
        ({"weight": WEIGHT_TENSOR}, {"classes": "a,b,c,d,e"}, "JSON list of 5 texts"),
        ({"weight": WEIGHT_TENSOR}, {"classes": '["a","b","c","d","a"]'}, "name each class once, got 'a' twice"),
    ],
)
def test_another_file_is_refused_with_what_it_should_hold(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None, reason: str
) -> None:
    with pytest.raises(UsageError) as refused:
        read_head(written(tmp_path, tensors, metadata))
    assert reason in str(refused.value)


def test_no_file_and_no_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file, got"):
        read_head(tmp_path / "none.safetensors")
    other = tmp_path / "text.safetensors"
    other.write_text("no tensors")
    with pytest.raises(UsageError, match="not readable as safetensors"):
        read_head(other)
