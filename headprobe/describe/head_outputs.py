"""The outputs of heads as samples that can be compared: tokens of the same images, in the same order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_facts import LayerFacts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import Subject
from headprobe.errors import UsageError
from headprobe.metrics.similarity.head_blocks import Sampling, Scope
from headprobe.metrics.spectrum.spectra import on_image


def head_outputs(record: LayerRecord, fact: LayerFacts) -> Tensor:
    """Return head outputs `[images, tokens, heads, head_dim]`.

    Windows of known place are put back on the image without padding; others follow one after the other.
    """
    if fact.outputs.window is not None:
        return on_image(record.heads_out, fact.outputs)
    if record.windows > 1:
        # [images * windows, tokens, heads, head dim] -> [images, windows * tokens, heads, head dim]
        return torch.unflatten(record.heads_out, 0, (-1, record.windows)).flatten(1, 2)
    return record.heads_out


def own_prefix(fact: LayerFacts) -> int:
    """Return the leading tokens without a place among the outputs that `head_outputs` gives."""
    return 0 if fact.outputs.pooled or fact.outputs.window is not None else fact.outputs.prefix


def refuse_missing_samples(
    subject: Subject, scope: Scope, sampling: Sampling, pairs: Sequence[tuple[int, int]]
) -> None:
    """Refuse samples that layers do not have, or do not have in common, before the first image.

    Raises:
        UsageError: With the reason.
    """
    facts, model = subject.facts, subject.layout.model
    without = [n for n, fact in enumerate(facts) if fact.outputs.pooled or not fact.outputs.class_token]
    if sampling == "class" and without:
        raise UsageError(
            f"layers {without} of {model!r} have no class token among their queries: sample tokens, patches or "
            "mean, got class"
        )
    if scope == "within" or sampling == "mean":
        return

    together = [tuple(range(len(facts)))] if scope == "all" else pairs
    for layers in together:
        tokens = {layer: _tokens(facts[layer]) for layer in layers if 0 <= layer < len(facts)}
        if len(set(tokens.values())) > 1:
            raise UsageError(
                f"layers of {model!r} with different token counts have no common tokens: compare their heads by "
                f"the sampling mean, got {sampling} with tokens by layer {tokens}"
            )


def _tokens(fact: LayerFacts) -> int:
    """Return how many tokens of an image `head_outputs` gives."""
    grid = fact.outputs
    return own_prefix(fact) + grid.patches if grid.on_map else grid.windows * grid.tokens
