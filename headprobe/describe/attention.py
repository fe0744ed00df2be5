"""What every head attends to: attention statistics and offset maps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import BASELINE, CHANGE, MASKED, HeadStatistic, Observation, differences
from headprobe.metrics.attention.offsets import OffsetMaps
from headprobe.metrics.attention.reduction import Reduction, reduce_attention
from headprobe.metrics.attention.statistics import RATIOS, STATISTICS, AttentionStatistics, HeadTable
from headprobe.metrics.projection import output_norm_ratio
from headprobe.units.tree import NamedSums

MAPS = "_maps"  # of a model's offset maps among a unit's sums


class AttentionSums(HeadStatistic):
    """Attention statistics of every head (see `metrics.attention.reduction`) and, if wanted, their offset maps.

    Args:
        offset_maps: Also average each head's attention by the offset of key from query.
    """

    def __init__(self, offset_maps: bool = True) -> None:
        self.offset_maps = offset_maps

    def options(self) -> dict[str, Any]:
        """Return name and options."""
        return {"name": "attention", "offset_maps": self.offset_maps}

    def empty_sums(self) -> NamedSums:
        """Make empty sums for each model and, where there are two, for their differences image by image."""
        facts, heads = self.subject.facts, self.subject.layout.heads_per_layer
        grids, undefined = [fact.attention for fact in facts], [fact.undefined for fact in facts]
        models = self.subject.models
        sums: NamedSums = {
            name: AttentionStatistics(grids, heads, undefined) for name in models + ((CHANGE,) * (len(models) > 1))
        }
        if self.offset_maps:
            sums |= {name + MAPS: OffsetMaps(grids, heads) for name in models}
        return sums

    def observe(self, seen: Observation, sums: NamedSums) -> None:
        """Recompute the layer's attention weights and reduce them."""
        fact = self.subject.facts[seen.layer]
        found = seen.each(lambda record: describe_attention(record, fact, self.offset_maps))
        images = seen.records[0].images
        for name, reduction in zip(self.subject.models, found, strict=True):
            sums[name].update(seen.layer, images, reduction.values)
            if self.offset_maps:
                sums[name + MAPS].update(seen.layer, images, reduction.aligned)
        if len(found) > 1:
            baseline, masked = (reduction.values for reduction in found)
            sums[CHANGE].update(seen.layer, images, differences(masked, baseline, self.subject.device))

    def tables(self) -> dict[str, HeadTable]:
        """Return the statistics of `baseline` and, with a mask, of `masked` and their `change`."""
        whole = self.whole
        names = [name for name in (BASELINE, MASKED, CHANGE) if name in whole]
        # not compute(), which would ask the other processes again
        return {name: whole[name].table(whole[name].to_arrays()) for name in names}

    def maps(self) -> dict[str, list[NDArray[np.float64] | None]]:
        """Return each model's offset maps `[heads, 2h - 1, 2w - 1]` by layer, None for a layer without one."""
        whole = self.whole
        names = [name for name in (BASELINE, MASKED) if name + MAPS in whole]
        return {name: whole[name + MAPS].maps(whole[name + MAPS].to_arrays()) for name in names}

    def reasons(self) -> list[dict[str, str]]:
        """Return for every layer the statistics that it does not have, with the reasons."""
        metric, ours = self.empty_sums()[BASELINE], {*STATISTICS, *RATIOS}
        return [{name: why for name, why in layer.items() if name in ours} for layer in metric.reasons]


def describe_attention(record: LayerRecord, facts: LayerFacts, aligned: bool = False) -> Reduction:
    """Return a layer's attention statistics by image and head, for `AttentionStatistics.update`.

    Args:
        record: The layer's record.
        facts: What is known of the layer.
        aligned: Also sum the weights over images, for `OffsetMaps.update`.
    """
    norms = None
    if facts.projection is not None and record.values is not None and "value_weighted_attention" not in facts.undefined:
        norms = facts.projection.norms(record.values)
    reduction = Reduction({}, None)
    if record.attention is not None:
        reduction = reduce_attention(facts.attention, record.images, record.weights(), norms, aligned)
    if facts.projection is not None and "output_norm_ratio" not in facts.undefined and record.stream_before is not None:
        added = facts.projection.norms(record.projected.transpose(1, 2))
        reduction.values["output_norm_ratio"] = output_norm_ratio(added, record.stream_before, facts.outputs)
    return reduction
