"""Unusual models and data: all statistics work, or refuse with one clear message before the first image."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headprobe.backbone.capture.layer_facts import CONTRIBUTION
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.errors import UsageError
from headprobe.metrics.similarity.comparison import jackknife
from headprobe.module import HeadProbe
from tests.describe import oracles
from tests.describe.driving import describe, feed, noise, normalised, prepare, small_probe, tiny_probe

MEASURES = tuple(oracles.MEASURES)
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2}


class All:
    """All three statistics of a run."""

    def __init__(self, **similarity: Any) -> None:
        self.attention, self.similarity, self.spectrum = AttentionSums(), SimilaritySums(**similarity), SpectrumSums()

    @property
    def statistics(self) -> list[HeadStatistic]:
        return [self.attention, self.similarity, self.spectrum]

    def assert_complete(self, but: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Every number of the baseline is finite, but for columns with a reason and the heads named."""
        table = self.attention.tables()["baseline"]
        reasons = self.attention.reasons()
        for name, values in table.mean.items():
            for layer, head, value in zip(table.layer, table.head, values, strict=True):
                if (layer, head) not in but:
                    assert np.isfinite(value) == (name not in reasons[layer]), (name, layer, head)
        found: Any = self.similarity.matrices()
        same = found["layer"][:, None] == found["layer"]
        fine = np.array([place not in but for place in zip(found["layer"], found["head"], strict=True)])
        for measure in MEASURES:
            assert np.isfinite(found[measure][same & fine & fine[:, None]]).all(), measure
        spectrum = self.spectrum.tables()["baseline"]
        fine = np.array([place not in but for place in zip(spectrum.layer, spectrum.head, strict=True)])
        for layer, fact in enumerate(
            self.spectrum.subject.facts
        ):  # where a norm follows, heads add nothing by themselves
            undefined = (
                (spectrum.layer == layer) & (spectrum.series == "contribution") & (CONTRIBUTION in fact.undefined)
            )
            assert np.isnan(spectrum.delta_log_amplitude[undefined]).all()
            fine &= ~undefined
        assert np.isfinite(spectrum.delta_log_amplitude[fine]).all()


