"""Each layer masked by a plain hook: what the layer sweep of a Swin is compared with."""

from collections.abc import Callable

from benchmarks.peers.common import (
    BASELINE,
    Counts,
    Setting,
    attentions,
    batches,
    build,
    decoded,
    layer_zeroed,
    main,
    right,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Counts]:
    """Return the loop: images decoded once, then one pass over them for each layer."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Counts:
        data = batches(*decoded(setting), setting.batch)
        counts = {BASELINE: sum(right(model(images), labels) for images, labels in data)}
        for layer, attention in enumerate(attentions(model)):
            with layer_zeroed(attention):
                counts[f"layer:{layer}"] = sum(right(model(images), labels) for images, labels in data)
        return counts

    return loop


if __name__ == "__main__":
    main(prepared)
