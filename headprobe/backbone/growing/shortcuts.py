"""Work that no logit needs: what the growing pass leaves out (`headprobe.backbone.growing.trials` finds it).

A mask changes nothing before its layer's point. The rows that join at a layer therefore need no norm, queries, keys,
values and attention of their own there: they share those of the rows that they are copies of (`SharedCore`). Behind the
last attention every token goes its own way, and a model that pools its class token needs no other token there
(`PooledTokens`). Both leave rows or tokens out at a module's input and put them back at the point. `Shortcutting` has
the hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.growing.row_plan import Arguments, Batched, PassRows, first_rows
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.heads.trace import inside
from headprobe.backbone.masking.replacement import LayerSlots, Replacement, replace_heads

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
"""A pre-hook that may replace a module's arguments."""


@dataclass(frozen=True)
class SharedCore:
    """The stretch of a layer that masks joining there share with the rows that they are copies of: up to its point.

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
        block: Module around the last attention: its residual stream has these tokens only.
        entry: The norm before the attention, the only module inside that needs all tokens.
        tokens: How many leading tokens the model pools or reads.
        queries: Only these tokens' queries are computed in fused attention.
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
        beginnings: Masks that begin alike share rows until they part (`headprobe.backbone.growing.beginnings`).
    """

    cores: tuple[tuple[str, SharedCore], ...] = ()
    pooled: PooledTokens | None = None
    beginnings: bool = False


NO_SHORTCUTS = Shortcuts()


class Shortcutting:
    """The hooks that take a model's shortcuts.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        replacements: What fills each variant's masked slots.
        shortcuts: What may be left out.
        rows: The rows of the pass under way; the growing pass owns them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layout: HeadLayout,
        replacements: Sequence[Replacement],
        shortcuts: Shortcuts,
        rows: PassRows,
    ) -> None:
        self.backbone, self.layout, self.replacements = backbone, layout, replacements
        self.shortcuts, self.rows = shortcuts, rows

    def hooks(self) -> Iterator[tuple[str, Hook]]:
        """Yield modules with their pre-hooks, to be installed in this order and after the hooks that let masks join."""
        pooled = self.shortcuts.pooled
        if pooled is not None:
            yield pooled.block, self._keep_pooled(pooled)
            yield pooled.entry, self._all_tokens
            yield self.layout.layers[-1].point, self._pooled_only(pooled)
        for _, core in self.shortcuts.cores:
            yield core.entry, self._leave_out(core)
            yield self.layout.layers[core.layer].point, self._put_back(core)

    def few_queries(self) -> AbstractContextManager[None]:
        """Compute only the pooled tokens' queries in the last attention while the context is open, if that is found."""
        pooled = self.shortcuts.pooled
        if pooled is None or not pooled.queries:
            return nullcontext()
        last = self.backbone.get_submodule(self.layout.layers[-1].name)
        tokens = pooled.tokens
        return inside([last], lambda _: LeadingQueries(None if self.rows.whole else tokens))

    # -- shared cores --------------------------------------------------------------------------------------------------

    def _leave_out(self, core: SharedCore) -> Hook:
        """Build the pre-hook that takes the rows away that have just joined: others stand for them."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self.rows
            if rows.whole or not rows.joining:
                return None
            rows.left_out, rows.joining = rows.joining, 0
            return first_rows(args, kwargs, core.batched, rows.images * (1 + rows.joined - rows.left_out))

        return hook

    def _put_back(self, core: SharedCore) -> Hook:
        """Build the pre-hook of a point that appends the heads of the rows that were left out: copies of others'.

        They are masked before they are appended: they are few rows, and the others need no copy of their own then.
        """
        layer = self.layout.layers[core.layer]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            rows = self.rows
            if not rows.left_out:
                return None
            heads_out, copies = args[0], rows.left_out
            rows.left_out, rows.filled = 0, copies

            now, share = slice(rows.joined - copies, rows.joined), rows.images * layer.rows
            variants, trunk = rows.wave.variants[now], heads_out[:share]  # [rows of the trunk, ...]
            keep = rows.wave.keep[1:][now, core.layer, : layer.heads]  # [copies, heads]
            # not yet masked here, whosever they are: this hook runs before the one that masks
            unmasked = torch.cat([heads_out[place * share : (place + 1) * share] for place in rows.wave.copied[now]])
            slots = LayerSlots(core.layer, unmasked, keep, layer.channels, trunk, layer.rows)
            masked = replace_heads(slots, [self.replacements[variant] for variant in variants])
            return (torch.cat([heads_out, masked]), *args[1:]), kwargs

        return hook

    # -- pooled tokens -------------------------------------------------------------------------------------------------

    def _keep_pooled(self, pooled: PooledTokens) -> Hook:
        """Build the pre-hook of the last block that keeps the residual stream of the pooled tokens only."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            if self.rows.whole:
                return None
            self.rows.stream = args[0]  # [rows, tokens, dim]
            return (args[0][:, : pooled.tokens], *args[1:]), kwargs

        return hook

    def _all_tokens(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Give the last attention, which needs all tokens, the stream that its block was given."""
        stream, self.rows.stream = self.rows.stream, None
        return None if stream is None else ((stream, *args[1:]), kwargs)

    def _pooled_only(self, pooled: PooledTokens) -> Hook:
        """Build the pre-hook of the last point that leaves the heads of the pooled tokens only."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            return None if self.rows.whole else ((args[0][:, : pooled.tokens], *args[1:]), kwargs)

        return hook


class LeadingQueries(TorchFunctionMode):
    """Computes only the leading queries of `scaled_dot_product_attention` while it is entered.

    The result has its usual shape, because models fold it back into tokens. Behind the leading queries it repeats the
    last one's result, which must not be read.

    Args:
        tokens: How many queries are computed; None computes all.
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
        return _leading(self.tokens, *args, **kwargs)


def _leading(
    tokens: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attend with the first `tokens` queries; each row of a mask between tokens belongs to a query."""
    queries = query.shape[-2]
    if attn_mask is not None and attn_mask.shape[-2] == queries:
        attn_mask = attn_mask[..., :tokens, :]
    found = F.scaled_dot_product_attention(query[..., :tokens, :], key, value, attn_mask, *args, **kwargs)

    # [rows, heads, tokens, dim] back to [rows, heads, queries, dim]; the expanded tail takes no memory
    first, last = found[..., : tokens - 1, :], found[..., tokens - 1 :, :]
    tail = last.expand(*last.shape[:-2], queries - tokens + 1, last.shape[-1])
    return tail if tokens == 1 else torch.cat([first, tail], dim=-2)
