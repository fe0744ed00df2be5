"""Fused attention in which only the leading queries ask."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LeadingQueries(TorchFunctionMode):
    """Answers only the leading queries of `scaled_dot_product_attention` while it is entered.

    The result has its usual shape, as models fold it back into tokens; behind the leading queries it holds the answer
    of the last of them, which must not be read.

    Args:
        tokens: How many queries are answered; None answers all.
    """

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.tokens is None:
            return func(*args, **kwargs)
        return _answered(self.tokens, *args, **kwargs)


def _answered(
    tokens: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attend with the first `tokens` queries; each row of a mask between tokens belongs to a query."""
    queries = query.shape[-2]
    if attn_mask is not None and attn_mask.shape[-2] == queries:
        attn_mask = attn_mask[..., :tokens, :]
    found = F.scaled_dot_product_attention(query[..., :tokens, :], key, value, attn_mask, *args, **kwargs)
    first, last = found[..., : tokens - 1, :], found[..., tokens - 1 :, :]
    tail = last.expand(*last.shape[:-2], queries - tokens + 1, last.shape[-1])  # takes no memory
    return tail if tokens == 1 else torch.cat([first, tail], dim=-2)
