"""The clauses that name heads by their place: `all`, `layer:`, `index:`, `head:` and the many masks of `each:`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from headprobe.masks.draws import Head
from headprobe.masks.pieces import Numbers, Piece

MAX_MASKS = 100_000

HEADS_MASKED = "heads_masked"
"""The curve of masks that are on no other, over their numbers of heads."""


@dataclass(frozen=True)
class Model:
    """What masks are made for.

    Attributes:
        name: its name, for messages.
        heads_per_layer: the number of heads of each layer.
        scores: the values of each score of the run's own calibration, by head; None before it has run.
        orders: heads in the order of a score that was computed anew after every step, by score and direction.
    """

    name: str
    heads_per_layer: tuple[int, ...]
    scores: Mapping[str, Mapping[Head, float]] | None = None
    orders: Mapping[tuple[str, str], Sequence[Head]] = field(default_factory=dict)

    @cached_property
    def heads(self) -> frozenset[Head]:
        """Every (layer, head)."""
        return frozenset((layer, head) for layer, count in enumerate(self.heads_per_layer) for head in range(count))


class Point(NamedTuple):
    """Where a mask stands on which curve: `by_layer` at 3."""

    curve: str
    step: int


@dataclass(frozen=True)
class Clause(ABC):
    """One clause of a spec; it stands for one set of heads, or for many (`each:head`)."""

    piece: Piece

    @property
    @abstractmethod
    def text(self) -> str:
        """The canonical text."""

    @abstractmethod
    def members(self, model: Model) -> Iterator[Member]:
        """The clauses of one set of heads that this one stands for, itself if it is one, each with its heads.

        Raises:
            MaskSpecError: if the model lacks what the clause names; the message gives the model's range.
        """

    @property
    def many(self) -> bool:
        """Whether the clause stands for many masks, even if a small model has only one of them."""
        return False

    @property
    def point(self) -> Point | None:
        """The place on a curve; None for clauses that are no point of one."""
        return None

    @property
    def parts(self) -> tuple[Clause, ...]:
        """The clauses that a user would join with '+' to write it."""
        return (self,)


class Member(NamedTuple):
    """A clause that stands for one set of heads, and these heads."""

    clause: Clause
    heads: frozenset[Head]
    form: Clause | None = None  #: the form of many masks that it is tested with, where that is not the user's


@dataclass(frozen=True)
class All(Clause):
    """`all`: every head."""

    @property
    def text(self) -> str:
        """The word alone."""
        return "all"

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        yield Member(self, model.heads)


@dataclass(frozen=True)
class Layers(Clause):
    """`layer:0-5`: every head of these layers."""

    layers: Numbers

    @property
    def text(self) -> str:
        """The numbers in canonical order."""
        return f"layer:{self.layers.text}"

    @property
    def point(self) -> Point | None:
        """One whole layer is a point of the curve over layers."""
        return None if self.layers.only is None else Point("by_layer", self.layers.only)

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        check_layers(self.layers, model)
        counts = model.heads_per_layer
        yield Member(self, frozenset((layer, head) for layer in self.layers.values for head in range(counts[layer])))


@dataclass(frozen=True)
class Indices(Clause):
    """`index:2`: head 2 of every layer that has one."""

    indices: Numbers

    @property
    def text(self) -> str:
        """The numbers in canonical order."""
        return f"index:{self.indices.text}"

    @property
    def point(self) -> Point | None:
        """One index is a point of the curve over indices."""
        return None if self.indices.only is None else Point("by_index", self.indices.only)

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        most = max(model.heads_per_layer)
        if beyond := self.indices.beyond(most):
            index, piece = beyond
            raise piece.error(f"no layer of {model.name} has head {index}: its indices are {span(most)}, got {index}")
        layers = enumerate(model.heads_per_layer)
        yield Member(self, frozenset((layer, i) for layer, count in layers for i in self.indices.values if i < count))


@dataclass(frozen=True)
class Heads(Clause):
    """`head:3.0-2`: these heads of each of these layers."""

    layers: Numbers
    heads: Numbers

    @property
    def text(self) -> str:
        """Layers and heads in canonical order."""
        return f"head:{self.layers.text}.{self.heads.text}"

    @property
    def point(self) -> Point | None:
        """A single head is a point of its index' curve over layers."""
        if self.layers.only is None or self.heads.only is None:
            return None
        return Point(f"head_{self.heads.only:02d}", self.layers.only)

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        check_layers(self.layers, model)
        layer = min(self.layers.values, key=lambda layer: model.heads_per_layer[layer])
        count = model.heads_per_layer[layer]
        if beyond := self.heads.beyond(count):
            head, piece = beyond
            raise piece.error(f"{model.name} has no head {layer}.{head}: layer {layer} has heads {span(count)}")
        yield Member(self, frozenset((layer, head) for layer in self.layers.values for head in self.heads.values))


@dataclass(frozen=True)
class Each(Clause):
    """`each:layer`, `each:index`, `each:head`: one mask per layer, per index, per single head."""

    what: str

    @property
    def text(self) -> str:
        """The two words."""
        return f"each:{self.what}"

    @property
    def many(self) -> bool:
        """Always."""
        return True

    def members(self, model: Model) -> Iterator[Member]:
        """The clauses for one layer, index or head, in ascending order."""
        counts = model.heads_per_layer
        if self.what == "layer":
            clauses: list[Clause] = [Layers(self.piece, self._number(layer)) for layer in range(len(counts))]
        elif self.what == "index":
            clauses = [Indices(self.piece, self._number(index)) for index in range(max(counts))]
        else:
            heads = sorted(model.heads)
            clauses = [Heads(self.piece, self._number(layer), self._number(head)) for layer, head in heads]
        for clause in clauses:
            yield from clause.members(model)

    def _number(self, value: int) -> Numbers:
        return Numbers.single(value, self.piece)


def check_layers(layers: Numbers, model: Model) -> None:
    """Refuse a layer that the model lacks."""
    if beyond := layers.beyond(len(model.heads_per_layer)):
        layer, piece = beyond
        its = span(len(model.heads_per_layer))
        raise piece.error(f"{model.name} has no layer {layer}: its layers are {its}, got {layer}")


def check_masks(piece: Piece, count: int, instead: str = "take fewer seeds or larger steps") -> None:
    """Refuse forms that stand for more masks than anyone can run."""
    if count > MAX_MASKS:
        raise piece.error(f"{count:,} masks are too many: at most {MAX_MASKS:,}; {instead}")


def span(count: int) -> str:
    """The numbers below a count in words: `0 to 11`."""
    return f"0 to {count - 1}" if count > 1 else "only 0"
