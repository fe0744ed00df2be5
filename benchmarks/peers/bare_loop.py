"""One layer masked by a plain hook, images decoded as they come: what `test --mask-spec layer:L` is compared with."""

import sys
from collections.abc import Callable

from torch.utils.data import DataLoader

from benchmarks.peers.common import (
    BASELINE,
    Counts,
    Images,
    Setting,
    attentions,
    build,
    layer_zeroed,
    main,
    right,
    warm,
)


def prepared(setting: Setting) -> Callable[[], Counts]:
    """Return the loop: each batch decoded, then run once without and once with the mask."""
    layer = int(sys.argv[2])
    model = build(setting)
    warm(model, setting)
    masked = attentions(model)[layer]

    def loop() -> Counts:
        counts = {BASELINE: 0, f"layer:{layer}": 0}
        for images, labels in DataLoader(Images(setting), setting.batch, num_workers=setting.workers):
            counts[BASELINE] += right(model(images), labels)
            with layer_zeroed(masked):
                counts[f"layer:{layer}"] += right(model(images), labels)
        return counts

    return loop


if __name__ == "__main__":
    main(prepared)
