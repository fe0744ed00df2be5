"""The forms of many masks that tell what heads do together: `each:pair`, `each:pair:all` and `subsets:layer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

from headprobe.masks.clauses import MAX_MASKS, Clause, Each, Heads, Layers, Member, Model, check_masks
from headprobe.masks.draws import Head
from headprobe.masks.pieces import Numbers, Piece
from headprobe.text import counted

PAIR, EVERYWHERE = "pair", "all"


@dataclass(frozen=True)
class Pairs(Clause):
    """`each:pair`, `each:pair:all`: every two heads of a layer, or of the model, after every single head.

    What two heads do together is seen beside what each does alone: the single heads are scored too, as `each:head`.
    """

    everywhere: bool

    @property
    def text(self) -> str:
        """Two words, or three."""
        return f"each:{PAIR}:{EVERYWHERE}" if self.everywhere else f"each:{PAIR}"

    @property
    def many(self) -> bool:
        """Always."""
        return True

    def members(self, model: Model) -> Iterator[Member]:
        """The single heads, then the pairs, in ascending order."""
        every, counts = len(model.heads), model.heads_per_layer
        pairs = comb(every, 2) if self.everywhere else sum(comb(count, 2) for count in counts)
        instead = f"each:{PAIR} takes pairs within layers only" if self.everywhere else "join single pairs with '+'"
        check_masks(self.piece, every + pairs, instead)
        if not pairs:
            has = f"{model.name} has a single head" if every == 1 else f"each layer of {model.name} has a single head"
            raise self.piece.error(f"{has}: there are no pairs of heads for {self.text}" + self._remedy(every))
        single = Each(self.piece, "head")
        yield from (member._replace(form=single) for member in single.members(model))
        for first, second in combinations(sorted(model.heads), 2):
            if self.everywhere or first[0] == second[0]:
                yield Member(self._pair(first, second), frozenset((first, second)))

    def _remedy(self, every: int) -> str:
        return f"; pairs across layers are each:{PAIR}:{EVERYWHERE}" if every > 1 else ""

    def _pair(self, first: Head, second: Head) -> Clause:
        if first[0] == second[0]:
            return Heads(self.piece, _numbers(first[:1], self.piece), _numbers((first[1], second[1]), self.piece))
        return Two(
            self.piece, *(Heads(self.piece, *(_numbers([n], self.piece) for n in head)) for head in (first, second))
        )


@dataclass(frozen=True)
class Two(Clause):
    """Two heads of different layers, as one of the masks of `each:pair:all`."""

    first: Heads
    second: Heads

    @property
    def text(self) -> str:
        """Both clauses, joined."""
        return f"{self.first.text}+{self.second.text}"

    @property
    def parts(self) -> tuple[Clause, ...]:
        """Both, so that they are merged with other clauses of their kind."""
        return self.first, self.second

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        yield Member(
            self, frozenset(head for part in self.parts for _, heads, _ in part.members(model) for head in heads)
        )


@dataclass(frozen=True)
class Subsets(Clause):
    """`subsets:layer`: every set of whole layers but the empty one, the single layers first."""

    @property
    def text(self) -> str:
        """The two words."""
        return "subsets:layer"

    @property
    def many(self) -> bool:
        """Always."""
        return True

    def members(self, model: Model) -> Iterator[Member]:
        """The sets by size, then in ascending order."""
        layers = len(model.heads_per_layer)
        sets = 2**layers - 1
        if sets > MAX_MASKS:
            raise self.piece.error(
                f"{model.name} has {counted(layers, 'layer')}, which have {sets:,} sets: at most {MAX_MASKS:,} masks; "
                "take each:layer, or name the sets in a list, such as layer:0-3"
            )
        for size in range(1, layers + 1):
            for chosen in combinations(range(layers), size):
                yield from Layers(self.piece, _numbers(chosen, self.piece)).members(model)


def _numbers(values: Iterable[int], piece: Piece) -> Numbers:
    return Numbers(tuple(run for value in values for run in Numbers.single(value, piece).runs))
