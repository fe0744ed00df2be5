"""Work that no logit needs: what the growing pass may leave out (`headprobe.backbone.shortcut_trials` finds it).

A mask changes nothing before the place where its layer concatenates the heads. So the rows that join at a layer need
no norm, queries, keys, values and attention of their own there: they share the trunk's (`SharedCore`). Behind the last
attention every token goes its own way, and a model that pools its class token needs no other one (`PooledTokens`).
Both leave a module's rows or tokens out at its input, and have them back at the head-concat point.
"""

from dataclasses import dataclass

from headprobe.backbone.arguments import Batched


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
