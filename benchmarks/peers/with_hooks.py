"""Each single head masked by a plain hook: what the sweep is compared with."""

from collections.abc import Callable

from benchmarks.peers.common import (
    BASELINE,
    Scores,
    Setting,
    attentions,
    batches,
    build,
    decoded,
    head_zeroed,
    main,
    named,
    scored,
    single_heads,
    total,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one pass over them for each mask."""
    model = build(setting)
    warm(model, setting)

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(model(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):
            with head_zeroed(attentions(model)[layer], head):
                scores[named(layer, head)] = total(scored(model(images), labels) for images, labels in data)
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
