"""Published weights without 9 and 18 of 36 heads: held to timm's own model with the columns of its W_O set to zero."""

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import headprobe
from headprobe.pruning.cost import multiply_adds, parameters_of

pytestmark = pytest.mark.real

HEADS, DIM, WIDTH = 3, 64, 192


@pytest.fixture(scope="module")
def model(deit_tiny_weights: Path) -> Any:
    found = timm.create_model("deit_tiny_patch16_224")
    found.load_state_dict(load_file(deit_tiny_weights))
    return found.eval()


@pytest.fixture(scope="module")
def images(model: Any, sample_images: Path) -> Tensor:
    """Six real images, as timm prepares them."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = pq.read_table(sorted((sample_images / "data").glob("*.parquet"))[0]).slice(0, 6).to_pylist()
    opened = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return torch.stack([transform(image) for image in opened])


@pytest.mark.parametrize("count", [9, 18])
@torch.inference_mode()
def test_the_smaller_model_is_the_one_with_zeroed_columns(model: Any, images: Tensor, count: int) -> None:
    smaller: Any = headprobe.remove_heads(model, f"random:{count}:3")
    gone = {
        number: [head for head in range(HEADS) if head not in layer.kept]
        for number in range(12)
        if (layer := smaller.headprobe_pruned.get(f"blocks.{number}.attn")) is not None
    }
    assert sum(map(len, gone.values())) == count

    zeroed = timm.create_model("deit_tiny_patch16_224").eval()
    zeroed.load_state_dict(model.state_dict())
    for number, heads in gone.items():
        for head in heads:
            zeroed.blocks[number].attn.proj.weight[:, head * DIM : (head + 1) * DIM] = 0
    expected = zeroed(images)
    assert (smaller(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (model(images) - expected).abs().max() > 0.1

    # a head is 3 x 64 rows and biases of q, k and v, and 64 columns; a layer without heads loses its norm's 2 x 192 too
    empty = sum(len(heads) == HEADS for heads in gone.values())
    lost = count * (3 * DIM * (WIDTH + 1) + DIM * WIDTH) + empty * 2 * WIDTH
    assert parameters_of(model) - parameters_of(smaller) == lost
    work = count * (197 * 4 * DIM * WIDTH + 2 * 197 * 197 * DIM)
    assert multiply_adds(model, (3, 224, 224)) - multiply_adds(smaller, (3, 224, 224)) == work
