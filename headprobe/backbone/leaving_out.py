"""Leaves out of a growing pass what no logit needs: hooks that take rows or tokens away and put them back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import ablate_heads
from headprobe.backbone.arguments import Arguments, first_rows
from headprobe.backbone.calls import inside
from headprobe.backbone.heads import HeadLayout
from headprobe.backbone.leading_queries import LeadingQueries
from headprobe.backbone.shortcuts import PooledTokens, SharedCore, Shortcuts

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
"""A pre-hook that may replace a module's arguments."""


@dataclass
class PassRows:
    """What the rows of a forward pass under way are.

    Attributes:
        images: Images of the trunk.
        chunk: Numbers of the masks in the order in which they join.
        joined: How many of them have joined.
        whole: No shortcut may be taken.
        joining: How many of them joined at the last join, and are nothing but copies of the trunk since.
        left_out: How many of these are left out for the moment.
        zeroed: How many of the last rows' masks have been applied already in the layer under way.
        stream: What the last block was given, until its attention has taken it.
    """

    images: int = 0
    chunk: tuple[int, ...] = ()
    joined: int = 0
    whole: bool = False
    joining: int = 0
    left_out: int = 0
    zeroed: int = 0
    stream: Tensor | None = None


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
