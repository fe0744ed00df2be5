"""The mask-spec language: a short text names the heads to mask, in one mask or in many.

| clause | masks |
| --- | --- |
| `none`, `all` | no head, every head |
| `layer:3`, `layer:0-5,9` | all heads of these layers, together |
| `index:2` | head 2 of every layer that has one |
| `head:3.1`, `head:3.0-2` | single heads |
| `random:24`, `random:24:7` | 24 heads drawn without replacement, with seed 7 (default 0) |
| `one-per-layer:5`, `one-per-layer:5:10-11` | one random head in each layer, or in each of these layers |
| `file:PATH` | a saved mask |
| `keep:CLAUSE` | everything but this clause and all after it |
| `each:layer`, `each:index`, `each:head` | one mask per layer, per index, per head |
| `each:pair`, `each:pair:all` | every two heads of a layer, or of the model, and every single head |
| `subsets:layer` | every set of whole layers |
| `random:0-36/6:0-4`, `one-per-layer:0-19` | one mask for each count and seed |
| `grow:random:0-4` | nested masks of 1, 2, ... all heads, in a random order per seed |
| `grow:PATH:COLUMN[:least or most[:COUNTS]]` | nested masks by a column of a run's tables |
| `grow:calibration:SCORE[:least or most[:COUNTS]]` | nested masks by a score of this run's own calibration |
| `grow:calibration:SCORE:least or most:rescored[:COUNTS]` | the same, scored anew after each tenth of the heads |

`+` joins clauses into one mask, and a form of many masks to single ones. Layers and heads count from 0. Before all of
it may stand the kinds of ablation that the masks are scored under, of those of the run: `zero:each:layer`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headprobe.errors import UsageError
from headprobe.masks.ablations import KINDS, ZERO, Ablations
from headprobe.masks.clauses import HEADS_MASKED, Clause, Member, Model
from headprobe.masks.draws import Head
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.orders import GrowColumn
from headprobe.masks.pieces import MaskSpecError
from headprobe.masks.tables import CALIBRATION
from headprobe.masks.tree import Tree, parse

__all__ = ["MaskSpec", "MaskSpecError", "MaskSpecs", "NamedMask", "Variant", "expand_all"]

NONE = "none"
"""Name of the baseline in every file: the canonical spec that masks no head."""

ONLY_ZERO = Ablations(ZERO)

Scores = Mapping[str, Mapping[Head, float]]
"""Values of each score by head."""

Orders = Mapping[tuple[str, str], Sequence[Head]]
"""Heads in the order of scores that were computed anew step by step, by score and direction."""

NO_ORDERS: Orders = {}


@dataclass(frozen=True)
class NamedMask:
    """One mask of a run.

    Attributes:
        name: the canonical spec of exactly this mask.
        mask: its heads.
        test_families: canonical texts of the specs of many masks that name it, sorted; none for a mask asked for by
            itself.
        curve: the TensorBoard curve that the mask is a point of, such as `by_layer`.
        step: its place on the curve: a layer, an index, a seed or a number of heads.
    """

    name: str
    mask: HeadMask
    test_families: tuple[str, ...]
    curve: str
    step: int


class MaskSpec(str):
    """The text of a mask spec, checked.

    Attributes:
        ablations: The kinds of ablation that its masks are scored under; none where these are all of the run.

    Raises:
        MaskSpecError: if the text is no mask spec, with a caret under the culprit.

    >>> MaskSpec("head:3.1+layer:3,1,2").canonical
    'layer:1-3+head:3.1'
    >>> MaskSpec("mean,zero:each:layer").canonical
    'zero,mean:each:layer'
    """

    ablations: tuple[str, ...]
    _tree: Tree

    def __new__(cls, text: str) -> MaskSpec:
        """Check the text; anything but text is an error, so that YAML's surprises are noticed."""
        if not isinstance(text, str):
            raise MaskSpecError(repr(text), 0, _no_text(text))
        spec = super().__new__(cls, text)
        spec.ablations, begin = _leading_kinds(text)
        spec._tree = parse(str(text), begin)
        return spec

    def __reduce__(self) -> tuple[type[MaskSpec], tuple[str]]:
        return MaskSpec, (str(self),)

    @property
    def canonical(self) -> str:
        """The text that is the same for all ways to write this spec."""
        return (f"{','.join(self.ablations)}:" if self.ablations else "") + self._tree.text

    def under(self, ablations: Ablations) -> list[str]:
        """The kinds of a run's ablations that the masks are scored under.

        Raises:
            MaskSpecError: if the spec names a kind that the run does not have.
        """
        kinds = [ablation.kind for ablation in ablations]
        lacking = [kind for kind in self.ablations if kind not in kinds]
        if lacking:
            reason = f"the run has no ablation {lacking[0]}: add it to --ablation, got {ablations.text}"
            raise MaskSpecError(str(self), str(self).index(lacking[0]), reason)
        return [kind for kind in kinds if not self.ablations or kind in self.ablations]

    @property
    def needs_scores(self) -> bool:
        """Whether heads are ordered by the scores of the run's own calibration."""
        return any(isinstance(clause, GrowColumn) and clause.path.text == CALIBRATION for clause in self._tree.clauses)

    @property
    def rescored(self) -> list[GrowColumn]:
        """The clauses whose scores are computed anew step by step."""
        return [clause for clause in self._tree.clauses if isinstance(clause, GrowColumn) and clause.rescored]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Path and column of each order that an earlier run gives."""
        grown = [clause for clause in self._tree.clauses if isinstance(clause, GrowColumn)]
        return [(one.path.text, one.column.text) for one in grown if one.path.text != CALIBRATION]

    def expand(
        self, heads_per_layer: Sequence[int], model: str, scores: Scores | None = None, orders: Orders = NO_ORDERS
    ) -> list[NamedMask]:
        """The masks that the spec stands for on a model; none for `none`, as the baseline always runs.

        Args:
            heads_per_layer: the number of heads of each layer, in the model's order.
            model: the model's name, for messages.
            scores: of the run's own calibration, by name and head. Without them a spec that needs them gives masks of
                the right sizes and of any heads.
            orders: of heads whose scores the run's own calibration computed anew, by score and direction.

        Raises:
            MaskSpecError: if the model lacks a layer or head that is named, if a file cannot be used, or if a form of
                many masks adds no head to what is masked anyway.
        """
        tree = self._tree
        target = Model(model, tuple(int(heads) for heads in heads_per_layer), scores, orders)
        curves = tree if tree.many else parse(tree.text)  # layer:3+layer:3 is on the curve of layer:3
        named: dict[str, NamedMask] = {}
        for member, heads in _masks(tree, target):
            name = tree.with_member(member.clause).text if member else tree.text
            point = curves.point_of(member.clause if member else curves.clauses[0], len(heads))
            form = tree.with_member(member.form) if member and member.form else tree
            families = (form.text,) if tree.many else ()
            if name not in named:  # beside a fixed head, a pair that holds it is the other head alone
                mask = HeadMask(target.heads_per_layer, heads)
                named[name] = NamedMask(name, mask, families, point.curve, point.step)
        if tree.many and not named:
            reason = f"no mask is left: on {model}, {tree.many.text} changes nothing beside the rest of the spec"
            raise tree.many.piece.error(reason)
        return list(named.values())


@dataclass(frozen=True)
class Variant:
    """What one row of `masks.csv` is: a mask, what its heads are replaced by, and which draw of that.

    Attributes:
        mask: the mask.
        ablation: what the slots of its heads are filled with: a kind of `headprobe.masks.ablations`.
        draw: number of the draw, of a kind of ablation that draws; else 0.
    """

    mask: NamedMask
    ablation: str = ZERO
    draw: int = 0

    @property
    def name(self) -> str:
        """The mask's name, followed by ablation and draw where they are not the usual ones; for messages and tags."""
        parts = [self.mask.name] + [self.ablation] * (self.ablation != ZERO) + [f"draw {self.draw}"] * (self.draw > 0)
        return " ".join(parts)


