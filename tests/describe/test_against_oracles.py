"""Every statistic, end to end, against a plain float64 forward pass with unfused attention and numpy by the papers."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from headprobe.describe.attention import AttentionSums
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.metrics.attention.statistics import HeadTable
from headprobe.metrics.spectrum.spectra import SpectrumTable
from headprobe.module import HeadProbe
from tests.describe import oracles
from tests.describe.driving import describe, noise, normalised, small_probe, tiny_probe

Array = oracles.Array
IMAGES = 12


class Case(NamedTuple):
    """A model: options over those of a tiny one, and pixels from one patch to the next in the first layer."""

    kind: str
    patch: int
    options: dict[str, Any]


CASES = {
    "vit": Case("vit", 16, {}),
    "registers": Case("vit_registers", 14, {}),
    "odd grid": Case("vit_registers", 14, {"img_size": 70}),
    "distilled": Case("distilled", 16, {}),
    "beit": Case("beit", 16, {}),
    "eva": Case("eva", 14, {}),
    "dinov3": Case("dinov3", 16, {}),
    "no class token": Case("clip", 16, {"class_token": False, "global_pool": "avg"}),
    "not square": Case("distilled", 16, {"img_size": (64, 96)}),
    "swin": Case("swin", 4, {}),
    "swin v2": Case("swin_v2", 4, {}),
    "swin not square": Case("swin", 4, {"img_size": (64, 96)}),
    "swin shifted along one axis": Case("swin", 4, {"img_size": (16, 64)}),
    "swin with padding": Case("swin", 4, {"img_size": (56, 72)}),
    "swin v2 with padding": Case("swin_v2", 4, {"img_size": (56, 72)}),
}
SQUARE = [name for name in CASES if not isinstance(CASES[name].options.get("img_size"), tuple)]


@cache
def model(name: str) -> tuple[HeadProbe, Tensor]:
    case = CASES[name]
    probe = tiny_probe(case.kind, **case.options)
    return probe, noise(probe, IMAGES)


@cache
def truth(name: str, masked: tuple[tuple[int, int], ...] = ()) -> list[oracles.Layer]:
    probe, images = model(name)
    return oracles.forward(probe.backbone, normalised(probe, images), masked)


BATCHES = (4, 3, 4, 1)  # what `described` sends: rounding depends on it


@cache
def stored(name: str, masked: tuple[tuple[int, int], ...] = ()) -> list[oracles.Layer]:
    probe, images = model(name)
    parts = [
        oracles.forward(probe.backbone, probe.normalised(part).double().numpy(), masked, stored=True)
        for part in images.split(BATCHES)
    ]
    return [
        replace(
            own[0], z=np.concatenate([part.z for part in own]), stream=np.concatenate([part.stream for part in own])
        )
        for own in zip(*parts, strict=True)
    ]


@cache
def described(name: str, spec: str = "") -> tuple[AttentionSums, SpectrumSums, SimilaritySums]:
    """Attention and spectra of a model, observed in two units and uneven batches."""
    probe, images = model(name)
    attention, spectrum, similarity = AttentionSums(), SpectrumSums(), SimilaritySums()
    describe(probe, [attention, spectrum, similarity], images, [spec] if spec else [], units=(7, 5), batch=4)
    return attention, spectrum, similarity


def patch_of(name: str, layer: int) -> tuple[float, float]:
    """Swin merges 2 x 2 patches after its first two layers."""
    size = CASES[name].patch * (2 ** (layer // 2) if name.startswith("swin") else 1)
    return (size, size)


def per_image(name: str, masked: tuple[tuple[int, int], ...] = ()) -> list[dict[str, Array]]:
    """The oracle's statistics `[images, heads]` of each layer; a norm before the stream leaves no norm ratio."""
    with_class = getattr(model(name)[0].backbone, "cls_token", None) is not None
    found = [
        oracles.attention_statistics(layer, patch_of(name, number), with_class)
        for number, layer in enumerate(truth(name, masked))
    ]
    for layer in found if name.startswith("swin v2") else ():
        del layer["output_norm_ratio"]
    return found


