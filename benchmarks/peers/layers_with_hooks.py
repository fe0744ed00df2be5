"""Each layer masked by a plain hook: what the layer sweep of a Swin is compared with."""

from collections.abc import Callable

from benchmarks.peers.common import (
    BASELINE,
    Scores,
    Setting,
    attentions,
    batches,
    build,
    decoded,
    layer_zeroed,
    main,
    scored,
    total,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one pass over them for each layer."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(model(images), labels) for images, labels in data)}
        for layer, attention in enumerate(attentions(model)):
            with layer_zeroed(attention):
                scores[f"layer:{layer}"] = total(scored(model(images), labels) for images, labels in data)
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