def described(probe: HeadProbe, images: Tensor, similarity: dict[str, Any] | None = None, **how: Any) -> All:
    found = All(**(similarity or {}))
    describe(probe, found.statistics, images, **how)
    return found


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "one head per layer": ("distilled", {"num_heads": 1}),
    "one head per layer, windows": ("swin", {"num_heads": (1, 1)}),
    "not square": ("distilled", {"img_size": (64, 96)}),
    "a single row of patches": ("distilled", {"img_size": (16, 64)}),
    "windows, not square": ("swin", {"img_size": (64, 96)}),
    "windows, shifted along one axis": ("swin", {"img_size": (16, 64)}),
    "windows, padded": ("swin", {"img_size": (56, 72)}),
    "windows, padded, v2": ("swin_v2", {"img_size": (56, 72)}),
    "windows, padded, v2-CR": ("swin_v2_cr", {"img_size": (56, 72)}),
    "no class token": ("clip", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_registers", {}),
    "registers, no class token": ("vit_registers", {"class_token": False, "global_pool": "avg"}),
    "pooling head": ("siglip", {}),
    "norm over heads": ("eva_inner_norm", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_described(name: str) -> None:
    kind, options = MODELS[name]
    probe = tiny_probe(kind, **options)
    described(probe, noise(probe, 10), units=2, batch=3).assert_complete()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_described_under_a_mask(name: str) -> None:
    kind, options = MODELS[name]
    probe = tiny_probe(kind, **options)
    found = described(probe, noise(probe, 10), specs=["layer:1"], units=2, batch=3)
    found.assert_complete()
    matrices: Any = found.similarity.matrices()
    assert ((matrices["masked_rank"] == 0) == (matrices["layer"] == 1)).all()
    assert np.isnan(matrices["masked_svcca"][matrices["layer"] == 1]).all()
    tables = found.attention.tables()
    for table in (tables["masked"], tables["change"]):
        for column, values in table.mean.items():
            assert (np.isnan(values) == np.isnan(tables["baseline"].mean[column])).all(), column


def test_batches_of_one_image_give_the_numbers_of_one_batch() -> None:
    probe = tiny_probe("vit_registers")
    images = noise(probe, 9)
    alone, together = (described(probe, images, batch=batch).attention.tables()["baseline"] for batch in (1, 9))
    for column, values in alone.mean.items():
        np.testing.assert_allclose(values, together.mean[column], rtol=1e-5, err_msg=column)
        np.testing.assert_allclose(alone.error[column], together.error[column], rtol=1e-3, atol=1e-6, err_msg=column)


def test_larger_inputs_whose_weights_do_not_fit_one_chunk_equal_the_dense_recomputation() -> None:
    probe = small_probe("deit_tiny_patch16_224", img_size=448, depth=1)
    images = noise(probe, 2)
    found = described(probe, images, {"groups": 0}, batch=2)
    found.assert_complete()
    table = found.attention.tables()["baseline"]
    (layer,) = oracles.forward(probe.backbone, normalised(probe, images))
    for column, values in oracles.attention_statistics(layer, (16, 16), True).items():
        np.testing.assert_allclose(table.mean[column], values.mean(0), rtol=1e-4, err_msg=column)


def test_deit_tiny_at_384_pixels_is_described() -> None:
    probe = small_probe("deit_tiny_patch16_224", img_size=384, depth=2)
    found = described(probe, noise(probe, 3), batch=2)
    found.assert_complete()
    maps = found.attention.maps()["baseline"][0]
    assert maps is not None
    assert maps.shape == (3, 47, 47)


# -- few images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [[2], [1, 1], [0, 1, 0, 1], [2, 0]])
@pytest.mark.parametrize("sampling", ["tokens", "mean"])
def test_two_images_are_enough_to_run(units: list[int], sampling: str) -> None:
    probe = tiny_probe("vit_registers")
    found = described(probe, noise(probe, 2), {"sampling": sampling}, units=units, batch=4)
    matrices: Any = found.similarity.matrices()
    assert matrices["images"] == 2
    assert np.isfinite(matrices["svcca"][:3, :3]).all()
    table = found.attention.tables()["baseline"]
    assert np.isfinite(table.mean["entropy_nats"]).all()
    assert np.isfinite(table.error["entropy_nats"]).all()


@pytest.mark.parametrize("sampling", ["tokens", "mean"])
def test_one_image_has_means_but_no_errors(sampling: str) -> None:
    probe = tiny_probe("vit_registers")
    found = described(probe, noise(probe, 1), {"sampling": sampling})
    matrices: Any = found.similarity.matrices()
    assert np.isnan(matrices["svcca_floor"]).all()
    table = found.attention.tables()["baseline"]
    assert np.isfinite(table.mean["entropy_nats"]).all()
    assert np.isnan(table.error["entropy_nats"]).all()


def test_units_of_one_image_each_have_values_but_no_noise_floor() -> None:
    probe = tiny_probe("vit_registers")
    found = described(probe, noise(probe, 6), units=[1] * 6)
    found.assert_complete()
    matrices: Any = found.similarity.matrices()
    assert np.isnan(matrices["svcca_floor"]).all()
    assert np.isfinite(matrices["svcca_se"][:3, :3]).all()


@pytest.mark.parametrize("units", [[], [0], [0, 0, 0]])
def test_without_an_image_every_number_is_missing(units: list[int]) -> None:
    probe = tiny_probe("vit_registers")
    found = described(probe, noise(probe, 0), specs=["layer:1"], units=units)
    assert all(np.isnan(values).all() for values in found.attention.tables()["masked"].mean.values())
    matrices: Any = found.similarity.matrices()
    assert matrices["images"] == 0
    assert np.isnan(matrices["svcca"]).all()
    assert np.isnan(found.spectrum.tables()["change"].delta_log_amplitude).all()


def test_units_without_images_change_nothing() -> None:
    probe = tiny_probe("vit_registers")
    images = noise(probe, 20)
    one, other = (described(probe, images, {"groups": 2}, units=units) for units in ([10, 10], [10, 0, 10, 0]))
    for table in ("mean", "error"):
        columns = (getattr(found.attention.tables()["baseline"], table) for found in (one, other))
        for values, others in zip(*(column.values() for column in columns), strict=True):
            np.testing.assert_array_equal(values, others)
    np.testing.assert_array_equal(one.similarity.matrices()["svcca_se"], other.similarity.matrices()["svcca_se"])
    np.testing.assert_array_equal(one.similarity.matrices()["svcca_floor"], other.similarity.matrices()["svcca_floor"])


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("swin", {}, {"sampling": "class"}, "class token"),
    ("clip", {"class_token": False, "global_pool": "avg"}, {"sampling": "class"}, "class token"),
    ("siglip", {}, {"sampling": "class"}, "class token"),
    ("swin", {}, {"scope": "all"}, "mean"),
    ("siglip", {}, {"scope": "all"}, "mean"),
    ("swin", {}, {"scope": "pairs", "pairs": [(0, 3)]}, "mean"),
    ("swin", {}, {"scope": "pairs", "pairs": [(0, 4)]}, "0 to 3"),
    ("swin", {}, {"scope": "pairs", "pairs": [(1, 1)]}, "two different layers"),
    ("swin", {}, {"scope": "pairs"}, "pairs"),
    ("swin", {}, {"pairs": [(0, 1)]}, "pairs"),
]


@pytest.mark.parametrize(("kind", "options", "similarity", "words"), REFUSED)
def test_impossible_samples_and_pairs_are_refused_before_the_first_image(
    kind: str, options: dict[str, Any], similarity: dict[str, Any], words: str
) -> None:
    probe = tiny_probe(kind, **options)
    with pytest.raises(UsageError, match=f"(?s){words}.*got "):
        prepare(probe, [SimilaritySums(**similarity)])


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "token"},
        {"scope": "layer"},
        {"scope": "all", "groups": 4},
        {"groups": 1},
        {"groups": 17},
        {"groups": -1},
        {"variance": 0},
        {"variance": 1.01},
        {"variance": float("nan")},
        {"precision": "bf16"},
        {"measures": ["svca"]},
    ],
)
def test_wrong_options_are_refused_before_the_first_image(options: dict[str, Any]) -> None:
    probe = tiny_probe("distilled")
    with pytest.raises(UsageError, match="got "):
        prepare(probe, [SimilaritySums(**options)])


