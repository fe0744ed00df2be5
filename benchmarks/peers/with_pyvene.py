"""Each single head masked with pyvene: an intervention on the input of the output projection."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyvene  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from benchmarks.peers.common import (
    BASELINE,
    Scores,
    Setting,
    batches,
    build,
    decoded,
    main,
    named,
    scored,
    single_heads,
    total,
    warm,
)


def zeroing(head: int, size: int) -> Callable[[Tensor, Any], Tensor]:
    """Return an intervention that zeroes the channels of one head."""

    def zero(base: Tensor, _: Any) -> Tensor:
        heads = base.clone()
        heads[..., head * size : (head + 1) * size] = 0
        return heads

    return zero


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one intervened pass over them for each mask."""
    model = build(setting)
    warm(model, setting)
    model.config = SimpleNamespace(to_dict=dict)  # pyvene asks every model for one
    size = model.blocks[0].attn.proj.in_features // model.blocks[0].attn.num_heads

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(model(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):
            place = {"component": f"blocks[{layer}].attn.proj.input", "intervention": zeroing(head, size)}
            masked = pyvene.IntervenableModel(place, model=model)
            scores[named(layer, head)] = total(scored(masked(base={"x": images})[1], labels) for images, labels in data)
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
