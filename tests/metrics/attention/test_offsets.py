import math
from typing import Any

import numpy as np
import pytest
import torch

from headprobe.errors import UsageError
from headprobe.metrics.attention.offsets import OffsetMaps
from headprobe.metrics.attention.reduction import reduce_attention
from headprobe.metrics.token_grid import TokenGrid
from tests.metrics.attention import attention_oracle as oracle
from tests.metrics.attention.test_attention import GLOBAL, WINDOWED, chunked, draw, one_hot, swin_dense


def maps(grid: TokenGrid, weights: torch.Tensor, images: int = 1, queries: int = 5) -> OffsetMaps:
    metric = OffsetMaps([grid], [weights.shape[1]])
    count = len(weights) // grid.windows
    reduction = reduce_attention(grid, count, chunked(grid, weights, images, queries), aligned=True)
    metric.update(0, count, reduction.aligned)
    return metric


@pytest.mark.parametrize("grid", GLOBAL.values())
def test_maps_are_the_mean_over_queries_of_attention_around_them(grid: TokenGrid) -> None:
    assert grid.grid is not None
    weights = draw(grid)
    found = maps(grid, weights).compute()[0]
    dense = weights.double().numpy()
    for head in range(2):
        expected = np.mean(
            [oracle.offset_map(image[head], grid.prefix, grid.grid, grid.grid) for image in dense], axis=0
        )
        assert found is not None
        np.testing.assert_allclose(found[head], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("grid", WINDOWED)
def test_maps_of_windows_are_those_of_the_dense_image(grid: TokenGrid) -> None:
    assert grid.grid is not None
    assert grid.window is not None
    weights = draw(grid)
    dense, _ = swin_dense(grid, grid.shift, weights)
    found = maps(grid, weights).compute()[0]
    assert found is not None
    for head in range(2):
        expected = [oracle.offset_map(image[head].numpy(), 0, grid.grid, grid.window) for image in dense]
        np.testing.assert_allclose(found[head], np.mean(expected, axis=0), rtol=1e-5, atol=1e-9)
        assert math.isclose(found[head].sum(), 1, rel_tol=1e-6)


def test_a_head_that_looks_one_patch_to_the_right_peaks_there() -> None:
    grid = TokenGrid(16, 0, False, (4, 4))
    keys = torch.arange(16).view(4, 4).clone()
    keys[:, :3] += 1
    found = maps(grid, one_hot(keys.flatten())).compute()[0]
    assert found is not None
    assert found.shape == (2, 7, 7)
    assert found[0, 3, 4] == 12 / 16
    assert found[0, 3, 3] == 4 / 16


@pytest.mark.parametrize("grid", [GLOBAL["vit"], WINDOWED[1]])
def test_halves_merge_to_the_whole_in_whatever_batches(grid: TokenGrid) -> None:
    weights = draw(grid, images=5)
    whole = maps(grid, weights, images=5, queries=100)
    merged = maps(grid, weights[: 2 * grid.windows], images=2, queries=100)
    merged.merge(maps(grid, weights[2 * grid.windows :], images=1, queries=100))
    arrays: tuple[dict[str, Any], dict[str, Any]] = (merged.to_arrays(), whole.to_arrays())
    for name, array in arrays[0].items():
        np.testing.assert_allclose(array, arrays[1][name], rtol=1e-12, atol=1e-15)


def test_layers_without_places_or_patch_queries_have_no_map() -> None:
    metric = OffsetMaps([TokenGrid(16, pooled=True), TokenGrid(17, 1, True, None)], [2, 2])
    metric.update(0, 3, None)
    metric.update(1, 3, None)
    assert metric.compute() == [None, None]


def test_weights_that_were_not_summed_are_asked_for() -> None:
    with pytest.raises(UsageError, match="needs weights summed over images"):
        OffsetMaps([GLOBAL["vit"]], [2]).update(0, 3, None)
