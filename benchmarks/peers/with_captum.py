"""Each single head masked with captum's LayerFeatureAblation, whose attributions are clean less masked correctness."""

from collections.abc import Callable

import torch
from captum.attr import LayerFeatureAblation  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from benchmarks.peers.common import BASELINE, Counts, Setting, batches, build, decoded, main, named, right, warm


def prepared(setting: Setting) -> Callable[[], Counts]:
    """Return the loop: images decoded once, then one attribution of them for each layer."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Counts:
        data = batches(*decoded(setting), setting.batch)
        clean = sum(right(model(images), labels) for images, labels in data)
        counts = {BASELINE: clean}
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
            counts |= {named(layer, head): clean - int(lost[head]) for head in range(heads)}
        return counts

    return loop


if __name__ == "__main__":
    main(prepared)