# -- precision ---------------------------------------------------------------------------------------------------------


def assert_close(found: All, exact: All) -> None:
    """Compare within what bf16's 8 bits allow."""
    half, whole = found.attention.tables()["baseline"], exact.attention.tables()["baseline"]
    for column, values in whole.mean.items():
        size = np.nanmax(np.abs(values), initial=1e-3)
        np.testing.assert_allclose(half.mean[column], values, atol=0.1 * size, rtol=0.1, err_msg=column)
    matrices: Any = found.similarity.matrices()
    others: Any = exact.similarity.matrices()
    for measure in ("cka", "procrustes", "cca"):
        np.testing.assert_allclose(matrices[measure], others[measure], atol=0.05, err_msg=measure)
    one, other = found.spectrum.tables()["baseline"], exact.spectrum.tables()["baseline"]
    # median: where a map is nearly constant, rounding decides the logarithm of what varies
    assert np.nanmedian(np.abs(one.delta_log_amplitude - other.delta_log_amplitude)) < 0.03


HALF = ["distilled", "vit_registers", "beit", "eva", "siglip", "swin", "swin_v2", "swin_v2_cr"]


@pytest.mark.parametrize("kind", HALF)
def test_under_autocast_numbers_are_float32s_within_rounding(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 8)
    exact = described(probe, images, batch=4)
    found = All()
    prepare(probe, found.statistics, batch=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed(probe, images, [8], batch=4)
    found.assert_complete()
    assert_close(found, exact)


@pytest.mark.parametrize("kind", HALF)
def test_a_model_in_bf16_is_described_within_rounding(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 8)
    exact = described(probe, images, batch=4)
    probe.backbone.to(torch.bfloat16)
    found = described(probe, images, specs=["layer:1"], batch=4)
    found.assert_complete()
    assert_close(found, exact)


@pytest.mark.parametrize("kind", ["distilled", "eva", "swin", "swin_v2"])
def test_a_model_in_float64_is_described_alike(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 8)
    exact = described(probe, images, specs=["layer:1"], batch=4)
    probe.backbone.double()
    found = described(probe, images, specs=["layer:1"], batch=4)
    found.assert_complete()
    for column, values in exact.attention.tables()["baseline"].mean.items():
        np.testing.assert_allclose(found.attention.tables()["baseline"].mean[column], values, rtol=1e-4, err_msg=column)


def test_sums_stay_float64_whatever_the_module_is_cast_to() -> None:
    probe = tiny_probe("distilled")
    attention = AttentionSums()
    prepare(probe, [attention], units=1)
    probe.to(torch.bfloat16)
    feed(probe, noise(probe, 4), [4])
    assert attention.whole["baseline"].total.dtype == torch.float64


# -- broken heads ------------------------------------------------------------------------------------------------------


def replacing(probe: HeadProbe, layer: int, change: Any) -> Any:
    """Let `change` edit what a layer's qkv projection returns `[images, tokens, 3, heads, dim]`."""
    attn: Any = probe.backbone.get_submodule(probe.layout.layers[layer].name)

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        split = out.unflatten(-1, (3, attn.num_heads, -1)).clone()
        change(split)
        return split.flatten(-3)

    return attn.qkv.register_forward_hook(hook)


def with_nan(images: Tensor, which: int) -> tuple[HeadProbe, All]:
    """Describe images of which one has a NaN in a token of layer 1."""
    probe, seen = tiny_probe("distilled"), [0]

    def change(qkv: Tensor) -> None:
        place = which - seen[0]
        seen[0] += len(qkv)
        if 0 <= place < len(qkv):
            qkv[place, 4] = torch.nan

    found = All()
    prepare(probe, found.statistics, units=2, batch=4)
    handle = replacing(probe, 1, change)
    feed(probe, images, [12, 8], batch=4)
    handle.remove()
    return probe, found


def test_a_nan_in_one_image_leaves_earlier_layers_alone_and_later_ones_without_numbers() -> None:
    images = noise(tiny_probe("distilled"), 20)
    _, found = with_nan(images, which=6)
    table = found.attention.tables()["baseline"]
    matrices: Any = found.similarity.matrices()
    plain = described(tiny_probe("distilled"), images, units=[12, 8], batch=4)
    expected: Any = plain.similarity.matrices()
    for column, values in table.mean.items():
        early = table.layer == 0
        np.testing.assert_array_equal(values[early], plain.attention.tables()["baseline"].mean[column][early])
    assert matrices["rank"].tolist() == [16, 16, 16, 0, 0, 0, 0, 0, 0]
    for measure in MEASURES:
        assert np.isnan(matrices[measure][3:, 3:]).all()
        np.testing.assert_allclose(matrices[measure][:3, :3], expected[measure][:3, :3], rtol=1e-9)
    spectrum = found.spectrum.tables()["baseline"]
    late = (spectrum.layer >= 1) & (spectrum.series == "head")
    assert np.isnan(spectrum.delta_log_amplitude[late]).all()


def test_a_nan_in_one_image_is_never_averaged_as_a_number() -> None:
    _, found = with_nan(noise(tiny_probe("distilled"), 20), which=6)
    table = found.attention.tables()["baseline"]
    late = table.layer >= 1
    numbers = [column for column, values in table.mean.items() if not np.isnan(values[late]).all()]
    assert numbers == []


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_a_constant_head_has_rank_0_and_no_similarity(constant: float) -> None:
    probe = tiny_probe("distilled")

    def change(qkv: Tensor) -> None:
        qkv[:, :, 2, 1] = constant

    handle = replacing(probe, 1, change)
    found = described(probe, noise(probe, 20), units=2)
    handle.remove()
    found.assert_complete(but=frozenset({(1, 1)}))
    matrices: Any = found.similarity.matrices()
    assert (matrices["rank"] == 0).tolist() == [False] * 4 + [True] + [False] * 4
    for measure in MEASURES:
        assert np.isnan(matrices[measure][4]).all()
        assert np.isnan(matrices[measure][:, 4]).all()


@pytest.mark.parametrize("gap", [20.0, 90.0, 100.0, 150.0])
def test_a_head_that_looks_at_the_class_token_alone_has_the_shape_of_what_is_left(gap: float) -> None:
    probe = tiny_probe("vit")

    def change(qkv: Tensor) -> None:
        qkv[:, :, :2, 0] = 0
        qkv[:, :, 0, 0, 0] = 1
        qkv[:, 0, 1, 0, 0] = gap * qkv.shape[-1] ** 0.5  # logits: the gap at the class token, 0 at all patches

    handle = replacing(probe, 1, change)
    found = described(probe, noise(probe, 4))
    handle.remove()
    table = found.attention.tables()["baseline"]
    here = np.flatnonzero((table.layer == 1) & (table.head == 0))
    assert table.mean["class_mass"][here] == pytest.approx(1, abs=1e-6)
    assert table.mean["attention_distance_ratio"][here] == pytest.approx(1, rel=1e-4)
    assert table.mean["entropy_ratio"][here] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-5])
