"""Where the rows of each variant begin, and whose rows stand for it until then.

A mask changes nothing before the first layer that it hits: up to there the trunk stands for it. Two masks that hit the
same heads of the first layers, filled by the same, are one and the same up to the layer in which they part. So the
variants of a wave are a tree with the trunk as its root, and each begins as a copy of rows that are there already:

    trunk   ──────────────┬──────────  nothing masked
    first         └───┬───┼──────────  layers 1, 4
    second            └───┼──────────  layers 1, 3: a copy of the first's rows from layer 3 on
    third                 └──────────  layer 5

Sets of heads that are removed in one order have long common beginnings. Under different ablations a common beginning
ends at the first head that is masked.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headprobe.backbone.growing.row_plan import Batched
from headprobe.backbone.masking.replacement import Replacement


@dataclass(frozen=True)
class Join:
    """The module at whose input a layer's masks join.

    Attributes:
        module: Its qualified name, empty for the whole model.
        place: When it is called, counted over all modules of one forward pass.
        batched: Its tensor arguments that carry the batch, with their rows per image.
        proven: Masks that join here gave the logits of plain forward passes in a trial.
    """

    module: str
    place: int
    batched: Batched
    proven: bool = False


class Beginning(NamedTuple):
    """Where a variant's rows begin in a wave.

    Attributes:
        layer: They join at the join of this layer.
        copied: The variant whose rows they are copies of, None for the trunk.
    """

    layer: int
    copied: int | None


Masked = npt.NDArray[np.int64]
"""For every variant and layer a number of what is masked there, and by what: `[variants, layers]`, 0 for nothing."""


def what_is_masked(keep: Tensor, replacements: Sequence[Replacement]) -> Masked:
    """Return a number for every variant and layer; two are equal where the same heads are filled by the same.

    Args:
        keep: `[variants, layers, max heads]` bool, True = keep.
        replacements: One for each variant.
    """
    heads = keep.cpu().numpy()
    seen: dict[tuple[bytes, int], int] = {}
    masked = np.zeros(heads.shape[:2], dtype=np.int64)
    for variant, layer in np.argwhere(~heads.all(axis=2)):
        part = replacements[variant].part(int(layer))
        masked[variant, layer] = seen.setdefault((heads[variant, layer].tobytes(), id(part)), 1 + len(seen))
    return masked


def beginning_layers(keep: Tensor, replacements: Sequence[Replacement]) -> set[int]:
    """Return the layers at which rows may begin: the first one of each mask, and those in which two masks part."""
    masked = what_is_masked(keep, replacements)
    firsts = {first for first in map(_first, masked) if first is not None}
    ordered = masked[_by_beginning(masked, range(len(masked)))]
    unlike = ordered[:-1] != ordered[1:]  # [variants - 1, layers], of neighbours
    return firsts | set(unlike.argmax(axis=1)[unlike.any(axis=1)].tolist())


class Beginnings:
    """Tells where the rows of variants begin.

    Args:
        keep: `[variants, layers, max heads]` bool, True = keep.
        replacements: What fills the masked slots of each variant.
        joins: By layer.
        shared: Variants may begin as copies of another's rows; else all begin as copies of the trunk.
        once: Variants that are the same run once.

    Attributes:
        same: For each variant the first one that is the same.
        order: Variants with rows of their own, those that begin late last; neighbours have long common beginnings.
    """

    def __init__(
        self, keep: Tensor, replacements: Sequence[Replacement], joins: Sequence[Join], shared: bool, once: bool
    ) -> None:
        self.joins, self.shared = joins, shared
        self._masked = masked = what_is_masked(keep, replacements)
        self._firsts = [_first(of_variant) for of_variant in masked]
        seen: dict[bytes, int] = {}
        every = range(len(masked))
        self.same = [seen.setdefault(masked[variant].tobytes(), variant) if once else variant for variant in every]

        alone = [variant for variant in every if self._firsts[variant] is not None and self.same[variant] == variant]
        self._rank = {variant: rank for rank, variant in enumerate(_by_beginning(masked, alone))}
        if shared:
            self.order = sorted(alone, key=lambda variant: -self._rank[variant])
        else:
            self.order = sorted(alone, key=lambda variant: joins[self._firsts[variant] or 0].place)

    def of_wave(self, wave: Collection[int]) -> dict[int, Beginning]:
        """Return where the rows of a wave's variants begin, in the order in which they join."""
        begin: dict[int, Beginning] = {}
        for variant, parted, copied in self._tree(sorted(wave, key=lambda variant: self._rank[variant])):
            layer, first = parted, self._firsts[variant] or 0
            # an earlier join does as well: until then both are the same
            while layer > first and not self.joins[layer].proven:
                layer -= 1
            # rows that join at this module or later are not there yet; they are copies until then
            while copied is not None and self._place(begin[copied]) >= self.joins[layer].place:
                copied = begin[copied].copied
            begin[variant] = Beginning(layer, copied)
        return dict(sorted(begin.items(), key=lambda one: self._place(one[1])))

    def _place(self, beginning: Beginning) -> int:
        return self.joins[beginning.layer].place

    def _tree(self, ordered: Sequence[int]) -> Iterator[tuple[int, int, int | None]]:
        """Yield each variant, the layer in which it parts, and from whose rows; None is the trunk.

        Args:
            ordered: Variants with rows, sorted by what they mask, layer by layer.
        """
        layers = self._masked.shape[1]
        rows_of: list[int | None] = [None] * (layers + 1)  # whose rows run the last variant's first 0, 1, ... layers
        before: int | None = None
        for variant in ordered:
            first, common = self._firsts[variant] or 0, 0
            if before is not None and self.shared:
                unlike = np.flatnonzero(self._masked[variant] != self._masked[before])
                common = int(unlike[0]) if len(unlike) else layers
            if common == layers:  # the same variant again
                common = max(layer for layer in range(layers) if rows_of[layer] != rows_of[layers])
            if common <= first:  # nothing but the trunk in common
                common = first
                rows_of[: first + 1] = [None] * (first + 1)
            yield variant, common, rows_of[common]
            rows_of[common + 1 :] = [variant] * (layers - common)
            before = variant


def _first(masked: Masked) -> int | None:
    """Return the first layer that a variant masks, None where it masks nothing."""
    hit = np.flatnonzero(masked)
    return int(hit[0]) if len(hit) else None


def _by_beginning(masked: Masked, variants: Collection[int]) -> list[int]:
    """Return variants sorted by what they mask, layer by layer, nothing first: beginnings stand before their ends."""
    return sorted(variants, key=lambda variant: (*masked[variant].tolist(), variant))
