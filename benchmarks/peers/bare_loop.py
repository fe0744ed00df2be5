"""One layer masked by a plain hook, images decoded as they come: what `test --mask-spec layer:L` is compared with."""

import sys
from collections.abc import Callable

from torch.utils.data import DataLoader

from benchmarks.peers.common import (
    BASELINE,
    Images,
    Score,
    Scores,
    Setting,
    attentions,
    build,
    layer_zeroed,
    main,
    scored,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: each batch decoded, then run once without and once with the mask."""
    layer = int(sys.argv[2])
    model = build(setting)
    warm(model, setting)
    masked = attentions(model)[layer]

    def loop() -> Scores:
        scores = {BASELINE: Score(), f"layer:{layer}": Score()}
        for images, labels in DataLoader(Images(setting), setting.batch, num_workers=setting.workers):
            scores[BASELINE] += scored(model(images), labels)
            with layer_zeroed(masked):
                scores[f"layer:{layer}"] += scored(model(images), labels)
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