def test_the_spectrum_of_a_nearly_constant_head_is_the_papers(spread: float) -> None:
    probe = tiny_probe("distilled", img_size=224)
    generator = torch.Generator().manual_seed(0)
    stored: list[Tensor] = []

    def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = torch.randn(16, generator=generator) + spread * torch.randn(len(args[0]), 198, 16, generator=generator)
        stored.append(z[:, 2:])
        return (torch.cat([z, args[0][..., 16:]], dim=-1),)

    attn: Any = probe.backbone.get_submodule(probe.layout.layers[1].name)
    spectrum = SpectrumSums()
    prepare(probe, [spectrum], units=1)
    handle = attn.norm.register_forward_pre_hook(change)
    feed(probe, noise(probe, 4), [4])
    handle.remove()
    table = spectrum.tables()["baseline"]
    here = (table.layer == 1) & (table.series == "head") & (table.head == 0) & (table.profile == "diagonal")
    expected = oracles.spectrum(torch.cat(stored).double().numpy(), (14, 14))
    np.testing.assert_allclose(table.delta_log_amplitude[here], expected, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (48, 112), (16, 64)])
def test_deltas_are_differences_from_frequency_0_on_any_grid(size: tuple[int, int]) -> None:
    probe = tiny_probe("distilled", img_size=size)
    table = described(probe, noise(probe, 4)).spectrum.tables()["baseline"]
    for profile in ("diagonal", "radial"):
        here = (table.layer == 0) & (table.series == "head") & (table.head == 0) & (table.profile == profile)
        assert table.frequency[here][0] == 0
        assert table.delta_log_amplitude[here][0] == 0
        assert (np.diff(table.frequency[here]) > 0).all()


