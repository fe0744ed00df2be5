"""Each single head masked with nnsight, by its documented edit of a module's input."""

from collections.abc import Callable

from nnsight import NNsight  # type: ignore[import-not-found,unused-ignore]

from benchmarks.peers.common import (
    BASELINE,
    Counts,
    Setting,
    batches,
    build,
    decoded,
    main,
    named,
    right,
    single_heads,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Counts]:
    """Return the loop: images decoded once, then one trace of them for each mask."""
    model = build(setting)
    warm(model, setting)
    traced, size = NNsight(model), model.blocks[0].attn.proj.in_features // model.blocks[0].attn.num_heads

    def loop() -> Counts:
        data = batches(*decoded(setting), setting.batch)
        counts = {BASELINE: sum(right(model(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):
            found = 0
            for images, labels in data:
                with traced.trace(images):
                    traced.blocks[layer].attn.proj.input[:, :, head * size : (head + 1) * size] = 0
                    logits = traced.output.save()
                found += right(logits, labels)
            counts[named(layer, head)] = found
        return counts

    return loop


if __name__ == "__main__":
    main(prepared)
