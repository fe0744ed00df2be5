"""The clauses that take heads in an order: `random:`, `one-per-layer:` and the nested masks of `grow:`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from headprobe.masks.clauses import Clause, Member, Model, Point, check_layers, check_masks, span
from headprobe.masks.draws import one_per_layer, random_order
from headprobe.masks.pieces import Numbers, Piece
from headprobe.masks.tables import order_by_column, rescored_order
from headprobe.text import counted

LEAST, MOST = DIRECTIONS = ("least", "most")
"""Which heads of an order are masked first."""

RESCORED = "rescored"
"""The word for scores that are computed anew, of the model without the heads that are masked so far."""


@dataclass(frozen=True)
class Random(Clause):
    """`random:24:7`: 24 heads drawn with seed 7; several counts or seeds are a grid, one mask for each pair."""

    counts: Numbers
    seeds: Numbers

    @property
    def text(self) -> str:
        """Counts and seeds, the default seed 0 written out."""
        return f"random:{self.counts.text}:{self.seeds.text}"

    @property
    def many(self) -> bool:
        """Whether it is a grid."""
        return self.counts.only is None or self.seeds.only is None

    @property
    def point(self) -> Point | None:
        """A draw is a point of its seed's curve over the number of heads."""
        if self.counts.only is None or self.seeds.only is None:
            return None
        return Point(f"random_seed_{self.seeds.only}", self.counts.only)

    def members(self, model: Model) -> Iterator[Member]:
        """A draw for each seed and count."""
        check_counts(self.counts, model)
        check_masks(self.piece, len(self.counts.values) * len(self.seeds.values))
        for seed in self.seeds.values:
            order = random_order(model.heads_per_layer, seed)
            its_seed = Numbers.single(seed, self.seeds.piece_of(seed))
            for count in self.counts.values:
                its_count = Numbers.single(count, self.counts.piece_of(count))
                yield Member(replace(self, counts=its_count, seeds=its_seed), frozenset(order[:count]))


@dataclass(frozen=True)
class OnePerLayer(Clause):
    """`one-per-layer:5`, `one-per-layer:0-19:10-11`: one random head of each layer, or of the layers given.

    The null of `index:`; the layers serve models where only some layers have the index.
    """

    seeds: Numbers
    layers: Numbers | None

    @property
    def text(self) -> str:
        """Seeds and, if given, layers."""
        return f"one-per-layer:{self.seeds.text}" + (f":{self.layers.text}" if self.layers else "")

    @property
    def many(self) -> bool:
        """Whether there are several seeds."""
        return self.seeds.only is None

    @property
    def point(self) -> Point | None:
        """A draw is a point of the curve over seeds; draws from some layers only have their own curve."""
        if self.seeds.only is None:
            return None
        curve = "one_per_layer" + ("_" + re.sub(r"\W", "_", self.layers.text) if self.layers else "")
        return Point(curve, self.seeds.only)

    def members(self, model: Model) -> Iterator[Member]:
        """A draw for each seed."""
        if self.layers:
            check_layers(self.layers, model)
        layers = self.layers.values if self.layers else range(len(model.heads_per_layer))
        for seed in self.seeds.values:
            heads = one_per_layer(model.heads_per_layer, seed)
            its_seed = Numbers.single(seed, self.seeds.piece_of(seed))
            yield Member(replace(self, seeds=its_seed), frozenset(heads[layer] for layer in layers))


@dataclass(frozen=True)
class GrowRandom(Clause):
    """`grow:random:0-4`: nested masks of 1, 2, ... all heads, in a random order for each seed."""

    seeds: Numbers

    @property
    def text(self) -> str:
        """The seeds in canonical order."""
        return f"grow:random:{self.seeds.text}"

    @property
    def many(self) -> bool:
        """Always."""
        return True

    def members(self, model: Model) -> Iterator[Member]:
        """The draws `random:1:SEED` ... `random:N:SEED`."""
        every = len(model.heads)
        check_masks(self.piece, every * len(self.seeds.values))
        counts = _counts(1, every, self.piece)
        yield from Random(self.piece, counts, self.seeds).members(model)


@dataclass(frozen=True)
class GrowColumn(Clause):
    """`grow:PATH:COLUMN:most:1-36/5`: nested masks in the order of a column of an earlier run's table.

    Counts thin the nested masks; a single count names one mask. `grow:calibration:SCORE:least:rescored` takes the
    scores anew after each tenth of the heads, of the model without these.
    """

    path: Piece
    column: Piece
    direction: str
    counts: Numbers | None
    rescored: bool = False

    @property
    def text(self) -> str:
        """The direction written out; counts only if given."""
        counts = f":{self.counts.text}" if self.counts else ""
        rescored = f":{RESCORED}" * self.rescored
        return f"grow:{self.path.text}:{self.column.text}:{self.direction}{rescored}{counts}"

    @property
    def many(self) -> bool:
        """Whether it is not a single count."""
        return self.counts is None or self.counts.only is None

    @property
    def point(self) -> Point | None:
        """One count is a point of the column's curve over the number of heads."""
        if self.counts is None or self.counts.only is None:
            return None
        column = re.sub(r"[^A-Za-z0-9_]", "_", self.column.text)
        return Point(f"grow_{column}_{self.direction}{f'_{RESCORED}' * self.rescored}", self.counts.only)

    def most(self, heads: int) -> int:
        """The largest number of heads that a mask takes, of a model with so many."""
        return max(self.counts.values, default=0) if self.counts else heads

    def members(self, model: Model) -> Iterator[Member]:
        """A mask for each count."""
        if self.counts:
            check_counts(self.counts, model)
        counts = self.counts or _counts(1, len(model.heads), self.piece)
        if self.rescored:
            order = rescored_order(self.column, self.direction, counts, model)
        else:
            order = order_by_column(self.path, self.column, model, most_first=self.direction == MOST)
        for count in counts.values:
            its_count = Numbers.single(count, counts.piece_of(count))
            yield Member(replace(self, counts=its_count), frozenset(order[:count]))


def check_counts(counts: Numbers, model: Model) -> None:
    """Refuse more heads than the model has."""
    every = len(model.heads)
    if beyond := counts.beyond(every + 1):
        count, piece = beyond
        raise piece.error(f"{model.name} has {counted(every, 'head')}: expected {span(every + 1)} of them, got {count}")


def _counts(first: int, last: int, piece: Piece) -> Numbers:
    return Numbers((replace(Numbers.single(first, piece).runs[0], values=range(first, last + 1)),))
