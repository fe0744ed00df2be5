"""The oracle is float64 numpy on dense matrices (`attention_oracle`); windows are laid out by timm's own functions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.attention.reduction import reduce_attention
from headprobe.metrics.attention.statistics import STATISTICS, AttentionStatistics
from headprobe.metrics.attention.weights_chunk import WeightsChunk
from headprobe.metrics.token_grid import TokenGrid
from tests.metrics.attention import attention_oracle as oracle

GLOBAL = {
    "vit": TokenGrid(17, 1, True, (4, 4)),
    "no class token": TokenGrid(16, 0, False, (4, 4)),
    "registers": TokenGrid(21, 5, True, (4, 4), (14.0, 14.0)),
    "registers only": TokenGrid(20, 4, False, (4, 4)),
    "non-square": TokenGrid(16, 1, True, (3, 5), (16.0, 8.0)),
}


def draw(grid: TokenGrid, images: int = 3, heads: int = 2, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    """Random weights `[rows, heads, tokens, tokens]`; nobody attends out of its group."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(images, grid.windows, heads, grid.tokens, grid.tokens, generator=generator)
    groups = torch.from_numpy(grid.groups)
    apart = groups[:, :, None] != groups[:, None, :]
    return logits.masked_fill(apart[:, None], -100 * sharpness).softmax(dim=-1).flatten(0, 1)


def chunked(grid: TokenGrid, weights: Tensor, images: int = 1, queries: int = 5) -> list[WeightsChunk]:
    step = images * grid.windows
    rows = [slice(row, min(row + step, len(weights))) for row in range(0, len(weights), step)]
    pieces = [slice(q, min(q + queries, weights.shape[2])) for q in range(0, weights.shape[2], queries)]
    return [WeightsChunk(row, piece, weights[row, :, piece]) for row in rows for piece in pieces]


def reduced(grid: TokenGrid, weights: Tensor, norms: Tensor | None = None, **chunks: int) -> dict[str, Tensor]:
    images = len(weights) // grid.windows
    pieces = chunked(grid, weights, **(chunks or {"images": images, "queries": grid.tokens}))
    return reduce_attention(grid, images, pieces, norms).values


