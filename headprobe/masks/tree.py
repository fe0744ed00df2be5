"""A mask spec as a tree: read from a text, from left to right, and written as its one canonical text.

Reading points at the first thing that does not fit.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headprobe.masks.clauses import HEADS_MASKED, All, Clause, Each, Heads, Indices, Layers, Point, check_masks
from headprobe.masks.orders import DIRECTIONS, LEAST, RESCORED, GrowColumn, GrowRandom, OnePerLayer, Random
from headprobe.masks.pieces import MAX_NUMBERS, MaskSpecError, Numbers, Piece, number_text, parse_numbers
from headprobe.masks.sets import EVERYWHERE, PAIR, Pairs, Subsets
from headprobe.masks.tables import CALIBRATION, SavedMask

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

        def filled(clauses: tuple[Clause, ...]) -> tuple[Clause, ...]:
            return tuple(part for clause in clauses for part in (member.parts if clause is self.many else (clause,)))

        return replace(self, mask=filled(self.mask), keep=self.keep and filled(self.keep))

    def point_of(self, member: Clause, count: int) -> Point:
        """The place of a mask on its curve; where only an order of heads is kept, how many heads are masked.

        Args:
            member: the varying clause of one of many masks, or a single mask's first.
            count: masked heads: the place on `heads_masked`, the curve of masks that are on no other.
        """
        several = self.many is None and len(self.clauses) > 1
        if member.point is None or several:
            return Point(HEADS_MASKED, count)
        kept = any(clause is member or clause is self.many for clause in self.keep or ())
        # Beside fixed clauses several masks of an order may hit as many heads.
        reversed_order = kept and isinstance(member, Random | GrowColumn) and len(self.clauses) == 1
        step = count if reversed_order else member.point.step
        return Point("_".join([*self._fixed_slugs(member), member.point.curve]), step)

    def _fixed_slugs(self, member: Clause) -> list[str]:
        """What stays the same along the curve, safe in a TensorBoard tag."""
        varying = {id(member), id(self.many)}
        mask = _slug([clause for clause in self.mask if id(clause) not in varying])
        kept = _slug([clause for clause in self.keep or () if id(clause) not in varying])
        inside = any(id(clause) in varying for clause in self.keep or ())
        word = ["keep"] if inside else ["kept"] if self.keep else []
        return mask + word + kept


def parse(text: str, begin: int = 0) -> Tree:
    """Read a mask spec, which begins at a place of the text.

    Raises:
        MaskSpecError: at the first clause, word or number that does not fit.
    """
    if begin == len(text):
        raise MaskSpecError(
            text, begin, "the mask spec is empty: write 'none' for the unmasked model, or layer:3, head:3.1, ..."
        )
    mask: list[Clause] = []
    keep: list[Clause] | None = None
    for piece in Piece(text, begin, len(text)).split("+"):
        body = piece
        if piece.split(":")[0].text == "keep":
            _check_keep(piece, first=keep is None)
            keep = []
            body = piece.after(len("keep:"))
        clause = _parse_clause(body, "keep:" if body is not piece else "")
        if clause is not None:
            _check_one_form(clause, mask + (keep or []))
            (mask if keep is None else keep).append(clause)
    return Tree(tuple(mask), None if keep is None else tuple(keep))


def _check_keep(piece: Piece, *, first: bool) -> None:
    if not first:
        raise piece.error("a spec has one keep: it applies to everything after it, such as keep:layer:3+head:5.1")
    after = piece.after(len("keep:")) if ":" in piece.text else piece.after(len("keep"))
    if not after.text:
        raise after.error("keep: needs a clause, such as keep:layer:3 (mask everything but layer 3)")
    if after.split(":")[0].text == "keep":
        raise after.error("a spec has one keep: write keep:CLAUSE, such as keep:layer:3")


def _check_one_form(clause: Clause, before: Sequence[Clause]) -> None:
    if clause.many and any(other.many for other in before):
        form = next(other for other in before if other.many)
        raise clause.piece.error(
            f"a spec has one form of many masks, and {form.piece.text} is one already: join it to single masks, "
            "or give two specs"
        )


def _parse_clause(piece: Piece, prefix: str) -> Clause | None:
    """The clause of a piece; None for `none`, which masks nothing."""
    word, *values = piece.split(":")
    if word.text == "none":
        _expect(piece, values, 0, "none takes no value: write none")
        return None
    if word.text in BUILDERS:
        return BUILDERS[word.text](piece, values)
    raise _unknown_word(piece, word, prefix)


def _unknown_word(piece: Piece, word: Piece, prefix: str) -> MaskSpecError:
    if not piece.text:
        return piece.error("expected a clause here, such as layer:3: '+' joins two clauses")
    before = piece.source[: piece.start - len(prefix)].rpartition("+")[0].rpartition("+")[2]
    if before.startswith(("file:", "grow:")):
        reason = f"expected a clause after '+', got {piece.text!r}: a PATH may hold anything but ':' and '+'"
        return piece.error(reason)
    piece.check_characters()
    if not word.text or word.text[0].isdigit() or word.text[0] in "-.,/":
        return piece.error(f"every clause starts with a word, such as layer:3 or head:3.1, got {piece.text!r}")
    return word.error(f"expected {_choices([*WORDS])}, got {word.text!r}{_did_you_mean(word.text, WORDS)}")


def _parse_all(piece: Piece, values: list[Piece]) -> Clause:
    _expect(piece, values, 0, "all takes no value: write all")
    return All(piece)


def _parse_layer(piece: Piece, values: list[Piece]) -> Clause:
    (layers,) = _expect(piece, values, 1, "layer takes layer numbers: write layer:3, layer:0-5 or layer:0-5,9")
    if "." in layers.text:
        dot = layers.text.index(".")
        raise layers.error(f"layer takes whole layers: a single head is head:{layers.text}", dot)
    return Layers(piece, parse_numbers(layers, "layer"))


def _parse_index(piece: Piece, values: list[Piece]) -> Clause:
    (indices,) = _expect(piece, values, 1, "index takes head numbers: write index:2 (head 2 of every layer)")
    return Indices(piece, parse_numbers(indices, "head"))


def _parse_head(piece: Piece, values: list[Piece]) -> Clause:
    (value,) = _expect(piece, values, 1, "head takes LAYER.HEAD: write head:3.1 or head:3.0-2")
    layers, *heads = value.split(".")
    if not heads:
        value.check_characters()
        raise value.error(f"head takes LAYER.HEAD: write head:3.1 for head 1 of layer 3, got {value.text!r}")
    if len(heads) > 1:
        raise heads[1].error("head takes one LAYER.HEAD: join two with '+', such as head:1.2+head:3.4", -1)
    clause = Heads(piece, parse_numbers(layers, "layer"), parse_numbers(heads[0], "head"))
    pairs = len(clause.layers.values) * len(clause.heads.values)
    if pairs > MAX_NUMBERS:
        raise value.error(f"{pairs:,} heads are too many: at most {MAX_NUMBERS:,}")
    return clause


def _parse_random(piece: Piece, values: list[Piece]) -> Clause:
    usage = "random takes COUNT or COUNT:SEED: write random:24 or random:24:7"
    count, *seed = _expect(piece, values, 1, usage, at_most=2)
    counts = parse_numbers(count, "count")
    seeds = parse_numbers(seed[0], "seed") if seed else Numbers.single(0, piece)
    check_masks(count, len(counts.values) * len(seeds.values))
    return Random(piece, counts, seeds)


def _parse_one_per_layer(piece: Piece, values: list[Piece]) -> Clause:
    usage = "one-per-layer takes SEED or SEED:LAYERS: write one-per-layer:5 or one-per-layer:0-19"
    seed, *layers = _expect(piece, values, 1, usage, at_most=2)
    return OnePerLayer(piece, parse_numbers(seed, "seed"), parse_numbers(layers[0], "layer") if layers else None)


def _parse_file(piece: Piece, values: list[Piece]) -> Clause:
    usage = "file takes a PATH: write file:mask.json; a PATH may hold anything but ':' and '+'"
    (path,) = _expect(piece, values, 1, usage)
    _check_path(path)
    return SavedMask(piece, path)


def _parse_each(piece: Piece, values: list[Piece]) -> Clause:
    usage = "each takes layer, index, head or pair: write each:layer, each:index, each:head or each:pair"
    at_most = 2 if values and values[0].text == PAIR else 1
    what, *more = _expect(piece, values, 1, usage, at_most)
    _check_word(what, EACH, "each:")
    if what.text != PAIR:
        return Each(piece, what.text)
    if more:
        _check_word(more[0], (EVERYWHERE,), "each:pair:")
    return Pairs(piece, everywhere=bool(more))


def _parse_subsets(piece: Piece, values: list[Piece]) -> Clause:
    (what,) = _expect(piece, values, 1, "subsets takes layer: write subsets:layer (every set of whole layers)")
    _check_word(what, ("layer",), "subsets:")
    return Subsets(piece)


def _check_word(word: Piece, words: Sequence[str], after: str) -> None:
    if word.text not in words:
        word.check_characters()
        raise word.error(
            f"expected {_choices(words)} after {after}, got {word.text!r}{_did_you_mean(word.text, words)}"
        )


def _parse_grow(piece: Piece, values: list[Piece]) -> Clause:
    usage = (
        "grow takes random:SEEDS, PATH:COLUMN or calibration:SCORE: write grow:random:0-4, grow:PATH:COLUMN, "
        "grow:PATH:COLUMN:most, grow:calibration:gradient_abs or grow:calibration:gradient_abs:least:rescored"
    )
    if values and values[0].text == "random":
        usage = "grow:random takes SEEDS: write grow:random:0-4; for some counts only, random:0-36/6:0-4"
        _, seeds = _expect(piece, values, 2, usage)
        return GrowRandom(piece, parse_numbers(seeds, "seed"))
    anew = len(values) > 3 and values[3].text == RESCORED
    path, column, *more = _expect(piece, values, 2, usage, at_most=5 if anew else 4)
    _check_path(path)
    if not column.text:
        raise column.error("expected a column's name here: write grow:PATH:COLUMN")
    column.check_characters()
    direction = more[0].text if more else LEAST
    if direction not in DIRECTIONS:
        more[0].check_characters()
        hint = _did_you_mean(direction, DIRECTIONS)
        if direction == RESCORED:
            hint = f": write {' or '.join(f'{word}:{RESCORED}' for word in DIRECTIONS)}"
        raise more[0].error(f"expected {_choices(DIRECTIONS)} (which heads are masked first), got {direction!r}{hint}")
    if len(more) > 1:
        _check_rescored(path, more[1])
    counts = parse_numbers(more[1 + anew], "count") if len(more) > 1 + anew else None
    return GrowColumn(piece, path, column, direction, counts, anew)


def _check_rescored(path: Piece, word: Piece) -> None:
    """Refuse what is neither `rescored` nor a number of heads, and the word where scores cannot be had anew."""
    if word.text == RESCORED and path.text != CALIBRATION:
        raise word.error(
            f"only scores of the run's own calibration are computed anew: write grow:{CALIBRATION}:SCORE:least:"
            f"{RESCORED}, got {RESCORED!r} after a PATH"
        )
    if word.text != RESCORED and path.text == CALIBRATION and word.text[:1].isalpha():
        word.check_characters()
        hint = _did_you_mean(word.text, (RESCORED,))
        raise word.error(f"expected {RESCORED}, or counts such as 6-24/6, after the direction, got {word.text!r}{hint}")


def _check_path(path: Piece) -> None:
    if not path.text:
        raise path.error("expected a PATH here: anything without ':' and '+'")
    for offset, character in enumerate(path.text):
        if not character.isprintable():
            raise path.error(f"a PATH holds printable characters only, got {character!r}", offset)


def _expect(piece: Piece, values: list[Piece], at_least: int, usage: str, at_most: int | None = None) -> list[Piece]:
    """The values after a word, where there are as many as it takes; the caret shows the lack or the first too many."""
    if len(values) < at_least:
        raise piece.error(usage, len(piece.text))
    if len(values) > (at_most or at_least):
        raise values[at_most or at_least].error(usage, -1)
    return values


def _choices(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _did_you_mean(text: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(text.lower(), words, n=1)
    return f": did you mean '{near[0]}'?" if near else ""


BUILDERS: dict[str, Callable[[Piece, list[Piece]], Clause]] = {
    "all": _parse_all,
    "layer": _parse_layer,
    "index": _parse_index,
    "head": _parse_head,
    "random": _parse_random,
    "one-per-layer": _parse_one_per_layer,
    "file": _parse_file,
    "each": _parse_each,
    "subsets": _parse_subsets,
    "grow": _parse_grow,
}
WORDS = ("none", *BUILDERS, "keep")
EACH = ("layer", "index", "head", PAIR)


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
