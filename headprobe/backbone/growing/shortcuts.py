"""Work that no logit needs: what the growing pass may leave out (`shortcut_trials` finds it).

A mask changes nothing before the place where its layer concatenates the heads. So the rows that join at a layer need
no norm, queries, keys, values and attention of their own there: they share the trunk's (`SharedCore`). Behind the last
attention every token goes its own way, and a model that pools its class token needs no other one (`PooledTokens`).
Both leave a module's rows or tokens out at its input, and have them back at the head-concat point.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.growing.batch_arguments import Arguments, Batched, first_rows
from headprobe.backbone.growing.row_plan import PassRows
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablate_heads
from headprobe.backbone.operator_calls import inside


@dataclass(frozen=True)
class SharedCore:
    """The stretch of a layer that masks joining there share with the trunk: up to its head-concat point.

    Attributes:
        layer: Number of the layer.
        entry: Module at whose input the joining rows are left out: the norm before the attention, or the attention.
        batched: Its tensor arguments that carry the batch, with their rows per image.
    """

    layer: int
    entry: str
    batched: Batched


@dataclass(frozen=True)
class PooledTokens:
    """The tokens that are needed behind the last attention.

    Attributes:
        block: Module around the last attention: its residual stream is of these tokens only.
        entry: The norm before the attention, the only place inside where all tokens are needed.
        tokens: How many leading tokens the model pools or reads.
        queries: Only they ask, in fused attention: other queries are not looked up.
    """

    block: str
    entry: str
    tokens: int
    queries: bool


@dataclass(frozen=True)
class Shortcuts:
    """What a growing pass leaves out; nothing by default.

    Attributes:
        cores: What joining masks share, by the module at whose input they join.
        pooled: Which tokens are needed at the end, None for all.
    """

    cores: tuple[tuple[str, SharedCore], ...] = ()
    pooled: PooledTokens | None = None


NO_SHORTCUTS = Shortcuts()


# -- Fused attention in which only the leading queries ask --


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


# -- Leaves out of a growing pass what no logit needs: hooks that take rows or tokens away and put them back --


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
"""A pre-hook that may replace a module's arguments."""


class LeavingOut:
    """The hooks that take a model's shortcuts.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        keep: `[masks, layers, max heads]` bool, True = keep.
        shortcuts: What may be left out.
    """

    def __init__(self, backbone: nn.Module, layout: HeadLayout, keep: Tensor, shortcuts: Shortcuts) -> None:
        self.backbone, self.layout, self.keep, self.shortcuts = backbone, layout, keep, shortcuts
        self.rows = PassRows()  #: of the forward pass under way

    def hooks(self) -> Iterator[tuple[str, Hook]]:
        """Yield modules with their pre-hooks, to be installed after those that let masks join, in this order."""
        pooled = self.shortcuts.pooled
        if pooled is not None:
            yield pooled.block, self._keep_pooled(pooled)
            yield pooled.entry, self._all_tokens
            yield self.layout.layers[-1].point, self._pooled_only(pooled)
        for _, core in self.shortcuts.cores:
            yield core.entry, self._leave_out(core)
            yield self.layout.layers[core.layer].point, self._put_back(core)

    def asking(self) -> AbstractContextManager[None]:
        """Let only the pooled tokens ask in the last attention while the context is open, where that is a shortcut."""
        pooled = self.shortcuts.pooled
        if pooled is None or not pooled.queries:
            return nullcontext()
        last = self.backbone.get_submodule(self.layout.layers[-1].name)
        tokens = pooled.tokens
        return inside([last], lambda _: LeadingQueries(None if self.rows.whole else tokens))

    def _leave_out(self, core: SharedCore) -> Hook:
        """Build the pre-hook that takes the rows that have just joined away again: the trunk's stand for them."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self.rows
            if rows.whole or not rows.joining:
                return None
            rows.left_out, rows.joining = rows.joining, 0
            return first_rows(args, kwargs, core.batched, rows.images * (1 + rows.joined - rows.left_out))

        return hook

    def _put_back(self, core: SharedCore) -> Hook:
        """Build the pre-hook of a head-concat point that appends the trunk's heads for the rows that were left out.

        They are zeroed before they are appended: that is a few rows, and the others need no copy of their own then.
        """
        layer = self.layout.layers[core.layer]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self.rows
            if not rows.left_out:
                return None
            heads_out, copies = args[0], rows.left_out
            rows.left_out, rows.zeroed = 0, copies
            trunk = heads_out[: rows.images * layer.rows]
            keep = self.keep[list(rows.chunk[rows.joined - copies : rows.joined]), core.layer, : layer.heads]
            masked = ablate_heads(torch.cat([trunk] * copies), keep, layer.channels)
            return (torch.cat([heads_out, masked]), *args[1:]), kwargs

        return hook

    def _keep_pooled(self, pooled: PooledTokens) -> Hook:
        """Build the pre-hook of the last block that keeps the residual stream of the pooled tokens only."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            if self.rows.whole:
                return None
            self.rows.stream = args[0]
            return (args[0][:, : pooled.tokens], *args[1:]), kwargs

        return hook

    def _all_tokens(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Give the last attention, which needs all tokens, the stream that its block was given."""
        stream, self.rows.stream = self.rows.stream, None
        return None if stream is None else ((stream, *args[1:]), kwargs)

    def _pooled_only(self, pooled: PooledTokens) -> Hook:
        """Build the pre-hook of the last head-concat point that leaves the heads of the pooled tokens only."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            return None if self.rows.whole else ((args[0][:, : pooled.tokens], *args[1:]), kwargs)

        return hook
