"""What two heads or layers do together beyond what each does alone: `interactions.csv`, from a run's files."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from headprobe.metrics.accuracy.paired_tests import bh_q
from headprobe.metrics.accuracy.shapley import Estimates, exact_interactions, exactly
from headprobe.metrics.arrays import FloatArray
from headprobe.run.ablations import NLL_RISE, main_quantity
from headprobe.run.games import Game, Heads
from headprobe.run.load import Cell, Row
from headprobe.text import counted

PAIRWISE, SHAPLEY = "pairwise", "shapley"
"""Kinds of interaction: of two parts of an otherwise whole model; the mean over what else is masked."""

CLEAR_Q = 0.05
"""False discovery rate below which an interaction is called one."""


class Pair(NamedTuple):
    """Two disjoint sets of heads whose union was scored too."""

    first: Heads
    second: Heads


def interaction_rows(games: Sequence[Game]) -> list[Row]:
    """Return the rows of `interactions.csv`: two parts, what masking both costs, and what masking each.

    Parts are single heads, whole layers, and masks that were asked for by themselves. With all sets of layers in the
    run, layers have their Shapley interaction index besides.

    Args:
        games: Of a run, `headprobe.run.games.games(run)`.
    """
    with np.errstate(invalid="ignore"):  # infinite minus infinite NLL: not defined
        return [row for game in games for row in _rows_of(game)]


def interactions_in_words(rows: Sequence[Row]) -> str:
    """Return one line about the rows of `interactions.csv`; nothing where there are none."""
    main = main_quantity({row["quantity"] for row in rows})
    found = [row for row in rows if row["quantity"] == main and row["kind"] == PAIRWISE]
    if not found:
        return ""
    kinds = dict.fromkeys(str(row["ablation"]) for row in found)
    what = "the NLL rise" if main == NLL_RISE else "how far the feature moves under masking"
    clear = [
        f"{sum(float(row['bh_q']) < CLEAR_Q for row in found if row['ablation'] == kind)} under {kind}"
        for kind in kinds
    ]
    return (
        f"interactions.csv: {counted(len(found) // len(kinds), 'pair')} of heads or other parts; {what} of both "
        f"differs from the sum of their own (q below {CLEAR_Q}) in {', '.join(clear)}"
    )


def _rows_of(game: Game) -> list[Row]:
    pairs = list(pairs_of(game))
    found: list[Row] = []
    for quantity in game.sums if pairs else ():
        rises = _rises(game, quantity, pairs)  # [pairs, 3, groups]
        found += _table(PAIRWISE, game, quantity, pairs, rises[:, 2] - rises[:, 0] - rises[:, 1])
    sets = game.sets_of_layers
    of_layers = [Pair(*two) for two in combinations(game.layers, 2)]
    for quantity in game.sums if sets else ():
        indices = exact_interactions(game.table(quantity, sets or ()))
        found += _table(SHAPLEY, game, quantity, of_layers, indices)
    return found


def pairs_of(game: Game) -> Iterator[Pair]:
    """Yield the pairs of parts whose union was scored, in the order of the unions."""
    whole = set(game.layers)
    parts: dict[tuple[int, int], list[Heads]] = {}  # by their first head: the first part of a union has the union's
    for heads in game.masks:
        if len(heads) == 1 or heads in whole or heads in game.alone:
            parts.setdefault(min(heads), []).append(heads)
    known = {heads for several in parts.values() for heads in several}
    for union in game.masks:
        for first in parts.get(min(union), ()):
            if first < union and union - first in known:
                yield Pair(first, union - first)


def _rises(game: Game, quantity: str, pairs: list[Pair]) -> FloatArray:
    """Return the sums of the first part, the second and both, `[pairs, 3, groups]`."""
    places = game.places
    rows = [[places[first], places[second], places[first | second]] for first, second in pairs]
    return np.asarray(game.sums[quantity][np.array(rows)])


def _table(kind: str, game: Game, quantity: str, pairs: list[Pair], sums: FloatArray) -> list[Row]:
    """Return a row per pair.

    Args:
        kind: Of interaction.
        game: Where the pairs are from.
        quantity: What is lost.
        pairs: The pairs.
        sums: Their interactions, sums over the images of each group, `[pairs, groups]`.
    """
    found = exactly(sums, game.images)
    p = _p_values(found, int((game.images > 0).sum()))
    q = bh_q(p)
    images = int(game.images.sum())
    rises = _rises(game, quantity, pairs).sum(axis=-1) / (images or np.nan)  # [pairs, 3]
    rows: list[Row] = []
    for number, (first, second) in enumerate(pairs):
        names = {"mask": first | second, "mask_a": first, "mask_b": second}
        row: Row = {"kind": kind, **{column: game.masks[heads] for column, heads in names.items()}}
        row |= {
            "ablation": game.ablation,
            "quantity": quantity,
            **_place(game, first, "a"),
            **_place(game, second, "b"),
        }
        of_parts = zip(("rise_a", "rise_b", "rise_both"), rises[number].tolist(), strict=True)
        row |= {"images": images, **dict(of_parts), "interaction": float(found.value[number])}
        row |= {"interaction_low": float(found.low[number]), "interaction_high": float(found.high[number])}
        rows.append(row | {"p": float(p[number]), "bh_q": float(q[number]), "calibration": game.calibration})
    return rows


def _place(game: Game, part: Heads, end: str) -> dict[str, Cell]:
    """Return the layer and the head of a part: of a whole layer no head, and of other sets neither."""
    nothing = float("nan")
    layer, head = min(part)
    cells: tuple[Cell, Cell] = (layer, head) if len(part) == 1 else (nothing, nothing)
    if len(part) > 1 and part == game.layers[layer]:
        cells = layer, nothing
    return {f"layer_{end}": cells[0], f"head_{end}": cells[1]}


def _p_values(found: Estimates, groups: int) -> FloatArray:
    """Return two-sided p of Student's t, below 0.05 where the interval leaves out 0; 1 where nothing differs at all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(found.value) / found.se_images, groups - 1)
    p = np.where(found.se_images > 0, p, np.nan)
    return np.where((found.se_images == 0) & (found.value == 0), 1.0, p)