def expand_all(
    specs: Sequence[MaskSpec],
    heads_per_layer: Sequence[int],
    model: str,
    ablations: Ablations = ONLY_ZERO,
    scores: Scores | None = None,
    orders: Orders = NO_ORDERS,
) -> list[Variant]:
    """The variants of several specs: each mask once, in the order of first appearance, under every ablation.

    A mask belongs to the test family of every spec of many masks that names it: no family lacks a member because it
    shares it with another spec, and the order of the specs does not matter. A spec that names kinds of ablation counts
    under these alone.

    Args:
        specs: the specs.
        heads_per_layer: the number of heads of each layer, in the model's order.
        model: the model's name, for messages.
        ablations: what the masked heads are replaced by, one variant of each mask for each and each of its draws.
        scores: of the run's own calibration, by name and head.
        orders: of heads whose scores it computed anew, by score and direction.

    Raises:
        MaskSpecError: as `MaskSpec.expand` does.
    """
    masks: dict[str, NamedMask] = {}
    families: dict[str, dict[str, set[str]]] = {}  # of each mask, by kind of ablation
    for spec in specs:
        kinds = spec.under(ablations)
        for mask in spec.expand(heads_per_layer, model, scores, orders):
            known = masks.get(mask.name, mask)
            # One of many lies on the curve of the many, also where it was asked for by itself before.
            masks[mask.name] = known if known.test_families else mask
            for kind in kinds:
                families.setdefault(mask.name, {}).setdefault(kind, set()).update(mask.test_families)
    return [
        Variant(replace(mask, test_families=tuple(sorted(families[mask.name][ablation.kind]))), ablation.kind, draw)
        for mask in _with_own_curves(list(masks.values()))
        for ablation in ablations
        if ablation.kind in families[mask.name]
        for draw in range(ablation.draws)
    ]


