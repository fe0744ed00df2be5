"""Which heads resemble each other: moments of their outputs, and the matrices that follow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import BASELINE, CHANGE, MASKED, HeadStatistic, Observation, Subject, prefixed
from headprobe.describe.head_axes import SPREAD, HeadAxes
from headprobe.errors import UsageError
from headprobe.metrics.similarity.comparison import Comparison, changes, compare
from headprobe.metrics.similarity.head_blocks import MAX_GROUPS, Precision, Sampling, Scope
from headprobe.metrics.similarity.measures import MEASURES, VARIANCE, Measure
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments
from headprobe.metrics.spectrum.spectra import on_image
from headprobe.units.tree import Arrays, NamedSums, merge_sums, one_thread

RUN = 8  # neighbouring rows that stay in one group of images, where units are split into several


class SimilaritySums(HeadStatistic):
    """Similarities of heads by six measures (see `headprobe.metrics.similarity.measures`).

    Groups of images for the intervals are ranges of units; where there are fewer units than groups, each unit's rows
    are dealt to several groups, eight neighbouring rows at a time.

    Args:
        scope: Heads that are compared: `within` each layer, `all` of the model, or those of `pairs` of layers.
        sampling: What a sample is: any of the `tokens`, `patches` (tokens with a place on the image), the `class`
            token, or the `mean` over an image's tokens.
        pairs: Pairs of layers, for the scope `pairs`.
        variance: Share of the sum of squares that SVCCA keeps.
        measures: Which to compute.
        groups: Groups of images for the intervals, 0 for none; only within layers.
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
        """Make room for the moments.

        Raises:
            UsageError: The options make no sense, or the model has no such layers or samples.
        """
        self.check()
        self._pieces = max(1, -(-self._wanted // max(subject.units, 1)))
        pieces = subject.units * self._pieces
        self.groups = max(1, min(self._wanted, pieces))
        self._starts = [-(-pieces * group // self.groups) for group in range(self.groups + 1)]
        self._found: dict[str, list[Comparison]] | None = None
        self._matrices: Arrays | None = None
        super().begin(subject)
        self._refuse_missing_samples()
        self.empty_sums()

    def empty_sums(self) -> NamedSums:
        """Make empty moments of each model."""
        return {name: self._moments(1) for name in self.subject.models}

    def group_of(self, piece: int) -> int:
        """Return the group of images that a piece belongs to; a unit's pieces may belong to different ones."""
        return int(np.searchsorted(self._starts, piece, side="right")) - 1

    def open(self, unit: int) -> NamedSums:
        """Return empty moments for every piece of a unit and every model."""
        return {
            _of_piece(piece, name): metric.to(self.subject.device)
            for piece in self._pieces_of(unit)
            for name, metric in self.empty_sums().items()
        }

    def observe(self, seen: Observation, sums: NamedSums) -> None:
        """Add the outer products of the layer's head outputs."""
        outputs = seen.each(lambda record: head_outputs(record, self.subject.facts[seen.layer]))
        pieces = (seen.rows // RUN) % self._pieces  # [images], each image's piece of its unit
        for own_piece in sorted(set(pieces.tolist())):
            piece = seen.unit * self._pieces + own_piece
            chosen = (pieces == own_piece).nonzero().flatten().to(outputs[0].device)
            for name, of_model in zip(self.subject.models, outputs, strict=True):
                # Indexing copies: only where a batch falls into several pieces.
                own = of_model if len(chosen) == len(pieces) else of_model[chosen]
                sums[_of_piece(piece, name)].update(seen.layer, own, unit=piece)

    def close(self, unit: int, sums: NamedSums) -> NamedSums:
        """End a unit and return its moments, by group of images and model."""
        whole: NamedSums = {}
        for piece in self._pieces_of(unit):
            of_piece = {name: sums[_of_piece(piece, name)] for name in self.subject.models}
            for moments in of_piece.values():
                moments.close(piece)
            group = self.group_of(piece)
            merge_sums(whole, {_of_group(group, name): moments.to("cpu") for name, moments in of_piece.items()})
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

    def comparisons(self) -> dict[str, list[Comparison]]:
        """Return the comparisons of each model's blocks of heads: `baseline` and, with a mask, `masked`."""
        if self._found is None:
            with one_thread():
                self._found = {name: self._compare(name) for name in self.subject.models}
        return self._found

    def _compare(self, model: str) -> list[Comparison]:
        moments = self._moments(self.groups)
        for group in range(self.groups):
            if found := self.whole.get(_of_group(group, model)):  # a data set without units has none
                moments.merge(found, group=group)
        return list(compare(moments, self.variance, self.measures))

    def matrices(self) -> Arrays:
        """Return what `similarity.npz` holds: `[heads, heads]` over all heads, NaN where two were not compared.

        Names of the masked model begin with `masked_`, those of differences with `change_`.
        """
        if self._matrices is None:
            self._matrices = self._make_matrices()
        return self._matrices

    def _make_matrices(self) -> Arrays:
        found, axes = self.comparisons(), HeadAxes(self.subject.layout.heads_per_layer)
        arrays: Arrays = {"layer": axes.layer, "head": axes.head}
        for name, comparisons in found.items():
            arrays |= {prefixed(name, key): value for key, value in axes.matrices(comparisons).items()}
        if MASKED in found:
            blocks = [changes(*pair) for pair in zip(found[BASELINE], found[MASKED], strict=True)]
            for measure in self.measures:
                entries = [block[measure] for block in blocks]
                arrays[prefixed(CHANGE, measure)] = axes.spread_out(found[BASELINE], [entry.value for entry in entries])
                for field in ("error", "low", "high") if all(entry.spread for entry in entries) else ():
                    values = [getattr(entry.spread, field) for entry in entries]
                    arrays[prefixed(CHANGE, f"{measure}_{SPREAD[field]}")] = axes.spread_out(found[BASELINE], values)
        return arrays | self._facts(found[BASELINE], axes)

    def _facts(self, blocks: Sequence[Comparison], axes: HeadAxes) -> Arrays:
        """Return what the numbers were made of; later stages of a model may have fewer samples."""
        one = blocks[0]
        samples = [np.full(len(block.moments.dims), int(block.moments.own.samples)) for block in blocks]
        return {
            "images": np.asarray(one.moments.images),
            "samples": axes.spread_out(blocks, samples),
            "groups": np.asarray(one.groups),
            "variance": np.asarray(self.variance),
            "scope": np.asarray(self.moment_options.scope),
            "sampling": np.asarray(self.moment_options.sampling),
            "mask": np.asarray(self.subject.mask or ""),
        }

    def _moments(self, groups: int) -> Moments:
        layout, facts = self.subject.layout, self.subject.facts
        layers = [
            LayerHeads(layer.heads, layer.head_dim, own_prefix(fact))
            for layer, fact in zip(layout.layers, facts, strict=True)
        ]
        return Moments(layers, self.moment_options._replace(groups=groups), self.pairs)

    def _refuse_missing_samples(self) -> None:
        """Refuse samples that layers do not have, or do not have in common, before the first image.

        Raises:
            UsageError: With the reason.
        """
        facts, model = self.subject.facts, self.subject.layout.model
        without = [n for n, fact in enumerate(facts) if fact.outputs.pooled or not fact.outputs.class_token]
        if self.moment_options.sampling == "class" and without:
            raise UsageError(
                f"layers {without} of {model!r} have no class token among their queries: sample tokens, patches or "
                "mean, got class"
            )
        together: dict[str, list[tuple[int, ...]]] = {"all": [tuple(range(len(facts)))], "pairs": [*self.pairs]}
        for layers in together.get(self.moment_options.scope, []):
            tokens = {layer: _samples(facts[layer]) for layer in layers if 0 <= layer < len(facts)}
            if self.moment_options.sampling != "mean" and len(set(tokens.values())) > 1:
                raise UsageError(
                    f"layers of {model!r} with different token counts have no common tokens: compare their heads by "
                    f"the sampling mean, got {self.moment_options.sampling} with tokens by layer {tokens}"
                )


def _of_piece(piece: int, model: str) -> str:
    return f"{piece}/{model}"


def _of_group(group: int, model: str) -> str:
    return f"{group:02d}/{model}"


def own_prefix(fact: LayerFacts) -> int:
    """Return the leading tokens without a place among the outputs that `head_outputs` gives."""
    return 0 if fact.outputs.pooled or fact.outputs.window is not None else fact.outputs.prefix


def head_outputs(record: LayerRecord, fact: LayerFacts) -> Tensor:
    """Return head outputs `[images, tokens, heads, head_dim]`.

    Windows of known place are put back on the image without padding; others follow one after the other.
    """
    if fact.outputs.window is not None:
        return on_image(record.heads_out, fact.outputs)
    if record.windows > 1:
        return torch.unflatten(record.heads_out, 0, (-1, record.windows)).flatten(1, 2)
    return record.heads_out


def _samples(fact: LayerFacts) -> int:
    """Return the queries of an image."""
    grid = fact.outputs
    return own_prefix(fact) + grid.patches if grid.on_map else grid.windows * grid.tokens
