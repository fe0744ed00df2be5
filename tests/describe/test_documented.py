"""What docs/describe_heads.md says of a column is what the column holds; the oracles are plain numpy."""

from functools import cache
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headprobe.describe.attention import AttentionSums
from headprobe.describe.similarity import NOT_UNIQUE, SimilaritySums
from headprobe.metrics.attention.reduction import reduce_attention
from headprobe.metrics.attention.weights_chunk import WeightsChunk
from headprobe.metrics.projection import output_norm_ratio
from headprobe.metrics.spectrum.spectra import head_profiles
from headprobe.metrics.token_grid import TokenGrid
from headprobe.module import HeadProbe
from tests.describe import oracles
from tests.describe.driving import describe, noise, normalised, tiny_probe

Array = NDArray[np.float64]


# -- similarity --------------------------------------------------------------------------------------------------------


def next_of_its_piece(images: int, pieces: int) -> Any:
    """Each image's partner in the noise floor, where one unit is dealt to pieces by blocks of eight neighbours."""
    piece = (np.arange(images) // 8) % pieces
    after = np.empty(images, dtype=int)
    for number in range(pieces):
        own = np.flatnonzero(piece == number)
        after[own] = np.roll(own, -1)
    return after


@cache
def digits() -> Tensor:
    """A hundred of the bundled images, uint8 `[images, 3, 32, 32]`."""
    file = resources.files("headprobe.data") / "digits" / "test.parquet"
    rows = pq.read_table(BytesIO(file.read_bytes())).slice(0, 100)["image"].to_pylist()
    images = [
        Image.open(BytesIO(row["bytes"])).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for row in rows
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


@cache
def swin_heads() -> list[Array]:
    """Head outputs `[images, tokens, heads, dim]` of each layer of the bundled Swin, by hooks of our own."""
    probe = HeadProbe("digits_swin").eval()
    found: list[Array] = []

    def keep(heads: int) -> Any:
        def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
            (outputs,) = arguments  # [images * windows, tokens, channels]
            found.append(outputs.double().reshape(100, -1, heads, outputs.shape[-1] // heads).numpy())

        return hook

    blocks: list[Any] = [module for module in probe.backbone.modules() if hasattr(module, "attn")]
    for block in blocks:
        block.attn.proj.register_forward_pre_hook(keep(block.attn.num_heads))
    with torch.inference_mode():
        probe.backbone(probe.normalised(digits()))
    return found


@pytest.mark.parametrize(("batch", "precision"), [(64, "float64"), (37, "float64"), (64, "float32")])
def test_the_noise_floor_of_the_bundled_swin_is_exact_at_any_batch_size(batch: int, precision: Any) -> None:
    similarity = SimilaritySums(measures=["cca"], precision=precision)
    describe(HeadProbe("digits_swin").eval(), [similarity], digits(), batch=batch)
    found, after = similarity.matrices(), next_of_its_piece(100, 16)
    for layer, outputs in enumerate(swin_heads()):
        rows = np.flatnonzero(found["layer"] == layer)
        if not (found["rank"][rows] == outputs.shape[3]).all():
            continue  # the oracle has no rank cut
        bases = []
        for images in (np.arange(100), after):
            flat = outputs[images].reshape(-1, *outputs.shape[2:])
            centred = (flat - flat.mean(axis=0)).transpose(1, 0, 2)  # [heads, samples, dim]
            bases.append(np.linalg.svd(centred, full_matrices=False)[0])
        for row in range(len(rows)):
            for column in range(row, len(rows)):
                for name, other in (("cca", bases[0]), ("cca_floor", bases[1])):
                    exact = np.linalg.svd(bases[0][row].T @ other[column], compute_uv=False).mean()
                    ours = found[name][rows[row], rows[column]]
                    assert ours == pytest.approx(exact, abs=1e-6), (name, layer, row, column)


@pytest.mark.parametrize(("images", "groups", "pieces"), [(40, 4, 4), (60, None, 16), (20, 0, 1)])
def test_with_fewer_units_than_groups_the_floor_pairs_images_in_blocks_of_eight(
    images: int, groups: int | None, pieces: int
) -> None:
    probe = tiny_probe("vit_registers")
    drawn = noise(probe, images)
    similarity = SimilaritySums(sampling="tokens", groups=groups, measures=["svcca", "cka"])
    describe(probe, [similarity], drawn, batch=7)
    found, after = similarity.matrices(), next_of_its_piece(images, pieces)
    for number, layer in enumerate(oracles.forward(probe.backbone, normalised(probe, drawn))):
        here = np.flatnonzero(found["layer"] == number)
        heads, later = (
            [oracles.Samples(z[:, :, head].reshape(-1, z.shape[3])) for head in range(3)]
            for z in (layer.z, layer.z[after])
        )
        for measure in ("svcca", "cka"):
            for row in range(3):
                for column in range(row, 3):
                    expected = oracles.MEASURES[measure](heads[row], later[column])
                    assert found[f"{measure}_floor"][here[row], here[column]] == pytest.approx(expected, abs=1e-5)


def test_pwcca_that_is_not_unique_is_empty_with_its_reason_on_the_terminal_and_in_the_record() -> None:
    probe = tiny_probe("vit_registers")  # heads of 16 dims
    similarity = SimilaritySums(sampling="class", groups=0)
    describe(probe, [similarity], noise(probe, 24), batch=24)
    found = similarity.matrices()
    same_layer = found["layer"][:, None] == found["layer"]
    np.testing.assert_array_equal(np.isnan(found["pwcca"]), ~same_layer | ~np.eye(9, dtype=bool))
    assert np.isfinite(found["cca"][same_layer]).all()
    assert similarity.undefined() == {"pwcca_mean": {NOT_UNIQUE: [0, 1, 2]}}
    assert "PWCCA is empty for 9 pairs of heads" in similarity.note()

    enough = SimilaritySums(sampling="class", groups=0)
    describe(probe, [enough], noise(probe, 60), batch=60)
    assert np.isfinite(enough.matrices()["pwcca"][same_layer]).all()
    assert (enough.undefined(), "PWCCA" in enough.note()) == ({}, False)


# -- attention ---------------------------------------------------------------------------------------------------------


def test_layer_scale_is_in_value_weighted_attention_and_in_the_norm_ratio() -> None:
    probe = tiny_probe("vit_registers")
    backbone: Any = probe.backbone
    channels = backbone.embed_dim
    scale = torch.logspace(-3, 1, channels)
    backbone.blocks[1].ls1.gamma.data = scale
    images = noise(probe, 6)
    attention = AttentionSums()
    describe(probe, [attention], images, batch=6)
    table = attention.tables()["baseline"]

    layer = oracles.forward(probe.backbone, normalised(probe, images))[1]
    expected = oracles.attention_statistics(layer, (14, 14), True)
    layer.weight = layer.weight / scale.double().numpy()[:, None, None]
    without = oracles.attention_statistics(layer, (14, 14), True)
    for name in ("value_weighted_attention", "output_norm_ratio"):
        ours = table.mean[name][table.layer == 1]
        np.testing.assert_allclose(ours, expected[name].mean(axis=0), rtol=1e-3)
        assert np.abs(ours / without[name].mean(axis=0) - 1).min() > 0.01


def test_the_norm_ratio_is_the_mean_over_patches_of_ratios_and_leaves_out_prefix_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(2, 3, 5, generator=generator)  # [images, heads, tokens]
    stream = torch.randn(2, 5, 7, generator=generator) * torch.tensor([9.0, 0.1, 1, 10, 3])[:, None]
    found = output_norm_ratio(norms, stream, TokenGrid(5, 1, True, (2, 2)))
    lengths = np.linalg.norm(stream.double().numpy(), axis=2)[:, None, 1:]  # [images, 1, patches]
    np.testing.assert_allclose(found, (norms.double().numpy()[:, :, 1:] / lengths).mean(axis=2), rtol=1e-5)
    assert not np.allclose(found, norms[:, :, 1:].numpy().mean(axis=2) / lengths.mean(axis=2), rtol=0.1)


def reduced(grid: TokenGrid, weights: Array, norms: Array | None = None) -> dict[str, Any]:
    """Reduce the weights `[windows, tokens, tokens]` of one head and image."""
    given = torch.from_numpy(weights).float()[:, None]
    chunk = WeightsChunk(slice(0, len(weights)), slice(0, grid.tokens), given)
    value_norms = None if norms is None else torch.from_numpy(norms).float()[:, None]
    return {name: float(value) for name, value in reduce_attention(grid, 1, [chunk], value_norms).values.items()}


def drawn(rows: int, tokens: int, seed: int = 0) -> Array:
    weights = np.random.default_rng(seed).exponential(size=(rows, tokens, tokens)) ** 3
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def test_entropy_over_all_keys_has_patches_as_queries_and_sink_mass_has_all_tokens() -> None:
    weights = drawn(1, 6)
    weights[0, :2] = np.eye(6)[3]  # class token and register look at one patch
    found = reduced(TokenGrid(6, 2, True, (2, 2)), weights)
    by_query = oracles.entropy(weights[0])
    assert found["entropy_all_keys_nats"] == pytest.approx(by_query[2:].mean(), rel=1e-5)
    assert found["entropy_all_keys_nats"] != pytest.approx(by_query.mean(), rel=0.05)
    assert found["sink_mass"] == pytest.approx(weights[0].mean(axis=0).max(), rel=1e-5)
    assert found["sink_mass"] != pytest.approx(weights[0, 2:].mean(axis=0).max(), rel=0.05)


def test_value_weighted_attention_is_a_ratio_of_sums_over_patch_queries_and_all_keys() -> None:
    weights, norms = drawn(1, 6), np.array([[5.0, 0.1, 1, 2, 3, 1]])
    found = reduced(TokenGrid(6, 2, True, (2, 2)), weights, norms)
    expected = (weights[0, 2:] @ norms[0]).mean() / norms[0].mean()
    assert found["value_weighted_attention"] == pytest.approx(expected, rel=1e-5)


def test_mutual_information_leaves_out_pieces_of_one_patch() -> None:
    # windows of 2 x 2 on 4 x 4 patches, shifted by one: the corner's four patches are a piece each
    grid = TokenGrid(4, grid=(4, 4), window=(2, 2), shift=(1, 1))
    weights = drawn(4, 4) * (grid.groups[:, :, None] == grid.groups[:, None, :])
    weights /= weights.sum(axis=-1, keepdims=True)
    total, queries, sizes = 0.0, 0, []
    for window in range(4):
        for group in np.unique(grid.groups[window]):
            own = np.flatnonzero(grid.groups[window] == group)
            sizes.append(len(own))
            if len(own) > 1:
                inside = weights[window][np.ix_(own, own)]
                of_key = oracles.entropy(inside.mean(axis=0))
                shared = of_key - oracles.entropy(inside).mean()
                total += len(own) * shared / np.sqrt(of_key * np.log(len(own)))
                queries += len(own)
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 2, 2, 4]
    found = reduced(grid, weights)["mutual_information"]
    assert found == pytest.approx(total / queries, rel=1e-4)
    assert found != pytest.approx(total / 16, rel=0.05)  # as if the single patches shared nothing


def test_ratios_to_uniform_attention_are_ratios_of_means() -> None:
    probe = tiny_probe("swin")
    images = noise(probe, 4)
    attention = AttentionSums()
    describe(probe, [attention], images, batch=4)
    table = attention.tables()["baseline"]
    for number, layer in enumerate(oracles.forward(probe.backbone, normalised(probe, images))):
        patch = 4 * 2 ** (number // 2)
        statistics = oracles.attention_statistics(layer, (patch, patch), False)
        pixels, logs = oracles.uniform(layer, (patch, patch))
        here = table.layer == number
        expected = {"attention_distance_ratio": statistics["attention_distance_px"].mean(axis=0) / pixels}
        expected["entropy_ratio"] = statistics["entropy_nats"].mean(axis=0) / logs
        for name, values in expected.items():
            np.testing.assert_allclose(table.mean[name][here], values, rtol=1e-4)


# -- frequencies -------------------------------------------------------------------------------------------------------


def test_radial_rings_stop_at_radius_one_and_the_corners_are_in_none() -> None:
    size, rng = 8, np.random.default_rng(0)
    maps = rng.normal(size=(size, size))
    frequency = np.abs(np.fft.fftfreq(size) * 2)
    corners = np.hypot(frequency[:, None], frequency[None]) > 1 + 1e-9
    transform = np.fft.fft2(maps)
    louder = np.fft.ifft2(np.where(corners, 100 * transform, transform)).real
    found = []
    for one in (maps, louder):
        heads = torch.from_numpy(one.reshape(1, size * size, 1, 1))
        found.append(head_profiles(heads, TokenGrid(size * size, grid=(size, size)))[0][0, 0].numpy())
    diagonal = size // 2
    np.testing.assert_allclose(found[0][diagonal:], found[1][diagonal:], atol=1e-4)
    assert (found[1][:diagonal] - found[0][:diagonal]).max() > 1  # the diagonal reaches into a corner