_PATHS = re.compile(r"(?:^|[+:])grow:([^:+]+):")


def _with_own_curves(masks: Sequence[NamedMask]) -> list[NamedMask]:
    """The masks, the path in the name of their curve where several tables give an order by the same column."""
    paths = [".".join(_PATHS.findall(mask.name)) for mask in masks]
    of_curves: dict[str, set[str]] = {}
    for mask, path in zip(masks, paths, strict=True):
        of_curves.setdefault(mask.curve, set()).add(path)
    slugs = {path: re.sub(r"\W", "_", path, flags=re.ASCII) for path in paths}
    alike = {slug for slug in slugs.values() if list(slugs.values()).count(slug) > 1}
    found = []
    for mask, path in zip(masks, paths, strict=True):
        digits = f"_{hashlib.sha256(path.encode()).hexdigest()[:6]}" if slugs[path] in alike else ""
        shared = path and mask.curve != HEADS_MASKED and len(of_curves[mask.curve]) > 1
        found.append(replace(mask, curve=f"{mask.curve}_{slugs[path]}{digits}") if shared else mask)
    return found


def _masks(tree: Tree, model: Model) -> Iterator[tuple[Member | None, frozenset[Head]]]:
    """Of many masks what varies in each, of a single one None; and the masked heads."""
    mask = _union(tree.mask, model)
    kept = None if tree.keep is None else _union(tree.keep, model)
    rest = _combine(mask, kept, model)
    if tree.many is None:
        if tree.text != "none":
            yield None, rest
        return
    inside = any(clause is tree.many for clause in tree.keep or ())
    alone = len(tree.clauses) == 1 and tree.keep != ()
    for member in tree.many.members(model):
        if inside:
            masked = _combine(mask, (kept or frozenset()) | member.heads, model)
        else:
            masked = _combine(mask | member.heads, kept, model)
        if alone or masked != rest:
            yield member, masked


def _union(clauses: Sequence[Clause], model: Model) -> frozenset[Head]:
    """The heads of the clauses that stand for one set each."""
    sets = (member.heads for clause in clauses if not clause.many for member in clause.members(model))
    return frozenset().union(*sets)


def _combine(mask: frozenset[Head], kept: frozenset[Head] | None, model: Model) -> frozenset[Head]:
    return mask if kept is None else mask | (model.heads - kept)


def _leading_kinds(text: str) -> tuple[tuple[str, ...], int]:
    """The kinds of ablation before a spec, in their usual order, and where the spec itself begins."""
    before, colon, _ = text.partition(":")
    kinds = before.split(",")
    if not colon or not all(kind in KINDS for kind in kinds):
        return (), 0
    return tuple(kind for kind in KINDS if kind in kinds), len(before) + 1


def _no_text(value: object) -> str:
    """Why a value is no mask spec, with the YAML that may have made it."""
    why = "a mask spec is text, such as layer:3 or head:3.1"
    if value is None:
        return f"{why}: write none for the unmasked model (null and an empty value are no text), got None"
    if isinstance(value, bool):
        return f"{why}: YAML reads on, off, yes and no as true and false, got {value}"
    if isinstance(value, int):
        layer, head = divmod(value, 60)
        return f"{why}: YAML reads a bare {layer}:{head} as {value}, so write head:{layer}.{head}, got {value}"
    if isinstance(value, float):
        return f"{why}: YAML reads a bare {value} as a number, so write head:{value}, got {value}"
    if isinstance(value, dict):
        return f"{why}: YAML reads 'layer: 3' as a mapping, so write layer:3 without a blank, got {value}"
    return f"{why}, got {value!r}"


class MaskSpecs(tuple[MaskSpec, ...]):
    """The specs of one run: a single text, or a YAML list of texts, whose masks are scored together.

    Raises:
        MaskSpecError: A text is no mask spec.
    """

    __slots__ = ()

    def __new__(cls, specs: Any = ()) -> MaskSpecs:
        """Check every text."""
        texts = specs if isinstance(specs, (list, tuple)) else [specs]
        if not texts:
            raise UsageError("the list of mask specs is empty; write none for the baseline alone, got []")
        return super().__new__(cls, (MaskSpec(text) for text in texts))


def plain_specs(specs: MaskSpecs) -> str | list[str]:
    """Return what a config file shows: one text, or a list of texts."""
    return str(specs[0]) if len(specs) == 1 else [str(spec) for spec in specs]
