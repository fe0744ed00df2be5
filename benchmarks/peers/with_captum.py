"""Each single head masked with captum's LayerFeatureAblation, whose attributions are clean less masked correctness."""

from collections.abc import Callable

import torch
from captum.attr import LayerFeatureAblation  # type: ignore[import-not-found,import-untyped,unused-ignore]
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
    total,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one attribution of them for each layer."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        clean = total(scored(model(images), labels) for images, labels in data)
        scores = {BASELINE: clean}
        for layer, block in enumerate(model.blocks):
            heads, channels = block.attn.num_heads, block.attn.proj.in_features
            owner = (torch.arange(channels) * heads // channels).view(1, 1, channels)
            lost = torch.zeros(heads)
            for images, labels in data:

                def correct(given: Tensor, labels: Tensor = labels) -> Tensor:
                    logits = model(given)
                    hits: Tensor = logits.argmax(dim=1) == labels.repeat(len(logits) // len(labels))
                    return hits.float()

                effect = LayerFeatureAblation(correct, block.attn.proj).attribute(
                    images, layer_baselines=0, layer_mask=owner, attribute_to_layer_input=True
                )
                lost += effect[:, 0, :: channels // heads].sum(dim=0)
            scores |= {
                named(layer, head): Score(clean.right - int(lost[head]), clean.images, None) for head in range(heads)
            }
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
