"""Parameters and multiply-adds by hand; latencies are pairs, and come with their range."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from headprobe.backbone.masking.replacement import WITH_ZERO
from headprobe.pruning.cost import (
    FEWEST_PAIRS,
    Latency,
    cost_lines,
    latency,
    measured,
    multiply_adds,
    parameters_of,
    passes_of,
)
from headprobe.pruning.remove import without_heads
from tests.pruning.test_remove import built, keep_of


def by_hand(heads: tuple[int, int], classes: int = 7) -> tuple[int, int]:
    """Parameters and multiply-adds of the tiny ViT: 64 x 64 pixels in 16 patches, width 48, heads of 12, two blocks."""
    dim, tokens, hidden = 48, 17, 192
    patches = 16 * 16 * 3 * dim
    parameters = patches + dim + dim + tokens * dim + 2 * dim + dim * classes + classes
    work = 16 * patches + dim * classes
    for number in heads:
        width = 12 * number
        parameters += 4 * dim + dim * 3 * width + 3 * width + width * dim + dim + 2 * dim * hidden + hidden + dim
        work += tokens * (4 * dim * width + 2 * dim * hidden) + 2 * tokens * tokens * width
    return parameters, work


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_and_multiply_adds_are_those_counted_by_hand(fused: bool) -> None:
    model, layout = built("vit", fused)
    assert (parameters_of(model), multiply_adds(model, layout.input_size)) == by_hand((4, 4))
    keep = torch.tensor([[True, False, True, True], [False, False, False, True]])
    smaller = without_heads(model, layout, keep, WITH_ZERO)
    assert (parameters_of(smaller), multiply_adds(smaller, layout.input_size)) == by_hand((3, 1))
    without = without_heads(model, layout, keep & torch.tensor([[True], [False]]), WITH_ZERO)
    parameters, work = by_hand((3, 0))
    # of the second attention a bias is left, and the norm before it has nothing to do
    assert (parameters_of(without), multiply_adds(without, layout.input_size)) == (parameters - 2 * 48, work)


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x * self.weight


def test_a_model_that_sleeps_half_as_long_is_twice_as_fast() -> None:
    found = latency((Slow(0.02), Slow(0.01)), (3, 2, 2), 1, pairs=5)
    assert len(found.ratios) == 5
    assert found.speed == pytest.approx(2, rel=0.15)


def test_a_timing_is_no_moment_and_says_of_how_many_passes_it_is_the_mean() -> None:
    found = latency((Slow(0.002), Slow(0.001)), (3, 2, 2), 1, pairs=3)
    assert 1 < found.passes <= 10
    assert (min(found.before), min(found.after)) >= (0.002, 0.001)
    assert found.speed == pytest.approx(2, rel=0.4)
    assert (passes_of([0.003, 0.0021]), passes_of([0.03, 0.02])) == (5, 1)


def test_pairs_end_after_a_while_but_never_before_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headprobe.pruning.cost.SECONDS_A_BATCH", 0.0)
    assert len(latency((Slow(0), Slow(0)), (3, 2, 2), 1, pairs=50).ratios) == FEWEST_PAIRS


def test_the_median_is_that_of_the_ratios_of_pairs() -> None:
    assert Latency(1, (4.0, 1.0, 9.0), (1.0, 1.0, 3.0)).speed == 3.0  # of the medians it would be 4


def test_the_table_says_before_after_range_and_how_many_pairs() -> None:
    model, layout = built("vit")
    smaller = without_heads(model, layout, keep_of(layout, "one left"), WITH_ZERO)
    cost = measured(model, smaller, layout.input_size, pairs=3, batches=(1, 2))
    lines: Any = cost_lines(cost)
    assert lines[1].split() == ["parameters", f"{by_hand((4, 4))[0]:,}", f"{by_hand((1, 1))[0]:,}", "-14.8%"]
    assert lines[3].startswith("ms a batch of 1 ")
    assert "of 3, 3 interleaved pairs" in lines[-1]
    assert "each a mean of " in lines[-1]
    assert [one["batch"] for one in cost.to_json()["latencies"]] == [1, 2]
    assert all(one["passes"] >= 1 for one in cost.to_json()["latencies"])
