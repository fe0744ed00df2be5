"""Leading queries are answered as they are among all queries; the oracle is the whole operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headprobe.backbone.growing.shortcuts import LeadingQueries

QUERIES, KEYS, SIZE = 7, 7, 4


def drawn(heads: int = 3, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 3, QUERIES, SIZE), (2, heads, keys, SIZE), (2, heads, keys, SIZE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def bias(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def by_keyword(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = bias(QUERIES, KEYS)
    return F.scaled_dot_product_attention(key=key, value=value, query=query, dropout_p=0.0, attn_mask=mask)


CALLS: dict[str, Callable[[], Tensor]] = {
    "no mask": lambda: F.scaled_dot_product_attention(*drawn()),
    "a row of the mask for each query": lambda: F.scaled_dot_product_attention(*drawn(), bias(QUERIES, KEYS)),
    "masks of heads": lambda: F.scaled_dot_product_attention(*drawn(), attn_mask=bias(1, 3, QUERIES, KEYS)),
    "a mask for all queries": lambda: F.scaled_dot_product_attention(*drawn(), attn_mask=bias(2, 1, 1, KEYS)),
    "a mask of truth values": lambda: F.scaled_dot_product_attention(*drawn(), attn_mask=bias(QUERIES, KEYS) < 1),
    "causal": lambda: F.scaled_dot_product_attention(*drawn(), is_causal=True),
    "causal, more keys": lambda: F.scaled_dot_product_attention(*drawn(keys=9), is_causal=True),
    "causal, fewer keys": lambda: F.scaled_dot_product_attention(*drawn(keys=2), is_causal=True),
    "no dropout, scaled": lambda: F.scaled_dot_product_attention(*drawn(), None, 0.0, False, scale=0.3),
    "fewer heads of keys": lambda: F.scaled_dot_product_attention(*drawn(heads=1), enable_gqa=True),
    "all by keyword": lambda: by_keyword(*drawn()),
}


@pytest.mark.parametrize("tokens", [1, 2, QUERIES])
@pytest.mark.parametrize("name", CALLS)
def test_leading_queries_are_answered_as_among_all(name: str, tokens: int) -> None:
    expected = CALLS[name]()
    with LeadingQueries(tokens):
        found = CALLS[name]()
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., :tokens, :], expected[..., :tokens, :], atol=1e-6, rtol=1e-5)


def test_without_a_number_all_queries_are_answered_and_other_calls_are_let_through() -> None:
    with LeadingQueries(None):
        assert torch.equal(CALLS["causal"](), F.scaled_dot_product_attention(*drawn(), is_causal=True))
    with LeadingQueries(1):
        query, key, _ = drawn()
        found: Any = query @ key.transpose(-2, -1)
    assert torch.equal(found, query @ key.transpose(-2, -1))