def assert_table(table: HeadTable, expected: list[dict[str, Array]], scale: list[dict[str, Array]]) -> None:
    """Compare means within 1e-4 of the statistic's size and standard errors within 1e-3 of theirs."""
    for layer, by_name in enumerate(expected):
        here = table.layer == layer
        for name, values in by_name.items():
            size = np.abs(scale[layer][name]).max()
            spread = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(table.mean[name][here], values.mean(0), atol=1e-4 * size, rtol=0, err_msg=name)
            np.testing.assert_allclose(table.error[name][here], spread, atol=1e-5 * size, rtol=1e-3, err_msg=name)
        assert (table.images[here] == IMAGES).all()


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_reads_the_models_own_attention(name: str) -> None:
    for layer in truth(name):
        tokens = layer.z.shape[1]
        outputs = np.einsum("bhqk,bhkd->bqhd", layer.attention[:, :, :tokens], layer.values)
        np.testing.assert_allclose(outputs, layer.z, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_attention_statistics_and_their_errors_are_those_of_the_dense_recomputation(name: str) -> None:
    expected = per_image(name)
    assert_table(described(name)[0].tables()["baseline"], expected, expected)


@pytest.mark.parametrize("name", CASES)
def test_no_column_is_filled_that_the_model_does_not_have(name: str) -> None:
    table, expected = described(name)[0].tables()["baseline"], per_image(name)
    ratios = {"attention_distance_ratio", "entropy_ratio"}
    for layer, by_name in enumerate(expected):
        filled = {column for column, values in table.mean.items() if not np.isnan(values[table.layer == layer]).any()}
        assert filled == by_name.keys() | ratios
        assert set(described(name)[0].reasons()[layer]) == table.mean.keys() - filled


@pytest.mark.parametrize("name", CASES)
def test_ratios_are_to_uniform_attention_to_reachable_patches(name: str) -> None:
    table, expected = described(name)[0].tables()["baseline"], per_image(name)
    for number, layer in enumerate(truth(name)):
        here, by_name = table.layer == number, expected[number]
        for ratio, column, plain in zip(
            ("attention_distance_ratio", "entropy_ratio"),
            ("attention_distance_px", "entropy_nats"),
            oracles.uniform(layer, patch_of(name, number)),
            strict=True,
        ):
            np.testing.assert_allclose(table.mean[ratio][here], by_name[column].mean(0) / plain, rtol=1e-4)
            assert (table.mean[ratio][here] > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_offset_maps_sum_to_one_and_are_those_of_a_loop_over_pairs(name: str) -> None:
    for layer, ours in zip(truth(name), described(name)[0].maps()["baseline"], strict=True):
        assert ours is not None
        np.testing.assert_allclose(ours.sum(axis=(1, 2)), 1, atol=1e-6)
        expected = oracles.offset_map(layer)
        cut = [(whole - part) // 2 for whole, part in zip(expected.shape[1:], ours.shape[1:], strict=True)]
        inside = expected[:, cut[0] : expected.shape[1] - cut[0], cut[1] : expected.shape[2] - cut[1]]
        np.testing.assert_allclose(ours, inside, atol=1e-6)
        np.testing.assert_allclose(inside.sum(), expected.sum(), atol=1e-9)


# -- similarity --------------------------------------------------------------------------------------------------------

SAMPLINGS = {
    "vit": ("tokens", "patches", "class", "mean"),
    "registers": ("tokens", "patches", "class", "mean"),
    "swin": ("tokens", "patches", "mean"),
    "swin with padding": ("tokens", "patches", "mean"),
}
WITHIN = [(name, sampling) for name, samplings in SAMPLINGS.items() for sampling in samplings]


def most_samples(sampling: str) -> int:
    """Images whose Gram matrices stay small."""
    return IMAGES if sampling in ("tokens", "patches") else 80


@cache
def z_of(name: str, images: int) -> list[oracles.Layer]:
    probe = model(name)[0]
    return oracles.forward(probe.backbone, normalised(probe, noise(probe, images)))


def assert_similar(found: Any, x: list[oracles.Samples], compared: Any) -> None:
    """Compare all measures of every compared pair with the oracle's; a value near the 99% cut could keep a dim more."""
    layer = found["layer"]
    for measure, of_pair in oracles.MEASURES.items():
        ours = found[measure]
        for row in range(len(x)):
            for column in range(len(x)):
                if not compared(int(layer[row]), int(layer[column])):
                    assert np.isnan(ours[row, column])
                    continue
                expected = of_pair(x[row], x[column])
                assert ours[row, column] == pytest.approx(expected, abs=1e-4), (measure, row, column)


@pytest.mark.parametrize(("name", "sampling"), WITHIN)
def test_similarities_within_layers_are_those_of_stored_outputs(name: str, sampling: Any) -> None:
    probe, images = model(name)[0], most_samples(sampling)
    if sampling in ("tokens", "patches") and name.startswith("swin"):
        images = 3
    similarity = SimilaritySums(sampling=sampling)
    describe(probe, [similarity], noise(probe, images), units=2, batch=5)
    found = similarity.matrices()
    x = [head for layer in z_of(name, images) for head in oracles.samples(layer, sampling)]
    assert_similar(found, x, lambda row, column: row == column)
    assert found["images"] == images
    kept = [one.kept.given.shape[1] for one in x]
    assert found["kept"].tolist() == kept


@pytest.mark.parametrize("sampling", ["tokens", "patches", "class", "mean"])
def test_similarities_of_all_heads_are_those_of_stored_outputs(sampling: Any) -> None:
    probe, images = model("registers")[0], most_samples(sampling)
    similarity = SimilaritySums(scope="all", sampling=sampling)
    describe(probe, [similarity], noise(probe, images), units=2, batch=5)
    found = similarity.matrices()
    x = [head for layer in z_of("registers", images) for head in oracles.samples(layer, sampling)]
    assert_similar(found, x, lambda row, column: True)


def test_heads_of_different_stages_are_compared_by_their_mean_tokens() -> None:
    probe = model("swin")[0]
    similarity = SimilaritySums(scope="pairs", pairs=[(3, 1), (0, 2)], sampling="mean")
    describe(probe, [similarity], noise(probe, 80), units=3, batch=7)
    found = similarity.matrices()
    x = [head for layer in z_of("swin", 80) for head in oracles.samples(layer, "mean")]
    pairs = [{1, 3}, {0, 2}]
    assert_similar(found, x, lambda row, column: row == column or {row, column} in pairs)


@pytest.mark.parametrize("batch", [1, 3, 8, 30])
def test_similarities_and_their_errors_do_not_depend_on_batches(batch: int) -> None:
    probe = model("registers")[0]
    images = noise(probe, 60)
    found: list[Any] = []
    for size in (batch, 11):
        similarity = SimilaritySums()
        describe(probe, [similarity], images, units=2, batch=size)
        found.append(similarity.matrices())
    for name, values in found[0].items():
        if values.ndim == 2:
            np.testing.assert_allclose(values, found[1][name], atol=2e-4, err_msg=name)


def test_the_noise_floor_is_that_of_each_image_beside_the_next_of_its_unit() -> None:
    probe = model("registers")[0]
    similarity = SimilaritySums(sampling="mean", groups=0)
    describe(probe, [similarity], noise(probe, 80), units=(50, 30), batch=7)
    found = similarity.matrices()
    after = np.concatenate([np.roll(np.arange(50), -1), 50 + np.roll(np.arange(30), -1)])
    for number, layer in enumerate(z_of("registers", 80)):
        x = oracles.samples(layer, "mean")
        here = np.flatnonzero(found["layer"] == number)
        for row in range(3):
            for column in range(row, 3):
                beside = oracles.Samples(x[column].given[after])
                for measure in ("svcca", "cca", "cka", "cka_unbiased", "procrustes"):
                    expected = oracles.MEASURES[measure](x[row], beside)
                    assert found[f"{measure}_floor"][here[row], here[column]] == pytest.approx(expected, abs=1e-5)


# -- frequencies -------------------------------------------------------------------------------------------------------


def spectra(name: str, masked: tuple[tuple[int, int], ...] = ()) -> list[dict[tuple[str, int], Array]]:
    """The oracle's diagonal delta log amplitudes of each image `[images, bins]` by series and head."""
    found = []
    for layer in stored(name, masked):
        series = {("stream_before", -1): layer.stream[:, layer.prefix :]}
        for head in range(layer.z.shape[2]):
            series["head", head] = layer.z[:, layer.prefix :, head]
            series["contribution", head] = layer.contribution[:, layer.prefix :, head]
        found.append(
            {
                key: np.stack([oracles.spectrum(image[None], layer.grid) for image in maps])
                for key, maps in series.items()
            }
        )
    return found


def diagonal(table: SpectrumTable, layer: int, series: str, head: int) -> Any:
    return (table.layer == layer) & (table.series == series) & (table.head == head) & (table.profile == "diagonal")


@pytest.mark.parametrize("name", SQUARE)
def test_spectra_are_those_of_the_papers_procedure(name: str) -> None:
    table = described(name)[1].tables()["baseline"]
    for layer, by_series in enumerate(spectra(name)):
        for (series, head), values in by_series.items():
            here = diagonal(table, layer, series, head)
            if name == "swin v2" and series == "contribution":  # a norm over all heads follows: no head adds its own
                assert np.isnan(table.delta_log_amplitude[here]).all()
                continue
            np.testing.assert_allclose(table.delta_log_amplitude[here], values.mean(0), atol=1e-4)
            spread = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(table.error[here], spread, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["vit", "registers", "beit", "swin", "swin v2"])
def test_the_stream_after_attention_is_the_one_before_plus_what_attention_adds(name: str) -> None:
    probe, images = model(name)
    table, added = (
        described(name)[1].tables()["baseline"],
        oracles.streams_after(probe.backbone, normalised(probe, images)),
    )
    for number, (layer, after) in enumerate(zip(truth(name), added, strict=True)):
        expected = oracles.spectrum(after[:, layer.prefix :], layer.grid)
        here = diagonal(table, number, "stream_after", -1)
        np.testing.assert_allclose(table.delta_log_amplitude[here], expected, atol=1e-4)


# -- masked models -----------------------------------------------------------------------------------------------------

MASKS = [
    ("vit", "head:2.1", ((2, 1),)),
    ("swin", "layer:1", ((1, 0), (1, 1))),
    ("beit", "index:2", ((0, 2), (1, 2), (2, 2))),
]


@pytest.mark.parametrize(("name", "spec", "heads"), MASKS)
def test_the_masked_models_attention_is_that_of_heads_zeroed_by_hand(
    name: str, spec: str, heads: tuple[tuple[int, int], ...]
) -> None:
    tables, baseline, masked = described(name, spec)[0].tables(), per_image(name), per_image(name, heads)
    assert_table(tables["baseline"], baseline, baseline)
    assert_table(tables["masked"], masked, baseline)
    paired = [{key: m[key] - b[key] for key in b} for b, m in zip(baseline, masked, strict=True)]
    assert_table(tables["change"], paired, baseline)


@pytest.mark.parametrize(("name", "spec", "heads"), MASKS)
def test_changes_are_masked_minus_baseline_and_zero_before_the_mask(
    name: str, spec: str, heads: tuple[tuple[int, int], ...]
) -> None:
    attention, spectrum, similarity = described(name, spec)
    tables, before = attention.tables(), min(layer for layer, _ in heads)
    for column, change in tables["change"].mean.items():
        if column.endswith("_ratio") and column != "output_norm_ratio":
            continue
        both = tables["masked"].mean[column] - tables["baseline"].mean[column]
        np.testing.assert_allclose(change, both, atol=1e-7 * np.nanmax(np.abs([1.0, *tables["baseline"].mean[column]])))
        early = tables["change"].layer < before
        assert np.isnan(change[early]).all() or (change[early] == 0).all(), column
    spectra_ = spectrum.tables()
    early = spectra_["change"].layer < before
    assert (spectra_["change"].delta_log_amplitude[early] == 0).all()
    assert (spectra_["change"].error[early] == 0).all()
    found: Any = similarity.matrices()
    early = found["layer"] < before
    for measure in oracles.MEASURES:
        block = found[f"change_{measure}"][np.ix_(early, early)]
        assert (block[~np.isnan(block)] == 0).all()
        assert np.array_equal(
            found[measure][np.ix_(early, early)], found[f"masked_{measure}"][np.ix_(early, early)], True
        )


@pytest.mark.parametrize(("name", "spec", "heads"), MASKS)
def test_the_masked_models_spectra_are_those_of_heads_zeroed_by_hand(
    name: str, spec: str, heads: tuple[tuple[int, int], ...]
) -> None:
    tables = described(name, spec)[1].tables()
    baseline, masked = spectra(name), spectra(name, heads)
    for layer, by_series in enumerate(masked):
        for (series, head), values in by_series.items():
            here = diagonal(tables["masked"], layer, series, head)
            if (layer, head) in heads:
                for table in (tables["masked"], tables["change"]):
                    assert np.isnan(table.delta_log_amplitude[here]).all()
                continue
            paired = values - baseline[layer][series, head]
            np.testing.assert_allclose(tables["masked"].delta_log_amplitude[here], values.mean(0), atol=5e-4)
            np.testing.assert_allclose(tables["change"].delta_log_amplitude[here], paired.mean(0), atol=5e-4)
            spread = paired.std(axis=0, ddof=1) / np.sqrt(len(paired))
            np.testing.assert_allclose(tables["change"].error[here], spread, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "spec", "heads"), MASKS)
def test_the_masked_models_similarities_are_those_of_heads_zeroed_by_hand(
    name: str, spec: str, heads: tuple[tuple[int, int], ...]
) -> None:
    found = described(name, spec)[2].matrices()
    places = list(zip(found["layer"].tolist(), found["head"].tolist(), strict=True))
    x = [head for layer in truth(name, heads) for head in oracles.samples(layer, "tokens")]
    for row, first in enumerate(places):
        for column, second in enumerate(places):
            if first[0] != second[0]:
                continue
            for measure in ("svcca", "cca", "pwcca", "cka", "procrustes"):
                ours = found[f"masked_{measure}"][row, column]
                if first in heads or second in heads:
                    assert np.isnan(ours)
                else:
                    assert ours == pytest.approx(oracles.MEASURES[measure](x[row], x[column]), abs=1e-4)
    for row, place in enumerate(places):
        assert (found["masked_rank"][row] == 0) == (place in heads)


def test_heads_of_layers_with_layer_scale_in_parallel_branches_are_scaled_too() -> None:
    ratios = []
    for gamma in (1e-3, 1.0):
        probe = small_probe("vit_small_patch16_18x2_224", img_size=64, embed_dim=48, num_heads=3, depth=2)
        for name, parameter in probe.backbone.named_parameters():
            if name.endswith("ls.gamma"):
                parameter.data.fill_(gamma)
        attention = AttentionSums()
        describe(probe, [attention], noise(probe, 4))
        ratios.append(attention.tables()["baseline"].mean["output_norm_ratio"][:3])
    np.testing.assert_allclose(ratios[0], ratios[1] / 1000, rtol=1e-3)
