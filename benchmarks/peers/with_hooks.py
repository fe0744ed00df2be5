"""Each single head masked by a plain hook: what the sweep is compared with."""

from collections.abc import Callable

from benchmarks.peers.common import (
    BASELINE,
    Counts,
    Setting,
    attentions,
    batches,
    build,
    decoded,
    head_zeroed,
    main,
    named,
    right,
    single_heads,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Counts]:
    """Return the loop: images decoded once, then one pass over them for each mask."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Counts:
        data = batches(*decoded(setting), setting.batch)
        counts = {BASELINE: sum(right(model(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):
            with head_zeroed(attentions(model)[layer], head):
                counts[named(layer, head)] = sum(right(model(images), labels) for images, labels in data)
        return counts

    return loop


if __name__ == "__main__":
    main(prepared)
