"""Which heads of which layers are masked; layers may differ in their number of heads (Swin)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from headprobe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

EXPECTED = 'expected {"masked_heads": {"LAYER": [HEAD, ...]}}, such as {"masked_heads": {"3": [0, 1]}}'


@dataclass(frozen=True)
class HeadMask:
    """The masked heads of a model, as pairs (layer, head) that count from 0.

    Raises:
        ValueError: if a masked head is not in the model, or a layer has no heads.
    """

    heads_per_layer: tuple[int, ...]
    masked: frozenset[tuple[int, int]]

    def __post_init__(self) -> None:
        if not self.heads_per_layer or min(self.heads_per_layer) < 1:
            raise ValueError(f"Expected at least one layer, each with at least one head, got {self.heads_per_layer}")
        for layer, head in self.masked:
            if not (0 <= layer < len(self.heads_per_layer) and 0 <= head < self.heads_per_layer[layer]):
                raise ValueError(f"Expected heads of layers with {self.heads_per_layer} heads, got ({layer}, {head})")

    @property
    def count(self) -> int:
        """How many heads are masked."""
        return len(self.masked)

    @property
    def first_layer(self) -> int | None:
        """The first layer with a masked head; None where no head is masked."""
        return min((layer for layer, _ in self.masked), default=None)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of the number of heads per layer and the masked heads: the same mask, the same digest."""
        text = ",".join(map(str, self.heads_per_layer)) + ";"
        text += ",".join(f"{layer}.{head}" for layer, head in sorted(self.masked))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def keep(self) -> Tensor:
        """`[layers, most heads of any layer]` on the CPU: True keeps a head, False masks it; True where none is."""
        import torch  # here, so that reading mask specs costs no torch

        keep = torch.ones(len(self.heads_per_layer), max(self.heads_per_layer), dtype=torch.bool)
        for layer, head in self.masked:
            keep[layer, head] = False
        return keep

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        """The masked heads by layer, ready for `json.dump`: `{"masked_heads": {"3": [0, 1]}}`."""
        by_layer: dict[str, list[int]] = {}
        for layer, head in sorted(self.masked):
            by_layer.setdefault(str(layer), []).append(head)
        return {"masked_heads": by_layer}

    @classmethod
    def from_json(cls, data: object, heads_per_layer: Sequence[int], where: str) -> HeadMask:
        """Read what `to_json` gives; other keys beside "masked_heads" are left alone.

        Args:
            data: what `json.load` gave.
            heads_per_layer: heads of each layer of the model that the mask is for.
            where: the data's source, for messages: a file's name.

        Raises:
            UsageError: if the data has another shape, or names a layer or head that the model lacks.
        """
        by_layer = data.get("masked_heads") if isinstance(data, Mapping) else None
        if not isinstance(by_layer, Mapping):
            raise UsageError(f"{where}: {EXPECTED}, got {_short(data)}")
        masked = set()
        for key, heads in by_layer.items():
            layer = _layer(key, len(heads_per_layer), where)
            if not isinstance(heads, Sequence) or isinstance(heads, str):
                raise UsageError(f"{where}: expected a list of heads for layer {layer}, got {_short(heads)}")
            masked |= {(layer, _head(head, layer, heads_per_layer[layer], where)) for head in heads}
        return cls(tuple(heads_per_layer), frozenset(masked))


def _layer(key: object, layers: int, where: str) -> int:
    """A layer number from JSON's text key."""
    known = {str(layer): layer for layer in range(layers)}
    if isinstance(key, str) and key in known:
        return known[key]
    raise UsageError(f'{where}: expected layers "0" to "{layers - 1}", as text, got {_short(key)}')


def _head(head: object, layer: int, heads: int, where: str) -> int:
    """A head number; `true` and `1.0` are not numbers of heads."""
    if isinstance(head, int) and not isinstance(head, bool) and 0 <= head < heads:
        return head
    raise UsageError(f"{where}: layer {layer} has heads 0 to {heads - 1}, as whole numbers, got {_short(head)}")


def _short(value: object) -> str:
    """A value's `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
