"""A few images with every head's attention: the right images, and the weights of a plain float64 forward pass."""

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headprobe.describe.attention import AttentionSums
from headprobe.errors import UsageError
from headprobe.metrics.attention.examples import Examples
from headprobe.metrics.attention.image_maps import as_bytes
from headprobe.module import HeadProbe
from headprobe.units.tree import Arrays
from tests.describe import oracles
from tests.describe.driving import describe, feed, noise, normalised, prepare, small_probe
from tests.describe.test_against_oracles import CASES, model

HALF_A_STEP = 0.5 / 255 + 1e-4
"""Of the largest weight: what rounding to bytes costs, and the forward pass's own rounding."""


def examples_of(
    probe: HeadProbe, images: Tensor, wanted: int = 4, units: Sequence[int] = (7, 5), batch: int = 4, spec: str = ""
) -> Arrays:
    statistic = AttentionSums(offset_maps=False, examples=wanted)
    describe(probe, [statistic], images, [spec] if spec else [], units=units, batch=batch)
    return statistic.npz_files()["examples.npz"]


def first(sizes: Sequence[int], wanted: int, but: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Unit and row of the images with the smallest SHA-256 of their place."""
    places = [(unit, row) for unit, size in enumerate(sizes) for row in range(size) if (unit, row) not in but]
    return sorted(places, key=lambda place: hashlib.sha256(f"example:{place[0]}:{place[1]}".encode()).digest())[:wanted]


def chosen(found: Arrays) -> list[tuple[int, int]]:
    return list(zip(found["unit"].tolist(), found["row"].tolist(), strict=True))


def assert_maps(found: Arrays, layer: int, truth: oracles.Array) -> None:
    """Compare a layer's maps with `[images, heads, rows, columns]`."""
    largest = truth.max(axis=(2, 3))
    np.testing.assert_allclose(found[f"layer_{layer:03d}_max"].astype(float), largest, rtol=1e-4)
    stored = found[f"layer_{layer:03d}"].astype(float) / 255
    np.testing.assert_allclose(stored, truth / largest[..., None, None], rtol=0, atol=HALF_A_STEP)
    assert (found[f"layer_{layer:03d}"].max(axis=(2, 3)) == 255).all()


@pytest.mark.parametrize("name", sorted(CASES))
def test_maps_are_those_of_a_plain_forward_pass_in_float64(name: str) -> None:
    probe, images = model(name)
    found = examples_of(probe, images, units=(7, 5))
    pixels = normalised(probe, images)[[7 * unit + row for unit, row in chosen(found)]]
    truth = oracles.forward(probe.backbone, pixels)
    with_class = getattr(probe.backbone, "cls_token", None) is not None
    assert found["kind"].tolist() == ["class" if with_class else "received"] * len(truth)
    for number, layer in enumerate(truth):
        patches = slice(layer.prefix, layer.prefix + layer.patches)  # in the order of the image, padding after them
        weights = layer.attention[..., patches]
        own = weights[:, :, 0] if with_class else weights[:, :, patches].mean(axis=2)
        assert_maps(found, number, own.reshape(*own.shape[:2], *layer.grid))


def test_a_class_tokens_map_is_the_softmax_of_its_query_with_all_keys() -> None:
    probe, images = model("distilled")
    found = examples_of(probe, images)
    backbone: Any = deepcopy(probe.backbone).double()
    products: list[Tensor] = []
    for block in backbone.blocks:
        block.attn.qkv.register_forward_hook(lambda *call: products.append(call[2]))
    pixels = normalised(probe, images)[[7 * unit + row for unit, row in chosen(found)]]
    with torch.no_grad():
        backbone(torch.from_numpy(pixels))
    for number, (block, product) in enumerate(zip(backbone.blocks, products, strict=True)):
        heads = block.attn.num_heads
        parts = product.detach().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [3, images, heads, tokens, dim]
        query, key = parts[0].numpy(), parts[1].numpy()
        logits = np.einsum("bhd,bhkd->bhk", query[:, :, 0], key) / np.sqrt(query.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        assert_maps(found, number, weights[:, :, 2:].reshape(4, heads, 4, 4))  # class and distillation token left out


def test_received_attention_in_shifted_windows_is_that_of_timms_own_windows_put_back() -> None:
    probe, images = model("swin")
    found = examples_of(probe, images)
    backbone: Any = deepcopy(probe.backbone).double()
    weights: list[Tensor] = []
    blocks = [block for stage in backbone.layers for block in stage.blocks]
    for block in blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *call: weights.append(call[2]))
    pixels = normalised(probe, images)[[7 * unit + row for unit, row in chosen(found)]]
    with torch.no_grad():
        backbone(torch.from_numpy(pixels))
    from timm.models.swin_transformer import window_reverse

    assert {block.shift_size for block in blocks} == {(0, 0), (2, 2)}
    for number, (block, own) in enumerate(zip(blocks, weights, strict=True)):
        rows, columns = block.input_resolution
        received = own.sum(dim=2).transpose(1, 2)  # [windows, keys, heads]
        windows = received.unflatten(1, block.window_size)
        image = window_reverse(windows.contiguous(), block.window_size, rows, columns)  # [images, rows, columns, heads]
        truth = image.roll(block.shift_size, (1, 2)).permute(0, 3, 1, 2).numpy() / (rows * columns)
        assert_maps(found, number, truth)
        np.testing.assert_allclose(truth.sum(axis=(2, 3)), 1)  # a window's weights go nowhere else


def test_the_map_of_a_class_attention_layer_lies_on_the_patches_of_the_layers_before() -> None:
    probe = small_probe("cait_xxs24_224", img_size=64, embed_dim=48, depth=2, num_heads=3)
    images = noise(probe, 6)
    found = examples_of(probe, images, wanted=2, units=[6])
    backbone: Any = deepcopy(probe.backbone).double()
    weights: list[Tensor] = []
    for block in backbone.blocks_token_only:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *call: weights.append(call[2]))
    with torch.no_grad():
        backbone(torch.from_numpy(normalised(probe, images)[[row for _, row in chosen(found)]]))
    assert found["kind"].tolist() == ["", "", "class", "class"]
    assert "layer_000" not in found
    for number, own in enumerate(weights):
        assert_maps(found, 2 + number, own.numpy()[:, :, 0, 1:].reshape(2, -1, 4, 4))


