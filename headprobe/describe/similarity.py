"""Which heads resemble each other: moments of their outputs, and the matrices that follow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from headprobe.describe.base import (
    HeadStatistic,
    Observation,
    Role,
    Subject,
    Undefined,
    by_layer_mean,
    prefixed,
)
from headprobe.describe.head_outputs import head_outputs, own_prefix, refuse_missing_samples
from headprobe.describe.similarity_matrices import nan_for_unknown, others_mean, similarity_arrays
from headprobe.errors import UsageError
from headprobe.metrics.similarity.comparison import Comparison, compare
from headprobe.metrics.similarity.head_blocks import MAX_GROUPS, Precision, Sampling, Scope
from headprobe.metrics.similarity.measures import MEASURES, VARIANCE, Measure, samples_in_words, title
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments
from headprobe.text import counted
from headprobe.units.tree import Arrays, NamedSums, merge_sums, one_thread

NOT_UNIQUE = (
    "several directions of two heads agree wholly, as with fewer samples than they have dims together, so PWCCA is not "
    "unique"
)

ROWS_TOGETHER = 8  # neighbouring rows that stay in one group of images, where units are split into several


class SimilaritySums(HeadStatistic):
    """Similarities of heads by six measures (see `headprobe.metrics.similarity.measures`).

    Intervals come from leaving out groups of images, so each group has moments of its own. A group is a range of
    units. Where there are fewer units than groups, the rows of a unit are dealt to several pieces in turn, eight
    neighbouring rows at a time, and a group is a range of pieces. The noise floor then pairs images within pieces.

    Args:
        scope: Heads that are compared: `within` each layer, `all` of the model, or heads of `pairs` of layers.
        sampling: What a sample is: any of the `tokens`, `patches` (tokens with a place on the image), the `class`
            token, or the `mean` over an image's tokens.
        pairs: Pairs of layers, for the scope `pairs`.
        variance: Share of the sum of squares that SVCCA keeps.
        measures: Which to compute.
        groups: Groups of images for the intervals, 0 for none; only within layers, where 16 is the default.
        noise_floor: Also compare heads on different images.
        precision: Of the products behind the sums of tokens, which are float64 themselves.
    """

    def __init__(
        self,
        scope: Scope = "within",
        sampling: Sampling = "tokens",
        pairs: Sequence[tuple[int, int]] = (),
        variance: float = VARIANCE,
        measures: Sequence[Measure] = MEASURES,
        groups: int | None = None,
        noise_floor: bool = True,
        precision: Precision = "float64",
    ) -> None:
        self.moment_options = MomentOptions(scope, sampling, 1, noise_floor, precision)
        self.pairs = [(first, second) for first, second in pairs]
        self.variance, self.measures = variance, tuple(measures)
        self._wanted = (MAX_GROUPS if scope == "within" else 0) if groups is None else groups

    def check(self) -> None:
        """Refuse options that make no sense.

        Not done on construction: there jsonargparse would take the message for a wrong type.

        Raises:
            UsageError: An option is outside its range, or does not go with another.
        """
        self.moment_options.check()
        if not 0 < self.variance <= 1:
            raise UsageError(f"variance must be above 0 and at most 1, got {self.variance}")
        if self._wanted != 0 and not 2 <= self._wanted <= MAX_GROUPS:
            raise UsageError(f"groups of images must be 2 to {MAX_GROUPS}, or 0 for no intervals, got {self._wanted}")
        if self._wanted and self.moment_options.scope != "within":
            rule = "intervals keep the moments once per group: only for the scope 'within'; leave groups out"
            raise UsageError(f"{rule}, got groups {self._wanted} with scope {self.moment_options.scope!r}")
        if not self.measures or not set(self.measures) <= set(MEASURES):
            raise UsageError(f"measures must be some of {', '.join(MEASURES)}, got {list(self.measures)}")

    def options(self) -> dict[str, Any]:
        """Return name and options."""
        options = {name: value for name, value in self.moment_options._asdict().items() if name != "groups"}
        more = {"pairs": [list(pair) for pair in self.pairs], "variance": self.variance, "measures": [*self.measures]}
        return {"name": "similarity", **options, **more, "groups": self._wanted}

    def options_of_sums(self) -> dict[str, Any]:
        """Return name and options without those that only matter when the same moments are compared."""
        return {name: value for name, value in self.options().items() if name not in ("variance", "measures")}

    def begin(self, subject: Subject) -> None:
        """Fit the statistic to a model, and cut units into pieces where there are fewer units than groups.

        Raises:
            UsageError: The options make no sense, or the model has no such layers or samples.
        """
        self.check()
        self._pieces = max(1, -(-self._wanted // max(subject.units, 1)))  # of each unit
        pieces = subject.units * self._pieces
        self.groups = max(1, min(self._wanted, pieces))
        # Group g holds the pieces from the g-th start to the next: as many in each as can be.
        self._starts = [-(-pieces * group // self.groups) for group in range(self.groups + 1)]
        self._found: dict[str, list[Comparison]] | None = None
        self._matrices: Arrays | None = None
        super().begin(subject)
        refuse_missing_samples(subject, self.moment_options.scope, self.moment_options.sampling, self.pairs)
        self.empty_sums()  # refuses layers that the model does not have

    # -- sums ------------------------------------------------------------------------------------------------------

    def empty_sums(self) -> NamedSums:
        """Make empty moments of each model."""
        return {model: self._moments(1) for model in self.subject.models}

    def group_of(self, piece: int) -> int:
        """Return the group of images that a piece belongs to; a unit's pieces may belong to different ones."""
        return int(np.searchsorted(self._starts, piece, side="right")) - 1

    def open(self, unit: int) -> NamedSums:
        """Return empty moments for every piece of a unit and every model."""
        sums: NamedSums = {}
        for piece in self._pieces_of(unit):
            for model, moments in self.empty_sums().items():
                sums[_of_piece(piece, model)] = moments.to(self.subject.device)
        return sums

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Add the outer products of the layer's head outputs."""
        # [images, tokens, heads, head dim] of each model
        outputs = observation.each(lambda record: head_outputs(record, self.subject.facts[observation.layer]))
        pieces = (observation.rows // ROWS_TOGETHER) % self._pieces  # [images], each image's piece of its unit
        for own_piece in sorted(set(pieces.tolist())):
            piece = observation.unit * self._pieces + own_piece
            chosen = (pieces == own_piece).nonzero().flatten().to(outputs[0].device)
            for model, of_model in zip(self.subject.models, outputs, strict=True):
                # Indexing copies: only where a batch falls into several pieces.
                own = of_model if len(chosen) == len(pieces) else of_model[chosen]
                sums[_of_piece(piece, model)].update(observation.layer, own, unit=piece)

    def close(self, unit: int, sums: NamedSums) -> NamedSums:
        """End a unit and return its moments, by group of images and model."""
        whole: NamedSums = {}
        for piece in self._pieces_of(unit):
            group = self.group_of(piece)
            of_group: NamedSums = {}
            for model in self.subject.models:
                moments = sums[_of_piece(piece, model)]
                moments.close(piece)
                of_group[_of_group(group, model)] = moments.to("cpu")
            merge_sums(whole, of_group)
        return whole

    def _pieces_of(self, unit: int) -> range:
        """Return the pieces of a unit, counted over all units."""
        return range(unit * self._pieces, (unit + 1) * self._pieces)

    def empty(self, name: str) -> Any:
        """Return empty moments of one group, as `close` gives them.

        Raises:
            ValueError: There is no such model.
        """
        return super().empty(name.rpartition("/")[2])

    def _moments(self, groups: int) -> Moments:
        layout, facts = self.subject.layout, self.subject.facts
        layers = []
        for layer, fact in zip(layout.layers, facts, strict=True):
            layers.append(LayerHeads(layer.heads, layer.head_dim, own_prefix(fact)))
        return Moments(layers, self.moment_options._replace(groups=groups), self.pairs)

    # -- numbers ---------------------------------------------------------------------------------------------------

    def comparisons(self) -> dict[str, list[Comparison]]:
        """Return the comparisons of each model's blocks of heads."""
        if self._found is None:
            with one_thread():
                self._found = {model: self._compare(model) for model in self.subject.models}
        return self._found

    def _compare(self, model: str) -> list[Comparison]:
        moments = self._moments(self.groups)
        for group in range(self.groups):
            found = self.whole.get(_of_group(group, model))
            if found is not None:  # a data set without units has none
                moments.merge(found, group=group)
        return list(compare(moments, self.variance, self.measures))

    def matrices(self) -> Arrays:
        """Return what `similarity.npz` holds: `[heads, heads]` over all heads, NaN where two were not compared.

        Names of the masked model begin with `masked_`, names of differences with `change_`.
        """
        if self._matrices is None:
            self._matrices = similarity_arrays(self.subject.layout.heads_per_layer, self.comparisons())
            self._matrices |= {
                "variance": np.asarray(self.variance),
                "scope": np.asarray(self.moment_options.scope),
                "sampling": np.asarray(self.moment_options.sampling),
                "mask": np.asarray(self.subject.mask or ""),
            }
        return self._matrices

    def columns(self) -> dict[str, Arrays]:
        """Return ranks, kept dims, and each head's mean similarity with the heads that it was compared with."""
        arrays = self.matrices()
        found: dict[str, Arrays] = {}
        for role in self.subject.roles:
            found[role] = {}
            if role in self.subject.models:
                found[role]["rank"] = nan_for_unknown(arrays[prefixed(role, "rank")])
                found[role]["kept_dims"] = nan_for_unknown(arrays[prefixed(role, "kept")])
            for measure in self.measures:
                found[role][f"{measure}_mean"] = others_mean(arrays[prefixed(role, measure)])
        return found

    def npz_files(self) -> dict[str, Arrays]:
        """Return `similarity.npz`."""
        return {"similarity.npz": self.matrices()}

    def undefined(self) -> Undefined:
        """Return the layers with heads that were compared with no other, or without a PWCCA that is unique."""
        heads = self.subject.layout.heads_per_layer
        compared: set[int] = set()
        for block in self.comparisons()[Role.BASELINE]:
            compared.update(block.moments.layer.tolist())

        within = self.moment_options.scope == "within"
        reasons = {
            "the layer is in none of the pairs": [layer for layer in range(len(heads)) if layer not in compared],
            "the layer has a single head": [layer for layer in sorted(compared) if within and heads[layer] == 1],
        }
        found: Undefined = {}
        for measure in self.measures:
            of_measure = {**reasons, NOT_UNIQUE: self._pairs_without_pwcca()[1] if measure == "pwcca" else []}
            given = {reason: layers for reason, layers in of_measure.items() if layers}
            if given:
                found[f"{measure}_mean"] = given
        return found

    def _pairs_without_pwcca(self) -> tuple[int, list[int]]:
        """Return how many pairs of heads that vary have no PWCCA, in either model, and the layers of these heads."""
        pairs, layers = 0, set[int]()
        for blocks in self.comparisons().values():
            for block in blocks if "pwcca" in self.measures else ():
                varies = block.found.rank > 0
                empty = np.isnan(block.found.values["pwcca"]) & np.outer(varies, varies)  # [heads, heads]
                pairs += int(np.triu(empty).sum())
                layers.update(block.moments.layer[empty.any(axis=1)].tolist())
        return pairs, sorted(layers)

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean similarity of different heads, and the one of unrelated images."""
        arrays, measure = self.matrices(), self.measures[0]
        layer = np.asarray(arrays["layer"], dtype=np.int64)
        name = title(measure, self.moment_options.sampling)
        found: dict[str, ArrayLike] = {name: by_layer_mean(layer, others_mean(arrays[measure]))}
        if f"{measure}_floor" in arrays:
            found["its floor"] = by_layer_mean(layer, others_mean(arrays[f"{measure}_floor"]))
        return found

    def note(self) -> str:
        """Return what a sample is, how many there are, and whether they are too few for PWCCA."""
        arrays = self.matrices()
        samples = np.asarray(arrays["samples"], dtype=np.int64)
        line = f"Similarity: {samples_in_words(samples, int(arrays['images']), self.moment_options.sampling)}"
        pairs, _ = self._pairs_without_pwcca()
        return f"{line}; PWCCA is empty for {counted(pairs, 'pair')} of heads: {NOT_UNIQUE}" if pairs else line


def _of_piece(piece: int, model: str) -> str:
    return f"{piece}/{model}"


def _of_group(group: int, model: str) -> str:
    return f"{group:02d}/{model}"
