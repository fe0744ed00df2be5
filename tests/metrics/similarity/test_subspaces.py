"""Ranks are known by construction: outputs are drawn with them, in float32 as a model computes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from headprobe.metrics.similarity.head_blocks import Precision
from headprobe.metrics.similarity.measures import similarities
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments


def head_of(rank: int, samples: int, mean: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attention-weighted values of the given rank, `[samples, 1, 1, 64]`, about a mean of so many deviations."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(samples, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    return (values / rank**0.5 + mean).to(dtype)[:, None, None]


def rank_of(outputs: Tensor, precision: Precision = "float64", batch: int = 2048) -> int:
    metric = Moments([LayerHeads(1, 64)], MomentOptions(noise_floor=False, precision=precision))
    for part in outputs.split(batch):
        metric.update(0, part)
    metric.close()
    return int(similarities(metric.compute()[0], measures=[]).rank[0])


@pytest.mark.parametrize("rank", [1, 32, 63])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("samples", [100, 20_000])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_rank_deficient_head_has_its_rank(rank: int, mean: float, samples: int, precision: Precision) -> None:
    assert rank_of(head_of(rank, samples, mean), precision) == rank


@pytest.mark.parametrize("rank", [8, 32])
def test_rounding_to_bfloat16_adds_no_rank(rank: int) -> None:
    assert rank_of(head_of(rank, 5000, 0.0, torch.bfloat16)) == rank


def test_rank_is_at_most_one_below_the_samples() -> None:
    assert rank_of(torch.randn(20, 1, 1, 64, generator=torch.Generator().manual_seed(0)) + 50) == 19


def test_values_projected_by_a_deficient_weight_and_attended_have_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 32, generator=generator) @ torch.randn(32, 64, generator=generator) / 80
    tokens = torch.randn(40, 50, 192, generator=generator) + 1
    attention = torch.softmax(torch.randn(40, 50, 50, generator=generator), dim=-1)
    assert rank_of((attention @ (tokens @ weight))[:, :, None]) == 32


def test_a_small_but_real_direction_is_kept() -> None:
    outputs = torch.randn(20_000, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    outputs[..., 0] *= 1e-4
    assert rank_of(outputs) == 64


def test_a_head_that_only_jitters_in_its_last_digit_is_constant() -> None:
    jitter = 1 + torch.finfo(torch.float32).eps * torch.randint(0, 2, (500, 1, 1, 64))
    assert rank_of(3.3 * jitter) == 0


def test_kept_dims_of_float32_products_are_those_of_float64() -> None:
    outputs = head_of(64, 10_000, 5.0) * torch.logspace(0, -2, 64)
    kept = []
    for precision in ("float64", "float32"):
        metric = Moments([LayerHeads(1, 64)], MomentOptions(noise_floor=False, precision=precision))
        metric.update(0, outputs)
        metric.close()
        kept.append(similarities(metric.compute()[0], measures=[]).kept[0])
    assert kept[0] == kept[1]
    assert 1 < kept[0] < 64
    np.testing.assert_array_less(0, kept)