def test_a_class_token_of_any_kind_of_vit_is_no_register() -> None:
    probe = small_probe("vit_base_patch16_224", use_naflex=True, **SMALL)
    table = described(probe, noise(probe, 2)).attention.tables()["baseline"]
    layer = oracles.forward(probe.backbone, normalised(probe, noise(probe, 2)))[0]
    expected = layer.attention[:, :, 1:, 0].mean((0, 2))
    np.testing.assert_allclose(table.mean["class_mass"][:3], expected, rtol=1e-4)
    assert np.isnan(table.mean["register_mass"]).all()


@pytest.mark.parametrize("kind", ["distilled", "swin", "siglip"])
def test_a_model_without_any_head_left_is_described(kind: str) -> None:
    probe = tiny_probe(kind)
    found = described(probe, noise(probe, 10), specs=["all"], units=2)
    found.assert_complete()
    matrices: Any = found.similarity.matrices()
    assert (matrices["masked_rank"] == 0).all()
    for name, values in matrices.items():
        if name.startswith(("masked_", "change_")) and values.ndim == 2:
            assert (~values if values.dtype == bool else np.isnan(values)).all(), name
    spectrum = found.spectrum.tables()
    of_heads = np.isin(spectrum["masked"].series, ["head", "contribution"])
    assert np.isnan(spectrum["masked"].delta_log_amplitude[of_heads]).all()
    assert np.isnan(spectrum["change"].delta_log_amplitude[of_heads]).all()
    table = found.attention.tables()["masked"]
    here = np.array(["output_norm_ratio" not in found.attention.reasons()[layer] for layer in table.layer])
    assert (table.mean["output_norm_ratio"][here] == 0).all()