def assert_is_oracle(values: dict[str, Tensor], expected: list[list[dict[str, float]]]) -> None:
    """Compare with the oracle's numbers per image and head."""
    for name in expected[0][0]:
        numbers = np.array([[head[name] for head in image] for image in expected])
        if np.isfinite(numbers).all() and not (name == "register_mass" and name not in values):
            np.testing.assert_allclose(values[name].numpy(), numbers, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("queries", [3, 100])
def test_statistics_of_global_attention_are_the_papers(name: str, queries: int) -> None:
    grid = GLOBAL[name]
    assert grid.grid is not None
    weights, norms = draw(grid), torch.rand(3, 2, grid.tokens, generator=torch.Generator().manual_seed(1))
    values = reduced(grid, weights, norms, images=2, queries=queries)
    expected = [
        [
            oracle.statistics(
                a.double().numpy(), grid.prefix, grid.class_token, grid.grid, grid.patch, norms=n.double().numpy()
            )
            for a, n in zip(image, of_image, strict=True)
        ]
        for image, of_image in zip(weights, norms, strict=True)
    ]
    assert_is_oracle(values, expected)
    assert ("class_mass" in values) == grid.class_token
    assert ("register_mass" in values) == bool(grid.registers)


@pytest.mark.parametrize("name", ["vit", "no class token", "registers"])
@pytest.mark.parametrize("sharpness", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("queries", [3, 100])
def test_statistics_of_exponentials_are_those_of_the_weights(name: str, sharpness: float, queries: int) -> None:
    grid = GLOBAL[name]
    assert grid.grid is not None
    logits = sharpness * torch.randn(3, 2, grid.tokens, grid.tokens, generator=torch.Generator().manual_seed(0))
    logits[..., -1] = -math.inf  # a key that nobody sees
    logits -= logits.amax(dim=-1, keepdim=True)
    exact, norms = logits.double().softmax(dim=-1), torch.rand(3, 2, grid.tokens)
    finite = logits.clamp_min(torch.finfo(torch.float32).min)
    chunks = [
        chunk._replace(logs=finite[chunk.rows, :, chunk.queries].clone())
        for chunk in chunked(grid, logits.exp(), 2, queries)
    ]
    values = reduce_attention(grid, 3, chunks, norms).values
    expected = [
        [
            oracle.statistics(a.numpy(), grid.prefix, grid.class_token, grid.grid, grid.patch, norms=n.double().numpy())
            for a, n in zip(image, of_image, strict=True)
        ]
        for image, of_image in zip(exact, norms, strict=True)
    ]
    for statistic in values:
        numbers = [[head[statistic] for head in image] for image in expected]
        np.testing.assert_allclose(values[statistic].numpy(), numbers, rtol=3e-5, atol=2e-6, err_msg=statistic)


def swin_dense(grid: TokenGrid, shift: tuple[int, int], weights: Tensor) -> tuple[Tensor, list[Any]]:
    """The dense attention `[images, heads, patches, patches]` of windows laid out by timm, and who sees whom."""
    from timm.models.swin_transformer import SwinTransformerBlock, window_partition

    assert grid.grid is not None
    assert grid.window is not None
    numbers = torch.arange(math.prod(grid.grid)).view(1, *grid.grid, 1)
    windows = window_partition(torch.roll(numbers, (-shift[0], -shift[1]), (1, 2)), grid.window).flatten(1)
    block = SwinTransformerBlock(8, grid.grid, 2, window_size=grid.window, shift_size=shift)
    images, heads, patches = len(weights) // len(windows), weights.shape[1], math.prod(grid.grid)
    dense = torch.zeros(images, heads, patches, patches, dtype=torch.float64)
    components: set[tuple[int, ...]] = set()
    by_image = weights.double().view(images, len(windows), heads, *weights.shape[2:])
    for number, tokens in enumerate(windows):
        dense[:, :, tokens[:, None], tokens[None]] = by_image[:, number]
        mask = block.attn_mask
        sees = torch.ones(len(tokens), len(tokens)) if mask is None else (mask[number] == 0).float()
        components |= {tuple(tokens[row > 0].tolist()) for row in sees}
    return dense, [np.array(component) for component in sorted(components)]


WINDOWS = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((6, 9), (3, 3), (1, 1)),
    ((4, 8), (4, 4), (0, 2)),
    ((6, 4), (2, 2), (1, 1)),
]


@pytest.mark.parametrize(("size", "window", "shift"), WINDOWS)
def test_statistics_of_windows_are_those_of_the_dense_image(size: Any, window: Any, shift: Any) -> None:
    grid = TokenGrid(math.prod(window), grid=size, patch=(4.0, 8.0), window=window, shift=shift)
    weights = draw(grid)
    dense, components = swin_dense(grid, shift, weights)
    norms = torch.rand(len(weights), 2, grid.tokens, generator=torch.Generator().manual_seed(1))
    dense_norms = torch.zeros(3, 2, grid.patches)
    by_head = norms.view(3, -1, 2, grid.tokens).transpose(1, 2).flatten(2)
    dense_norms[:, :, torch.from_numpy(grid.places).flatten()] = by_head
    expected = [
        [
            oracle.statistics(a.numpy(), 0, False, size, (4.0, 8.0), components, n.double().numpy())
            for a, n in zip(image, of_image, strict=True)
        ]
        for image, of_image in zip(dense, dense_norms, strict=True)
    ]
    assert_is_oracle(reduced(grid, weights, norms, images=1, queries=3), expected)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
def test_padding_is_no_part_of_the_image(shift: tuple[int, int]) -> None:
    grid = TokenGrid(16, grid=(6, 5), patch=(4.0, 4.0), window=(4, 4), shift=shift)
    weights = draw(grid)
    dense = torch.zeros(3, 2, 30, 30, dtype=torch.float64)
    for number, places in enumerate(grid.places):
        real = torch.from_numpy(np.flatnonzero(places >= 0))
        where = torch.from_numpy(places)[real]
        part = weights.double().view(3, 4, 2, 16, 16)[:, number][:, :, real][..., real]
        dense[:, :, where[:, None], where[None]] = part
    values = reduced(grid, weights)
    for image in range(3):
        for head in range(2):
            raw = dense[image, head].numpy()
            a = raw / raw.sum(-1, keepdims=True)
            pixels = oracle.distances((6, 5), (4.0, 4.0))
            np.testing.assert_allclose(
                values["attention_distance_px"][image, head], (a * pixels).sum(-1).mean(), rtol=1e-5
            )
            np.testing.assert_allclose(values["entropy_nats"][image, head], oracle.entropy(a).mean(), rtol=1e-5)
            np.testing.assert_allclose(values["confidence"][image, head], a.max(-1).mean(), rtol=1e-5)
            np.testing.assert_allclose(values["self_mass"][image, head], np.diag(raw).mean(), rtol=1e-5)


def table(grid: TokenGrid, weights: Tensor) -> Any:
    metric = AttentionStatistics([grid], [2], [dict.fromkeys(["output_norm_ratio", "value_weighted_attention"], "-")])
    metric.update(0, len(weights) // grid.windows, reduced(grid, weights))
    return metric.compute()


def uniform(grid: TokenGrid) -> Tensor:
    return draw(grid, images=2, sharpness=1e-20) if not any(grid.shift) else _uniform_in_groups(grid)


def _uniform_in_groups(grid: TokenGrid) -> Tensor:
    groups = torch.from_numpy(grid.groups)
    same = (groups[:, :, None] == groups[:, None, :]).float()
    return (same / same.sum(-1, keepdim=True)).repeat(2, 1, 1)[:, None].expand(-1, 2, -1, -1)


@pytest.mark.parametrize(
    ("grid", "pixels"),
    [
        (TokenGrid(197, 1, True, (14, 14), (16.0, 16.0)), 116.49),
        (TokenGrid(49, grid=(56, 56), patch=(4.0, 4.0), window=(7, 7)), 14.44),
        (TokenGrid(49, grid=(28, 28), patch=(8.0, 8.0), window=(7, 7)), 28.88),
        (TokenGrid(49, grid=(14, 14), patch=(16.0, 16.0), window=(7, 7)), 57.75),
        (TokenGrid(49, grid=(7, 7), patch=(32.0, 32.0), window=(7, 7)), 115.50),
    ],
)
def test_uniform_attention_has_the_known_distance(grid: TokenGrid, pixels: float) -> None:
    found = table(grid, uniform(grid)).mean
    assert round(float(found["attention_distance_px"][0]), 2) == pixels
    np.testing.assert_allclose(found["attention_distance_ratio"], 1, rtol=1e-6)


WINDOWED = [TokenGrid(math.prod(window), 0, False, size, (4.0, 4.0), window, shift) for size, window, shift in WINDOWS]


@pytest.mark.parametrize("grid", [*GLOBAL.values(), *WINDOWED])
def test_uniform_attention_to_reachable_keys_is_the_baseline(grid: TokenGrid) -> None:
    found = table(grid, uniform(grid)).mean
    np.testing.assert_allclose(found["attention_distance_ratio"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["entropy_ratio"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-5)


def one_hot(keys: Tensor) -> Tensor:
    """Weights `[1, 2, queries, keys]` of two heads that look at one key per query."""
    return torch.nn.functional.one_hot(keys).float().expand(1, 2, -1, -1)


def test_a_head_that_looks_at_itself_has_distance_and_entropy_0_and_shares_all_information() -> None:
    grid = TokenGrid(16, 0, False, (4, 4))
    found = table(grid, one_hot(torch.arange(16))).mean
    for name, value in {"attention_distance_px": 0, "entropy_nats": 0, "self_mass": 1, "confidence": 1}.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["mutual_information"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["sink_mass"], 1 / 16, rtol=1e-6)


def test_a_head_that_looks_one_patch_to_the_right_has_that_distance() -> None:
    grid = TokenGrid(16, 0, False, (4, 4), (16.0, 8.0))
    keys = torch.arange(16).view(4, 4).clone()
    keys[:, :3] += 1  # the last column looks at itself
    found = table(grid, one_hot(keys.flatten())).mean
    np.testing.assert_allclose(found["attention_distance_px"], 8 * 12 / 16, rtol=1e-6)


def test_a_head_that_looks_at_one_key_is_a_sink_without_information() -> None:
    grid = TokenGrid(16, 0, False, (4, 4))
    weights = one_hot(torch.cat([torch.full((15,), 3), torch.tensor([15])]))
    weights = weights.clone()
    weights[..., 15, :] = weights[..., 0, :]
    found = table(grid, weights).mean
    np.testing.assert_allclose(found["sink_mass"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-6)


def test_weight_on_prefix_tokens_is_left_out_of_distance_but_not_of_the_raw_one() -> None:
    grid = TokenGrid(21, 5, True, (4, 4))
    weights = draw(grid)
    half = weights * 0.5
    half[..., 0] += 0.5
    plain, shifted = reduced(grid, weights), reduced(grid, half)
    torch.testing.assert_close(shifted["attention_distance_px"], plain["attention_distance_px"])
    torch.testing.assert_close(shifted["entropy_nats"], plain["entropy_nats"])
    torch.testing.assert_close(shifted["attention_distance_raw_px"], plain["attention_distance_raw_px"] / 2)


def test_attention_to_the_class_token_alone_is_no_number_rather_than_a_wrong_one() -> None:
    grid = TokenGrid(17, 1, True, (4, 4))
    weights = torch.zeros(1, 2, 17, 17)
    weights[..., 0] = 1
    values = reduced(grid, weights)
    assert values["attention_distance_px"].isnan().all()
    assert values["entropy_nats"].isnan().all()
    assert (values["class_mass"] == 1).all()


def test_value_weighted_attention_is_1_for_uniform_attention_and_below_where_values_are_small() -> None:
    grid = TokenGrid(17, 1, True, (4, 4))
    norms = torch.ones(2, 2, 17)
    norms[..., 0] = 0.01
    flat = reduced(grid, uniform(grid), norms)["value_weighted_attention"]
    torch.testing.assert_close(flat, torch.ones_like(flat))
    idle = torch.zeros(2, 2, 17, 17)
    idle[..., 0] = 1
    assert (reduced(grid, idle, norms)["value_weighted_attention"] < 0.02).all()


def test_a_pooling_layer_has_what_needs_no_patch_queries_and_reasons_for_the_rest() -> None:
    grid = TokenGrid(16, pooled=True)
    weights = torch.rand(3, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    weights /= weights.sum(-1, keepdim=True)
    chunk = WeightsChunk(slice(0, 3), slice(0, 1), weights)
    values = reduce_attention(grid, 3, [chunk]).values
    torch.testing.assert_close(values["entropy_all_keys_nats"], -(weights * weights.log()).sum(-1)[..., 0])
    torch.testing.assert_close(values["sink_mass"], weights.amax(-1)[..., 0])
    metric = AttentionStatistics([grid], [2])
    metric.update(0, 3, values)
    found = metric.compute()
    assert set(metric.reasons[0]) == {name for name, value in found.mean.items() if np.isnan(value).all()}
    assert "learned" in metric.reasons[0]["attention_distance_px"]


def test_patches_without_a_known_grid_have_no_distance() -> None:
    grid = TokenGrid(17, 1, True, None)
    found = table(grid, draw(grid))
    assert np.isnan(found.mean["attention_distance_px"]).all()
    assert np.isfinite(found.mean["entropy_nats"]).all()


def test_a_window_of_one_token_has_no_information_to_share() -> None:
    grid = TokenGrid(1, grid=(2, 2), patch=(32.0, 32.0), window=(1, 1))
    metric = AttentionStatistics([grid], [2], [dict.fromkeys(["output_norm_ratio", "value_weighted_attention"], "-")])
    metric.update(0, 3, reduced(grid, draw(grid)))
    found = metric.compute().mean
    assert np.isnan(found["mutual_information"]).all()
    assert np.isnan(found["entropy_ratio"]).all()
    assert (found["attention_distance_px"] == 0).all()


# -- sums ----------------------------------------------------------------------------------------------------------


def filled(values: dict[str, Tensor], images: slice) -> AttentionStatistics:
    metric = make()
    part = {name: value[images] for name, value in values.items()}
    metric.update(0, len(part["entropy_nats"]), part)
    metric.update(1, len(part["entropy_nats"]), part)
    return metric


def make() -> AttentionStatistics:
    return AttentionStatistics([GLOBAL["vit"]] * 2, [2, 2])


def values_of(images: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(images, 2, generator=generator) for name in STATISTICS if name != "register_mass"}


def test_mean_and_standard_error_are_numpys() -> None:
    values = values_of(7)
    found = filled(values, slice(None)).compute()
    assert found.layer.tolist() == [0, 0, 1, 1]
    assert found.head.tolist() == [0, 1, 0, 1]
    for name, value in values.items():
        numbers = np.tile(value.double().numpy(), 2)
        np.testing.assert_allclose(found.mean[name], numbers.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.error[name], numbers.std(0, ddof=1) / math.sqrt(7), rtol=1e-9)


def test_halves_merge_to_the_whole() -> None:
    values = values_of(7)
    merged = filled(values, slice(0, 3))
    merged.merge(filled(values, slice(3, 7)))
    whole: dict[str, Any] = filled(values, slice(None)).to_arrays()
    arrays: dict[str, Any] = merged.to_arrays()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-12)


@pytest.mark.parametrize("name", ["vit", "registers", "non-square"])
def test_images_count_the_same_in_whatever_batches_and_chunks_they_come(name: str) -> None:
    grid = GLOBAL[name]
    weights, norms = draw(grid, images=6), torch.rand(6, 2, grid.tokens)
    whole = reduced(grid, weights, norms)
    parts = [reduced(grid, weights[i : i + 2], norms[i : i + 2]) for i in (0, 2, 4)]
    for statistic, value in whole.items():
        assert torch.equal(value, torch.cat([part[statistic] for part in parts])), statistic
    for statistic, value in reduced(grid, weights, norms, images=1, queries=4).items():
        torch.testing.assert_close(value, whole[statistic], rtol=1e-5, atol=1e-6)


def test_arrays_give_the_metric_back_to_the_last_bit() -> None:
    metric = filled(values_of(5), slice(None))
    again = make().from_arrays(metric.to_arrays())
    assert all(again.to_arrays()[name].tobytes() == array.tobytes() for name, array in metric.to_arrays().items())


def test_arrays_of_another_shape_are_refused() -> None:
    arrays = make().to_arrays()
    with pytest.raises(ValueError, match="'total' must be float64"):
        make().from_arrays({**arrays, "total": arrays["total"][:, :1]})
    with pytest.raises(ValueError, match="arrays must be"):
        make().from_arrays({"images": arrays["images"]})


def test_metrics_of_other_models_do_not_merge() -> None:
    with pytest.raises(ValueError, match="same model"):
        make().merge(AttentionStatistics([GLOBAL["registers"]] * 2, [2, 2]))


def test_one_image_has_a_mean_but_no_standard_error() -> None:
    found = filled(values_of(1), slice(None)).compute()
    assert np.isfinite(found.mean["confidence"]).all()
    assert np.isnan(found.error["confidence"]).all()


def test_no_image_is_no_number() -> None:
    assert all(np.isnan(value).all() for value in make().compute().mean.values())


def test_a_missing_statistic_needs_a_reason() -> None:
    values = values_of(2)
    del values["confidence"]
    with pytest.raises(UsageError, match="without 'confidence'"):
        make().update(0, 2, values)
    with pytest.raises(UsageError, match=r"must be \[2, 2\]"):
        make().update(0, 2, {**values, "confidence": torch.rand(2, 3)})
    with pytest.raises(UsageError, match="got colour"):
        make().update(0, 2, {"colour": torch.rand(2, 2)})


def test_states_keep_their_precision_when_the_module_around_them_loses_its_own() -> None:
    module = torch.nn.ModuleList([make()]).to(torch.bfloat16)
    assert module[0].total.dtype == torch.float64
