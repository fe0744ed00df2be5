"""What a run's masks lose, by the set of heads that is masked whatever its name: games with heads as players."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.ablations import Sums, images_of, rises_and_drops
from headprobe.run.load import RunFiles

Head = tuple[int, int]
Heads = frozenset[Head]


@dataclass(frozen=True)
class Game:
    """The masks of a run under one ablation.

    Attributes:
        ablation: The ablation.
        heads_per_layer: Heads of each layer of the model.
        masks: Names of the masked sets that the run has scored, the first name where a set has several.
        alone: Of them those that were asked for by themselves, not as one of many masks.
        sums: By quantity its sums over the images of each group, `[1 + sets, groups]`, first those of the empty set,
            which are 0; where the ablation draws, means over its draws.
        images: Images of each group, `[groups]`.
        calibration: Which images fitted constants: `half`, `same`, `split:NAME`; nothing where nothing was fitted.
    """

    ablation: str
    heads_per_layer: tuple[int, ...]
    masks: dict[Heads, str]
    alone: frozenset[Heads]
    sums: Sums
    images: IntArray
    calibration: str

    @cached_property
    def places(self) -> dict[Heads, int]:
        """The row of each set in `sums`."""
        return {heads: place for place, heads in enumerate([Heads(), *self.masks])}

    @cached_property
    def layers(self) -> tuple[Heads, ...]:
        """The heads of each layer."""
        return tuple(Heads((layer, head) for head in range(count)) for layer, count in enumerate(self.heads_per_layer))

    def rows_of(self, sets: Iterable[Heads]) -> list[int] | None:
        """Return the rows of these sets; None where one was not scored."""
        places = self.places
        found: list[int] = []
        for heads in sets:
            if heads not in places:
                return None
            found.append(places[heads])
        return found

    @cached_property
    def sets_of_layers(self) -> list[int] | None:
        """The rows of all sets of layers, set s holding layer l if bit l of s is 1; None where some are missing."""
        layers = self.layers
        if len(layers) < 2 or len(self.masks) < 2 ** len(layers) - 1:
            return None
        sets = [Heads()]
        for layer in layers:
            sets += [heads | layer for heads in sets]
        return self.rows_of(sets)

    def table(self, quantity: str, rows: Sequence[int]) -> FloatArray:
        """Return the sums of some sets, `[sets, groups]`."""
        return np.asarray(self.sums[quantity][list(rows)])


def games(run: RunFiles) -> list[Game]:
    """Return the game of each ablation of a run; none for runs of releases without `groups.npz`."""
    groups = run.arrays("groups.npz")
    if not groups:
        return []
    sums, images = rises_and_drops(groups), images_of(groups)
    kinds = list(dict.fromkeys(str(row["ablation"]) for row in run.masks[1:]))
    return [_game(run, kind, sums, images) for kind in kinds]


def _game(run: RunFiles, kind: str, sums: Sums, images: IntArray) -> Game:
    names: dict[Heads, str] = {}
    draws: dict[Heads, list[int]] = {}
    of_many: set[Heads] = set()
    for number, row in enumerate(run.masks):
        name = str(row["mask"])
        heads = Heads(run.heads.get(name, ()))  # none of the baseline
        if row["ablation"] != kind or not heads:
            continue
        # Of one set under two names the first counts: the model is the same.
        if names.setdefault(heads, name) == name:
            draws.setdefault(heads, []).append(number)
        if row["test_family"]:
            of_many.add(heads)
    per_layer = tuple(run.record["model"]["heads_per_layer"])
    of_sets = {quantity: _means(of_rows, list(draws.values())) for quantity, of_rows in sums.items()}
    return Game(kind, per_layer, names, frozenset(names) - of_many, of_sets, images, run.calibration)


def _means(sums: FloatArray, rows: Sequence[Sequence[int]]) -> FloatArray:
    """Return means over the rows of each set, after a row of zeros."""
    nothing = np.zeros((1, sums.shape[1]))
    if all(len(own) == 1 for own in rows):
        return np.concatenate([nothing, sums[[row for own in rows for row in own]]])
    return np.concatenate([nothing, [sums[list(own)].mean(axis=0) for own in rows]])
