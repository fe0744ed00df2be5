"""Published DeiT-Ti on real images: every statistic against a float64 forward pass with unfused attention and numpy."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from headprobe.describe.attention import AttentionSums
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.module import HeadProbe
from tests.conftest import SHARED
from tests.describe import oracles
from tests.describe.driving import describe, normalised

pytestmark = [pytest.mark.real, pytest.mark.slow]

IMAGES, BATCH = 48, 16
MASKED = tuple((3, head) for head in range(3))
Found = tuple[AttentionSums, SpectrumSums, SimilaritySums]


@pytest.fixture(autouse=True)
def shared(sample_images: Path, deit_tiny_weights: Path) -> None:
    """Skip where real data is absent."""


@cache
def deit() -> HeadProbe:
    return HeadProbe("deit_tiny_patch16_224", str(SHARED / "deit_tiny/model.safetensors")).eval()


@cache
def images() -> Tensor:
    """Every tenth image of the sample, cropped by timm."""
    transform: Any = timm.data.create_transform(**{**deit().data_config, "normalize": False}, is_training=False)
    shards = sorted((SHARED / "imagenet_sample").glob("data/*.parquet"))
    stored = [row["bytes"] for shard in shards for row in pq.read_table(shard)["image"].to_pylist()]
    drawn = [transform(Image.open(io.BytesIO(row)).convert("RGB")) for row in stored[:: len(stored) // IMAGES][:IMAGES]]
    return torch.stack([torch.as_tensor(image) for image in drawn])


@cache
def described(spec: str) -> Found:
    found = AttentionSums(), SpectrumSums(), SimilaritySums()
    describe(deit(), found, images(), [spec] if spec else [], units=3, batch=BATCH)
    return found


@cache
def truth() -> list[oracles.Layer]:
    return oracles.forward(deit().backbone, normalised(deit(), images()))


@cache
def per_image(masked: tuple[tuple[int, int], ...] = ()) -> list[dict[str, oracles.Array]]:
    # a forward pass keeps a gigabyte of weights: only that of the whole model, which several tests look at, stays
    layers = oracles.forward(deit().backbone, normalised(deit(), images()), masked) if masked else truth()
    return [oracles.attention_statistics(layer, (16, 16), True) for layer in layers]


def test_images_are_those_that_timm_crops() -> None:
    assert images().shape == (IMAGES, 3, 224, 224)
    assert images().dtype == torch.uint8
    with torch.inference_mode():
        logits = deit().backbone(torch.from_numpy(normalised(deit(), images())).float())
    assert (logits.softmax(1).amax(1) > 0.2).float().mean() > 0.7  # a model that knows what it sees


def test_attention_statistics_of_deit_are_those_of_the_dense_recomputation() -> None:
    table = described("")[0].tables()["baseline"]
    for layer, by_name in enumerate(per_image()):
        for name, values in by_name.items():
            mean, error = table.mean[name][table.layer == layer], table.error[name][table.layer == layer]
            spread = values.std(0, ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(mean, values.mean(0), rtol=1e-4, err_msg=f"{name} of layer {layer}")
            np.testing.assert_allclose(error, spread, rtol=2e-3, err_msg=f"{name} of layer {layer}")
    assert np.nanmax(table.mean["attention_distance_ratio"]) < 2


def test_masking_a_layer_of_deit_changes_what_zeroing_by_hand_changes() -> None:
    tables, before, after = described("layer:3")[0].tables(), per_image(), per_image(MASKED)
    for layer, by_name in enumerate(after):
        for name, values in by_name.items():
            paired, here = values - before[layer][name], tables["masked"].layer == layer
            size = np.abs(before[layer][name]).max()
            np.testing.assert_allclose(tables["masked"].mean[name][here], values.mean(0), atol=1e-4 * size)
            np.testing.assert_allclose(tables["change"].mean[name][here], paired.mean(0), atol=1e-4 * size)
            spread = paired.std(0, ddof=1) / np.sqrt(len(paired))
            np.testing.assert_allclose(tables["change"].error[name][here], spread, atol=1e-5 * size, rtol=2e-3)
            if layer < 3:
                assert (tables["change"].mean[name][here] == 0).all()


def test_offset_maps_of_deit_are_those_of_a_loop_over_pairs() -> None:
    maps = described("")[0].maps()["baseline"]
    for layer in (0, 5, 11):
        ours, expected = maps[layer], oracles.offset_map(truth()[layer])
        assert ours is not None
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def stored() -> list[oracles.Layer]:
    """What hooks would store of the very batches that were described."""
    parts = [
        oracles.forward(deit().backbone, deit().normalised(part).double().numpy(), stored=True)
        for part in images().split(BATCH)
    ]
    for own in zip(*parts, strict=True):
        own[0].z = np.concatenate([part.z for part in own])
        own[0].stream = np.concatenate([part.stream for part in own])
    return parts[0]


def test_spectra_of_deit_are_those_of_the_papers_procedure() -> None:
    table = described("")[1].tables()["baseline"]
    for number, layer in enumerate(stored()):
        series = {("stream_before", -1): layer.stream[:, 1:]}
        for head in range(3):
            series["head", head] = layer.z[:, 1:, head]
            series["contribution", head] = layer.z[:, 1:, head] @ layer.weight[:, head].T
        for (name, head), maps in series.items():
            here = (table.layer == number) & (table.series == name) & (table.head == head)
            here &= table.profile == "diagonal"
            np.testing.assert_allclose(table.delta_log_amplitude[here], oracles.spectrum(maps, (14, 14)), atol=1e-4)


@pytest.mark.parametrize("sampling", ["tokens", "patches", "class", "mean"])
def test_similarities_of_deit_within_layers_are_those_of_stored_outputs(sampling: Any) -> None:
    similarity = SimilaritySums(sampling=sampling)
    describe(deit(), [similarity], images(), units=3, batch=BATCH)
    found: Any = similarity.matrices()
    many = sampling in ("tokens", "patches")
    for number, layer in enumerate(truth()):
        x = oracles.samples(layer, sampling)
        for row in range(3):
            for column in range(3):
                for measure, of_pair in oracles.MEASURES.items():
                    if many and measure == "cka_unbiased":
                        continue  # its Gram matrix would be 9,456 x 9,456
                    if many and column < row and measure != "pwcca":
                        continue  # symmetric, and slow
                    ours = found[measure][3 * number + row, 3 * number + column]
                    assert ours == pytest.approx(of_pair(x[row], x[column]), abs=1e-4), (measure, number, row, column)


def test_similarities_of_all_heads_of_deit_are_those_of_stored_outputs() -> None:
    similarity = SimilaritySums(scope="all")
    describe(deit(), [similarity], images(), units=3, batch=BATCH)
    found: Any = similarity.matrices()
    x = [head for layer in truth() for head in oracles.samples(layer, "tokens")]
    for row, column in np.random.default_rng(0).integers(0, 36, (40, 2)):
        for measure in ("svcca", "cca", "pwcca", "cka", "procrustes"):
            expected = oracles.MEASURES[measure](x[row], x[column])
            assert found[measure][row, column] == pytest.approx(expected, abs=1e-4), (measure, row, column)


def test_debiased_cka_of_all_tokens_of_few_images_is_that_of_gram_matrices() -> None:
    few = 8
    similarity = SimilaritySums(measures=["cka_unbiased"], groups=0)
    describe(deit(), [similarity], images()[:few], batch=BATCH)
    found = similarity.matrices()["cka_unbiased"]
    for number in (0, 6, 11):
        x = [oracles.Samples(head.given[: few * 197]) for head in oracles.samples(truth()[number], "tokens")]
        expected = oracles.cka_unbiased(x[0], x[1])
        assert found[3 * number, 3 * number + 1] == pytest.approx(expected, abs=1e-6)
