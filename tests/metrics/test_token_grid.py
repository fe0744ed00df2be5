"""The oracle is timm: its own roll, padding, windows and attention mask."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from headprobe.errors import UsageError
from headprobe.metrics.token_grid import TokenGrid, tables_of

CPU = torch.device("cpu")
CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((14, 14), (7, 7), (3, 3)),
    ((6, 9), (3, 3), (1, 1)),
    ((4, 8), (4, 4), (0, 2)),
    ((6, 5), (4, 4), (2, 2)),
    ((6, 5), (4, 4), (0, 0)),
]


def make(size: Any, window: Any, shift: Any) -> TokenGrid:
    return TokenGrid(math.prod(window), grid=size, patch=(4.0, 4.0), window=window, shift=shift)


def timms_block(size: Any, window: Any, shift: Any) -> Any:
    from timm.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(8, size, 2, window_size=window, shift_size=shift, always_partition=True)


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_places_are_where_timm_puts_patches_into_windows(size: Any, window: Any, shift: Any) -> None:
    grid, block = make(size, window, shift), timms_block(size, window, shift)
    assert (tuple(block.window_size), tuple(block.shift_size)) == (window, shift)
    seen: list[torch.Tensor] = []
    block.attn.forward = lambda tokens, mask=None: seen.append(tokens) or tokens  # type: ignore[func-returns-value]
    numbers = 1.0 + torch.arange(math.prod(size)).view(1, *size, 1).expand(-1, -1, -1, 8)
    block._attn(numbers)
    np.testing.assert_array_equal(grid.places, seen[0][..., 0].long().numpy() - 1)
    assert grid.windows == len(seen[0])
    assert grid.padded == bool((seen[0] == 0).any())


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_groups_are_those_of_timms_attention_mask(size: Any, window: Any, shift: Any) -> None:
    grid, mask = make(size, window, shift), timms_block(size, window, shift).attn_mask
    same = grid.groups[:, :, None] == grid.groups[:, None, :]
    if mask is None:
        assert same.all()
    else:
        np.testing.assert_array_equal(same, (mask == 0).numpy())


def test_prefix_tokens_have_no_place() -> None:
    assert TokenGrid(7, 3, True, (2, 2)).places.tolist() == [[-1, -1, -1, 0, 1, 2, 3]]


def test_windows_that_are_alike_share_one_table() -> None:
    unshifted, shifted = make((56, 56), (7, 7), (0, 0)), make((56, 56), (7, 7), (3, 3))
    distance = tables_of(unshifted, CPU).distance
    assert distance is not None
    assert len(distance) == 1
    shifted_distance = tables_of(shifted, CPU).distance
    assert shifted_distance is not None
    assert len(shifted_distance) == 64


@pytest.mark.parametrize(("size", "window", "shift"), [case for case in CASES if case[0] != (6, 5)])
def test_the_reach_of_offsets_is_the_window(size: Any, window: Any, shift: Any) -> None:
    assert tables_of(make(size, window, shift), CPU).reach == window


def test_distances_are_in_pixels_of_unequal_patches() -> None:
    distance = tables_of(TokenGrid(6, grid=(2, 3), patch=(10.0, 4.0)), CPU).distance
    assert distance is not None
    assert distance[0, 0].tolist() == pytest.approx([0, 4, 8, 10, math.hypot(10, 4), math.hypot(10, 8)])


@pytest.mark.parametrize("wrong", [{"grid": (4, 5)}, {"window": (4, 4)}, {"grid": (8, 8), "window": (4, 5)}])
def test_tokens_that_do_not_fill_the_grid_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="got"):
        TokenGrid(17, 1, True, **wrong)