def test_layers_without_a_map_are_named_with_the_reason() -> None:
    probe = small_probe("cait_xxs24_224", img_size=64, embed_dim=48, depth=2, num_heads=3)
    statistic = AttentionSums(examples=1)
    describe(probe, [statistic], noise(probe, 2))
    (why,) = statistic.undefined()["examples"]
    assert statistic.undefined()["examples"][why] == [0, 1]
    assert "mixed after the softmax" in why


def test_the_map_of_a_pooling_layer_is_its_learned_querys() -> None:
    probe = small_probe("vit_base_patch16_siglip_224", img_size=64, embed_dim=48, num_heads=3, depth=2)
    images = noise(probe, 6)
    found = examples_of(probe, images, wanted=2, units=[6])
    backbone: Any = deepcopy(probe.backbone).double()
    pool, seen = backbone.attn_pool, []
    pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        backbone(torch.from_numpy(normalised(probe, images)[[row for _, row in chosen(found)]]))
        query = pool.q(pool.latent.expand(2, -1, -1)).unflatten(-1, (3, -1))[:, 0]  # [images, heads, dim]
        key = pool.kv(seen[0]).unflatten(-1, (2, 3, -1))[:, :, 0]  # [images, keys, heads, dim]
        logits = torch.einsum("bhd,bkhd->bhk", query, key) * pool.scale
    assert found["kind"].tolist() == ["received", "received", "pooling"]
    assert_maps(found, 2, logits.softmax(dim=-1).numpy().reshape(2, 3, 4, 4))


# -- which images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 4, 12, 20])
def test_the_images_are_those_with_the_smallest_hash_of_their_place(wanted: int) -> None:
    probe, images = model("vit")
    assert chosen(examples_of(probe, images, wanted)) == first([7, 5], wanted)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_images_do_not_depend_on_the_batch_size(batch: int) -> None:
    probe, images = model("vit")
    one, other = examples_of(probe, images, batch=4), examples_of(probe, images, batch=batch)
    assert chosen(one) == chosen(other)
    assert np.array_equal(one["thumbnail"], other["thumbnail"])
    assert max(abs(one["layer_001"].astype(int) - other["layer_001"]).max(), 0) <= 1  # a matrix product's last bits


def test_the_masked_model_is_not_shown() -> None:
    probe, images = model("vit")
    one, other = examples_of(probe, images), examples_of(probe, images, spec="layer:0")
    assert one.keys() == other.keys()
    for name, array in one.items():
        if not name.endswith("_max"):
            assert np.array_equal(array, other[name]), name


def test_more_images_are_the_same_ones_first() -> None:
    probe, images = model("vit")
    few, many = examples_of(probe, images, 2), examples_of(probe, images, 5)
    assert np.array_equal(few["layer_002"], many["layer_002"][:2])


def test_the_label_the_prediction_and_the_picture_are_the_images_own() -> None:
    probe, images = model("not square")
    found = examples_of(probe, images, 3)
    places = [7 * unit + row for unit, row in chosen(found)]
    with torch.no_grad():
        logits = deepcopy(probe.backbone).double()(torch.from_numpy(normalised(probe, images)[places]))
    assert found["prediction"].tolist() == logits.argmax(dim=1).tolist()
    assert found["label"].tolist() == [0, 0, 0]
    for place, thumbnail in zip(places, found["thumbnail"], strict=True):
        assert np.array_equal(thumbnail, images[place].permute(1, 2, 0).numpy())  # 64 x 96 pixels are not many


