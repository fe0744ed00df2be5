"""A parsed spec: the clauses that mask, those that keep, and the canonical text of both together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headprobe.masks.clauses import All, Clause, Heads, Indices, Layers, Point
from headprobe.masks.pieces import number_text

SAFE_IN_A_SLUG = re.compile(r"(layer|index|head|random|one-per-layer):[0-9:.]+")


@dataclass(frozen=True)
class Tree:
    """Heads masked by a spec: those of `mask`, and those that no clause of `keep` names (all are kept if it is None).

    The clauses stand in the user's order and know their places in the user's text.
    """

    mask: tuple[Clause, ...]
    keep: tuple[Clause, ...] | None

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """The clauses in the user's order."""
        return self.mask + (self.keep or ())

    @cached_property
    def many(self) -> Clause | None:
        """The clause that stands for many masks, of which there is at most one."""
        return next((clause for clause in self.clauses if clause.many), None)

    @cached_property
    def text(self) -> str:
        """The canonical text: one for all orders and groupings of the same clauses."""
        keep = self.keep
        if self.many is None:
            if keep == () or _has_all(self.mask):
                return "all"
            if keep is not None and _has_all(keep):
                keep = None
        parts = _union_text(self.mask)
        if keep is not None:
            first, *others = _union_text(keep) or ["none"]
            parts += [f"keep:{first}", *others]
        return "+".join(parts) or "none"

    def with_member(self, member: Clause) -> Tree:
        """The tree of one of the many masks."""
        mask = tuple(member if clause is self.many else clause for clause in self.mask)
        keep = self.keep and tuple(member if clause is self.many else clause for clause in self.keep)
        return replace(self, mask=mask, keep=keep)

    def point_of(self, member: Clause, count: int) -> Point:
        """The place of a mask on its curve.

        Args:
            member: the varying clause of one of many masks, or a single mask's first.
            count: masked heads: the place on `heads_masked`, the curve of masks that are on no other.
        """
        several = self.many is None and len(self.clauses) > 1
        if member.point is None or several:
            return Point("heads_masked", count)
        return Point("_".join([*self._fixed_slugs(member), member.point.curve]), member.point.step)

    def _fixed_slugs(self, member: Clause) -> list[str]:
        """What stays the same along the curve, safe in a TensorBoard tag."""
        varying = {id(member), id(self.many)}
        mask = _slug([clause for clause in self.mask if id(clause) not in varying])
        kept = _slug([clause for clause in self.keep or () if id(clause) not in varying])
        inside = any(id(clause) in varying for clause in self.keep or ())
        word = ["keep"] if inside else ["kept"] if self.keep else []
        return mask + word + kept


def _has_all(clauses: Sequence[Clause]) -> bool:
    return any(isinstance(clause, All) for clause in clauses)


def _union_text(clauses: Sequence[Clause]) -> list[str]:
    """Canonical texts of clauses under one roof: those of a kind are merged, equal ones stand once."""
    layers = {value for clause in clauses if isinstance(clause, Layers) for value in clause.layers.values}
    indices = {value for clause in clauses if isinstance(clause, Indices) for value in clause.indices.values}
    rest = [clause.text for clause in clauses if not isinstance(clause, All | Layers | Indices | Heads)]
    texts = ["all"] if _has_all(clauses) else []
    texts += [f"layer:{number_text(layers)}"] if layers else []
    texts += [f"index:{number_text(indices)}"] if indices else []
    return texts + _heads_text([clause for clause in clauses if isinstance(clause, Heads)]) + sorted(set(rest))


def _heads_text(clauses: Sequence[Heads]) -> list[str]:
    """`head:` clauses for a set of single heads: layers with the same heads share one."""
    heads_of: dict[int, frozenset[int]] = {}
    for clause in clauses:
        heads = frozenset(clause.heads.values)
        for layer in clause.layers.values:
            heads_of[layer] = heads_of[layer] | heads if layer in heads_of else heads
    layers_with: dict[frozenset[int], list[int]] = {}
    for layer in sorted(heads_of):
        layers_with.setdefault(heads_of[layer], []).append(layer)
    return [f"head:{number_text(layers)}.{number_text(heads)}" for heads, layers in layers_with.items()]


def _slug(clauses: Sequence[Clause]) -> list[str]:
    """A tag for fixed clauses; where it would not tell two apart, a few digits of a hash do."""
    if not clauses:
        return []
    text = "+".join(_union_text(clauses))
    slug = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return [slug if SAFE_IN_A_SLUG.fullmatch(text) else f"{slug}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"]
