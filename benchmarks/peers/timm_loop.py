"""The loop of timm's validate.py, which the package does not hold: its loader, its model, its meters, its accuracy."""

from collections.abc import Callable

from timm.data import create_loader
from timm.utils import AverageMeter, accuracy
from torch import device, nn

from benchmarks.peers.common import BASELINE, Images, Score, Scores, Setting, build, main, warm


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: loss, top-1 and top-5 of the unmasked model, as validate.py computes them."""
    model = build(setting)
    warm(model, setting)
    criterion = nn.CrossEntropyLoss()

    def loop() -> Scores:
        loader = create_loader(
            Images(setting),
            **setting.config,
            batch_size=setting.batch,
            use_prefetcher=True,
            num_workers=setting.workers,
            persistent_workers=False,
            device=device("cpu"),
        )
        losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
        for images, target in loader:
            output = model(images)
            loss = criterion(output, target)
            acc1, acc5 = accuracy(output, target, topk=(1, min(5, setting.classes)))
            losses.update(loss.item(), images.size(0))
            top1.update(acc1.item(), images.size(0))
            top5.update(acc5.item(), images.size(0))
        return {BASELINE: Score(round(top1.sum / 100), top1.count, losses.sum)}

    return loop


if __name__ == "__main__":
    main(prepared)
