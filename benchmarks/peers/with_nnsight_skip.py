"""Each single head masked with nnsight by an expert: blocks before the mask are skipped, their outputs kept.

The outputs of all blocks but the last are kept for one batch at a time, so that memory stays bounded.
"""

from collections.abc import Callable
from typing import Any

from nnsight import NNsight  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from benchmarks.peers.common import (
    BASELINE,
    Score,
    Scores,
    Setting,
    batches,
    build,
    decoded,
    main,
    named,
    scored,
    single_heads,
    warm,
)


def kept_outputs(traced: Any, images: Tensor, blocks: int) -> tuple[list[Tensor], Tensor]:
    """Return what every block gives, and the logits."""
    kept: list[Tensor] = []
    with traced.trace(images):
        kept = [].save()  # type: ignore[attr-defined]  # nnsight gives every object inside a trace this method
        for block in range(blocks):
            kept.append(traced.blocks[block].output)
        logits = traced.output.save()
    return kept, logits


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then for each batch one trace for each mask."""
    model = build(setting)
    warm(model, setting)
    traced, size = NNsight(model), model.blocks[0].attn.proj.in_features // model.blocks[0].attn.num_heads
    heads = single_heads(model)

    def loop() -> Scores:
        scores = dict.fromkeys([BASELINE, *(named(*one) for one in heads)], Score())
        for images, labels in batches(*decoded(setting), setting.batch):
            kept, logits = kept_outputs(traced, images, len(model.blocks))
            scores[BASELINE] += scored(logits, labels)
            for layer, head in heads:
                with traced.trace(images):
                    for block in range(layer):
                        traced.blocks[block].skip(kept[block])
                    traced.blocks[layer].attn.proj.input[:, :, head * size : (head + 1) * size] = 0
                    logits = traced.output.save()
                scores[named(layer, head)] += scored(logits, labels)
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