def test_large_images_are_shrunk_to_112_pixels_as_pillow_does() -> None:
    probe = small_probe("vit_tiny_patch16_224", img_size=(128, 256), embed_dim=24, depth=1, num_heads=2)
    ramp = torch.linspace(0, 255, 256)[None, None, None] * torch.linspace(0.2, 1, 128)[:, None]
    images = ramp.expand(2, 3, -1, -1).to(torch.uint8)
    found = examples_of(probe, images, 1, units=[2])
    assert found["thumbnail"].shape == (1, 56, 112, 3)
    pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((112, 56), Image.Resampling.BILINEAR)
    assert np.abs(found["thumbnail"][0].astype(int) - np.asarray(pillow)).max() <= 1


@pytest.mark.parametrize("wanted", [-1, 65])
def test_a_number_of_examples_that_cannot_be_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match=f"0 for none, or up to 64, got {wanted}"):
        AttentionSums(examples=wanted)


def test_without_examples_nothing_is_kept_and_nothing_is_written() -> None:
    probe, images = model("vit")
    statistic = AttentionSums(examples=0)
    describe(probe, [statistic], images)
    assert statistic.npz_files()["examples.npz"] == {}
    assert set(statistic.whole) == {"baseline", "baseline_maps"}


def test_a_head_whose_attention_is_no_number_has_an_empty_map() -> None:
    maps = torch.tensor([[[0.0, 0.5], [0.25, 0.25]], [[0.0, float("nan")], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found, largest = as_bytes(maps)
    assert found.tolist() == [[[0, 255], [128, 128]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    np.testing.assert_array_equal(largest, [0.5, np.nan, 0.0])


# -- units -------------------------------------------------------------------------------------------------------------


def kept(rows: dict[int, Sequence[int]], most: int = 3) -> Examples:
    """Images without a model: one layer of two heads on two patches, whose maps tell the image."""
    found = Examples(most, [None, (2, 1, 2)], (1, 1))
    for unit, own in rows.items():
        found.offer(unit, own)
        for row, example in found.of_unit(unit).items():
            example.maps[1] = torch.full((2, 1, 2), unit + row, dtype=torch.uint8)
            example.largest[1] = torch.tensor([unit, row], dtype=torch.float32)
            example.thumbnail, example.source = torch.full((1, 1, 3), row, dtype=torch.uint8), f"{unit} \udce9 ü {row}"
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_units_merge_to_the_first_images_of_all_in_any_order(order: tuple[int, ...]) -> None:
    rows = {0: range(5), 1: range(2), 2: range(9)}
    found = kept({order[0]: rows[order[0]]})
    for unit in order[1:]:
        found.merge(kept({unit: rows[unit]}))
    expected = first([5, 2, 9], 3)
    arrays = found.to_arrays()
    assert chosen(arrays) == expected
    assert arrays["layer_001_max"].tolist() == [list(place) for place in expected]
    assert arrays["layer_001"][:, 0, 0, 0].tolist() == [unit + row for unit, row in expected]


def test_what_is_stored_is_read_back() -> None:
    one = kept({0: range(5), 3: range(4)})
    arrays = one.to_arrays()
    again = Examples(3, [None, (2, 1, 2)], (1, 1)).from_arrays(arrays)
    for name, array in again.to_arrays().items():
        assert np.array_equal(array, arrays[name]), name
    assert len(again) == 3
    nothing = kept({}).to_arrays()
    assert len(again.from_arrays(nothing)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"layer_001": np.zeros((3, 2, 2, 1), np.uint8)},
        {"layer_001": np.zeros((3, 2, 1, 2))},
        {"layer_000": np.zeros((3, 2, 1, 2), np.uint8)},
        {"source": np.frombuffer(json.dumps(["one"]).encode(), np.uint8)},
        {"unit": np.zeros(2, np.int64)},
    ],
    ids=["shape", "dtype", "unknown", "sources", "images"],
)
def test_arrays_of_another_model_are_refused(change: Arrays) -> None:
    arrays = kept({0: range(5)}).to_arrays()
    with pytest.raises(ValueError, match=r"must be|shorter|longer"):
        kept({}).from_arrays(arrays | change)


def test_examples_of_other_options_do_not_merge() -> None:
    with pytest.raises(ValueError, match="same model and options"):
        kept({0: range(5)}).merge(kept({1: range(5)}, most=4))


def test_an_image_that_was_observed_and_never_judged_is_no_example() -> None:
    found = Examples(1, [], (1, 1))
    found.offer(0, [0])
    with pytest.raises(ValueError, match=r"must be judged .* \[\(0, 0\)\]"):
        found.to_arrays()


def test_no_image_but_an_example_has_its_map_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, images = model("vit")
    calls: list[Tensor] = []

    def counting(maps: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(maps)
        return as_bytes(maps)

    monkeypatch.setattr("headprobe.describe.examples.as_bytes", counting)
    statistic = AttentionSums(examples=1)
    prepare(probe, [statistic], units=1, batch=12)
    feed(probe, images, [12], batch=12)
    assert len(calls) == len(probe.layout.layers)
