"""Takes a layer's record to what the metrics sum: attention statistics and frequency profiles."""

from torch import Tensor

from headprobe.backbone.facts import CONTRIBUTION, LayerFacts
from headprobe.backbone.layer_record import LayerRecord
from headprobe.metrics.projection import output_norm_ratio
from headprobe.metrics.reduction import Reduction, reduce_attention
from headprobe.metrics.spectrum import head_profiles, stream_profiles


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


def describe_spectrum(record: LayerRecord, facts: LayerFacts) -> dict[str, Tensor]:
    """Return a layer's frequency profiles by series, for `Spectra.update`; empty where its patches have no grid."""
    grid = facts.outputs
    if not grid.on_map:
        return {}
    profiles: dict[str, Tensor] = {}
    weight = None
    if facts.projection is not None and CONTRIBUTION not in facts.undefined:
        weight = facts.projection.weight.to(record.projected.device)
    if weight is not None and record.projected is record.heads_out:  # transformed once for both
        profiles["head"], profiles["contribution"] = head_profiles(record.heads_out, grid, (None, weight))
    else:
        profiles["head"] = head_profiles(record.heads_out, grid)[0]
        if weight is not None:
            profiles["contribution"] = head_profiles(record.projected, grid, (weight,))[0]
    if record.stream_before is not None:
        profiles["stream_before"] = stream_profiles(record.stream_before, grid)
    if record.stream_after is not None:
        profiles["stream_after"] = stream_profiles(record.stream_after, grid)
    return profiles
