"""Each single head masked with nnsight, by its documented edit of a module's input."""

from collections.abc import Callable

from nnsight import NNsight  # type: ignore[import-not-found,unused-ignore]

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
    total,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one trace of them for each mask."""
    model = build(setting)
    warm(model, setting)
    traced, size = NNsight(model), model.blocks[0].attn.proj.in_features // model.blocks[0].attn.num_heads

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(model(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):
            found = Score()
            for images, labels in data:
                with traced.trace(images):
                    traced.blocks[layer].attn.proj.input[:, :, head * size : (head + 1) * size] = 0
                    logits = traced.output.save()
                found += scored(logits, labels)
            scores[named(layer, head)] = found
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