# -- the jackknife of unequal groups -----------------------------------------------------------------------------------


def busing(values: list[float], groups: list[list[float]], statistic: Any) -> tuple[float, float]:
    """Delete-m_j jackknife by Busing et al., 1999: its estimate and standard error, in plain loops."""
    n, g, whole = len(values), len(groups), statistic(values)
    others = [statistic([v for k, other in enumerate(groups) if k != j for v in other]) for j in range(g)]
    estimate = g * whole - sum((1 - len(groups[j]) / n) * others[j] for j in range(g))
    variance = 0.0
    for j in range(g):
        h = n / len(groups[j])
        pseudo = h * whole - (h - 1) * others[j]
        variance += (pseudo - estimate) ** 2 / (h - 1) / g
    return float(estimate), float(variance**0.5)


SIZES = [(100, 3, 17, 250, 1), (5, 5, 5, 5), (1, 1), (400, 2, 2, 2, 2, 2), (3, 90)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["mean", "variance", "ratio"])
def test_the_jackknife_of_unequal_groups_is_busings(sizes: tuple[int, ...], name: str) -> None:
    statistic: Any = {
        "mean": np.mean,
        "variance": np.var,
        "ratio": lambda v: float(np.mean(np.square(v)) / np.mean(np.abs(v))),
    }[name]
    draws = np.random.default_rng(0).gamma(2.0, size=sum(sizes))
    groups = [part.tolist() for part in np.split(draws, np.cumsum(sizes)[:-1])]
    others = [statistic(np.concatenate([g for k, g in enumerate(groups) if k != j])) for j in range(len(groups))]
    whole = statistic(draws)
    spread = jackknife(whole, others, sizes, largest=np.inf)
    estimate, error = busing(draws.tolist(), groups, statistic)
    assert spread.error == pytest.approx(error, rel=1e-9)
    assert spread.low <= min(whole, whole - 2 * (whole - estimate)) + 1e-12
    assert spread.high >= max(whole, whole - 2 * (whole - estimate)) - 1e-12


@pytest.mark.parametrize(
    "sizes", [(100, 3, 17, 250, 1, 40, 8, 60), (64,) * 15 + (1,), (500, 20, 20, 20), (300, 10, 10)]
)
def test_intervals_of_a_mean_over_unequal_groups_cover_their_nominal_rate(sizes: tuple[int, ...]) -> None:
    rng, runs = np.random.default_rng(1), 2000
    draws = rng.normal(size=(runs, sum(sizes)))
    parts = np.split(draws, np.cumsum(sizes)[:-1], axis=1)
    sums, n = [part.sum(1) for part in parts], sum(sizes)
    total = draws.sum(1)
    others = [(total - own) / (n - size) for own, size in zip(sums, sizes, strict=True)]
    spread = jackknife(total / n, others, sizes, largest=np.inf)
    covered = ((spread.low <= 0) & (spread.high >= 0)).mean()
    assert covered >= 0.93
