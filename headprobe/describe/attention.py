"""What every head attends to: attention statistics and offset maps, and a few images with their maps."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import (
    HeadStatistic,
    Judged,
    Observation,
    Role,
    Subject,
    Undefined,
    by_layer_mean,
    by_reason,
    differences,
    prefixed,
)
from headprobe.describe.examples import ExampleMaps
from headprobe.errors import UsageError
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.attention.offsets import WITHOUT_MAP, OffsetMaps
from headprobe.metrics.attention.reduction import Reduction, reduce_attention
from headprobe.metrics.attention.statistics import RATIOS, STATISTICS, AttentionStatistics, HeadTable
from headprobe.metrics.projection import output_norm_ratio
from headprobe.text import counted
from headprobe.units.tree import Arrays, NamedSums

MAPS_SUFFIX = "_maps"  # in the names of sums, of a model's offset maps
EXAMPLES = "examples"  # the sums with a few images

MOST_EXAMPLES = 64
"""Images with maps, at most: each unit keeps as many until it is merged with others."""


class AttentionSums(HeadStatistic):
    """Attention statistics of every head (see `metrics.attention.reduction`) and, if wanted, their offset maps.

    Args:
        offset_maps: Also average each head's attention by the offset of key from query.
        examples: Also keep the baseline's attention on so many images (see `metrics.attention.examples`).

    Attributes:
        class_names: Names of the model's classes, "" for one without, for the examples; none where they are unknown.

    Raises:
        UsageError: Too many examples are wanted, or less than none.
    """

    def __init__(self, offset_maps: bool = True, examples: int = 4) -> None:
        if not 0 <= examples <= MOST_EXAMPLES:
            raise UsageError(f"HeadAttention.examples must be 0 for none, or up to {MOST_EXAMPLES}, got {examples}")
        self.offset_maps, self.examples = offset_maps, examples
        self.class_names: Sequence[str] = ()

    def options(self) -> dict[str, Any]:
        """Return name and options."""
        return {"name": "attention", "offset_maps": self.offset_maps, "examples": self.examples}

    def begin(self, subject: Subject) -> None:
        """Fit the statistic to a model, and find what each layer's map of an image is."""
        super().begin(subject)
        self._maps = ExampleMaps(subject)

    def empty_sums(self) -> NamedSums:
        """Make empty sums for each model and, where there are two, for their differences image by image."""
        facts, heads = self.subject.facts, self.subject.layout.heads_per_layer
        grids = [fact.attention for fact in facts]
        undefined = [fact.undefined for fact in facts]
        sums: NamedSums = {role: AttentionStatistics(grids, heads, undefined) for role in self.subject.roles}
        if self.offset_maps:
            sums |= {model + MAPS_SUFFIX: OffsetMaps(grids, heads) for model in self.subject.models}
        if self.examples:
            sums[EXAMPLES] = self._maps.empty(self.examples)
        return sums

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        """Recompute the layer's attention weights and reduce them."""
        fact = self.subject.facts[observation.layer]
        found = observation.each(lambda record: describe_attention(record, fact, self.offset_maps))
        images = observation.records[0].images
        for model, reduction in zip(self.subject.models, found, strict=True):
            sums[model].update(observation.layer, images, reduction.values)
            if self.offset_maps:
                sums[model + MAPS_SUFFIX].update(observation.layer, images, reduction.aligned)

        if len(found) > 1:
            baseline, masked = (reduction.values for reduction in found)
            sums[Role.CHANGE].update(observation.layer, images, differences(masked, baseline, self.subject.device))
        if self.examples:
            self._maps.observe(observation, sums[EXAMPLES])

    def judged(self, batch: Judged, sums: NamedSums) -> None:
        """Note what the examples of a batch are, and what the model takes them for."""
        if self.examples:
            self._maps.judged(batch, sums[EXAMPLES])

    def tables(self) -> dict[str, HeadTable]:
        """Return means and standard errors of every statistic."""
        found: dict[str, HeadTable] = {}
        for role in self.subject.roles:
            metric = self.whole[role]
            # Not compute(): it would wait for other processes, and these sums are of all processes already.
            found[role] = metric.table(metric.to_arrays())
        return found

    def maps(self) -> dict[str, list[FloatArray | None]]:
        """Return each model's offset maps `[heads, 2h - 1, 2w - 1]` by layer, None for a layer without one."""
        found: dict[str, list[FloatArray | None]] = {}
        for model in self.subject.models if self.offset_maps else ():
            metric = self.whole[model + MAPS_SUFFIX]
            found[model] = metric.maps(metric.to_arrays())
        return found

    def reasons(self) -> list[dict[str, str]]:
        """Return for every layer the statistics that it does not have, with the reasons."""
        metric, ours = self.empty_sums()[Role.BASELINE], {*STATISTICS, *RATIOS}
        return [{name: why for name, why in layer.items() if name in ours} for layer in metric.reasons]

    def columns(self) -> dict[str, Arrays]:
        """Return every statistic and its standard error."""
        found: dict[str, Arrays] = {}
        for role, table in self.tables().items():
            found[role] = {"images": table.images}
            for name, mean in table.mean.items():
                found[role] |= {name: mean, f"{name}_se": table.error[name]}
        return found

    def npz_files(self) -> dict[str, Arrays]:
        """Return the offset maps as `offset_maps.npz`, and the images with their maps as `examples.npz`."""
        arrays: Arrays = {}
        for model, maps in self.maps().items():
            for layer, values in enumerate(maps):
                if values is not None:
                    arrays[prefixed(model, f"layer_{layer:03d}")] = values
        examples = self._maps.arrays(self.whole[EXAMPLES], self.class_names) if self.examples else {}
        return {"offset_maps.npz": arrays, "examples.npz": examples}

    def undefined(self) -> Undefined:
        """Return the layers without a statistic, or without an offset map."""
        found = by_reason(self.reasons())
        maps = self.maps().get(Role.BASELINE, [])
        without = [layer for layer, values in enumerate(maps) if values is None]
        if without:
            found["offset_maps"] = {WITHOUT_MAP: without}
        if self.examples and self._maps.undefined():
            found[EXAMPLES] = self._maps.undefined()
        return found

    def note(self) -> str:
        """Return how many examples there are, where there are fewer than wanted."""
        images = len(self.whole[EXAMPLES]) if self.examples else 0
        if images == self.examples:
            return ""
        return f"Attention: examples.npz has {counted(images, 'image')}, as no others could be read"

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean distance and entropy."""
        table = self.tables()[Role.BASELINE]
        return {
            "distance px": by_layer_mean(table.layer, table.mean["attention_distance_px"]),
            "entropy nats": by_layer_mean(table.layer, table.mean["entropy_nats"]),
        }


def describe_attention(record: LayerRecord, facts: LayerFacts, aligned: bool = False) -> Reduction:
    """Return a layer's attention statistics by image and head, for `AttentionStatistics.update`.

    Args:
        record: The layer's record.
        facts: What is known of the layer.
        aligned: Also sum the weights over images, for `OffsetMaps.update`.
    """
    projection, undefined = facts.projection, facts.undefined
    norms = None
    if projection is not None and record.values is not None and "value_weighted_attention" not in undefined:
        norms = projection.norms(record.values)

    reduction = Reduction({}, None)
    if record.attention is not None:
        chunks = record.exponentials(facts.attention.prefix)
        reduction = reduce_attention(facts.attention, record.images, chunks, norms, aligned)

    if projection is not None and record.stream_before is not None and "output_norm_ratio" not in undefined:
        # [rows, tokens, heads, head dim] -> [rows, heads, tokens, head dim]
        added = projection.norms(record.projected.transpose(1, 2))
        reduction.values["output_norm_ratio"] = output_norm_ratio(added, record.stream_before, facts.outputs)
    return reduction
