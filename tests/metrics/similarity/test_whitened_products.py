"""The oracle is numpy's singular value decomposition of all samples at once; heads are as steep as trained ones."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.metrics.similarity.head_blocks import Block, LayerHeads, Precision
from headprobe.metrics.similarity.head_moments import HeadMoments
from headprobe.metrics.similarity.measures import MEASURES, similarities
from headprobe.metrics.similarity.moments import MomentOptions, Moments
from headprobe.metrics.similarity.whitened_products import WORTHWHILE, WhiteSamples

Array = NDArray[np.float64]
IMAGES, TOKENS, HEADS, DIMS = 40, 50, WORTHWHILE, 16


def steep(ratio: float = 1e-5, heads: int = HEADS, seed: int = 0, rank: int = DIMS) -> Tensor:
    """Related heads, float32 `[images, tokens, heads, dims]`, the last axis `ratio` times the first."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(IMAGES, TOKENS, 1, rank, generator=generator, dtype=torch.float64)
    own = torch.randn(IMAGES, TOKENS, heads, rank, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, float(np.log10(ratio)), DIMS, dtype=torch.float64)[:rank]
    mixing = torch.linalg.qr(torch.randn(heads, DIMS, DIMS, generator=generator, dtype=torch.float64)).Q[:, :rank]
    mixed = torch.einsum("nthr,hrd->nthd", (causes + own) * sizes, mixing)
    return (mixed + 3 * torch.randn(heads, DIMS, generator=generator, dtype=torch.float64)).float()


def moments_of(outputs: Tensor, precision: Precision, batch: int = 16) -> HeadMoments:
    metric = Moments([LayerHeads(outputs.shape[2], DIMS)], MomentOptions(precision=precision))
    for part in outputs.split(batch):
        metric.update(0, part)
    metric.close()
    return metric.compute()[0]


def mean_correlation(one: Array, other: Array) -> float:
    """Mean canonical correlation of two heads `[samples, dims]` by their left singular vectors."""
    bases = [np.linalg.svd(head - head.mean(axis=0), full_matrices=False)[0] for head in (one, other)]
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean())


def expected(outputs: Tensor, images: NDArray[np.int_] | None = None) -> Array:
    """Mean canonical correlations, row <= column mirrored; the column's heads on other `images`, if given."""
    rows = outputs.double().numpy()
    columns = rows if images is None else rows[images]
    found = np.empty((HEADS, HEADS))
    for row in range(HEADS):
        for column in range(row, HEADS):
            value = mean_correlation(rows[:, :, row].reshape(-1, DIMS), columns[:, :, column].reshape(-1, DIMS))
            found[row, column] = found[column, row] = value
    return found


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_cca_and_its_floor_are_exact_in_every_precision_and_batch(precision: Precision, batch: int) -> None:
    outputs = steep()
    moments = moments_of(outputs, precision, batch)
    found = similarities(moments, measures=["cca"])
    floor = similarities(moments, measures=["cca"], noise_floor=True).values["cca"]
    assert found.rank.tolist() == [DIMS] * HEADS
    np.testing.assert_allclose(found.values["cca"], expected(outputs), atol=2e-6)
    np.testing.assert_allclose(floor, expected(outputs, np.roll(np.arange(IMAGES), -1)), atol=2e-6)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5])
def test_all_measures_in_float32_are_those_in_float64(ratio: float) -> None:
    outputs = steep(ratio)
    for noise_floor in (False, True):
        ours, exact = (
            similarities(moments_of(outputs, precision), noise_floor=noise_floor)
            for precision in ("float32", "float64")
        )
        assert ours.rank.tolist() == exact.rank.tolist()
        assert ours.kept.tolist() == exact.kept.tolist()
        for measure in MEASURES:
            np.testing.assert_allclose(ours.values[measure], exact.values[measure], atol=2e-6, err_msg=measure)


@pytest.mark.parametrize("rank", [1, 5, 15])
@pytest.mark.parametrize("batch", [1, 40])
def test_a_rank_deficient_head_has_its_rank_in_float32(rank: int, batch: int) -> None:
    found = similarities(moments_of(steep(1e-2, rank=rank), "float32", batch), measures=[])
    assert found.rank.tolist() == [rank] * HEADS


def test_moments_in_float32_err_in_each_direction_by_a_part_of_its_own_size() -> None:
    outputs = steep(1e-5)
    rough, exact = (moments_of(outputs, precision).own.products for precision in ("float32", "float64"))
    for head in range(HEADS):
        columns = slice(head * DIMS, (head + 1) * DIMS)
        sizes, axes = np.linalg.eigh(exact[columns, columns])
        assert sizes[0] < 1e-9 * sizes[-1]
        along = np.diagonal(axes.T @ rough[columns, columns] @ axes)
        np.testing.assert_allclose(along, sizes, rtol=1e-5)


def test_samples_of_several_layers_are_multiplied_as_they_are() -> None:
    block = Block((0, 1), (LayerHeads(3, 4), LayerHeads(2, 5)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, block.extended, generator=generator, dtype=torch.float64)
    rows[:, 3] = rows[:, 2] * (1 + 1e-9)  # two channels of a head that are one but for a hair
    white = WhiteSamples(rows, block)
    np.testing.assert_allclose(white.own(), rows.T @ rows, atol=1e-4)
    head = np.repeat(np.arange(5), block.dims)  # a row's head stands beside itself and later ones only
    later = np.pad(head[:, None] <= head, (0, block.extended - block.width), constant_values=True)
    np.testing.assert_allclose(white.shifted(5)[later], (rows[:-5].T @ rows[5:])[later], atol=1e-4)


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_a_constant_or_broken_head_spoils_no_other_in_float32(broken: float) -> None:
    outputs = steep(1e-2)
    spoilt = outputs.clone()
    spoilt[:, :, 1] = broken
    found, whole = (similarities(moments_of(each, "float32"), measures=["cca"]) for each in (spoilt, outputs))
    assert found.rank.tolist() == [DIMS, 0, *[DIMS] * (HEADS - 2)]
    others = np.delete(np.arange(HEADS), 1)
    kept = np.ix_(others, others)
    np.testing.assert_allclose(found.values["cca"][kept], whole.values["cca"][kept], atol=2e-6)


def test_blocks_of_few_heads_are_multiplied_in_float64_whatever_the_precision() -> None:
    few = steep(heads=WORTHWHILE - 1)
    ours, exact = (moments_of(few, precision) for precision in ("float32", "float64"))
    np.testing.assert_array_equal(ours.own.products, exact.own.products)
    assert ours.rounding == 0
