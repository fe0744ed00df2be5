"""Drives a HeadProbe over images without Lightning, and builds small ones with perturbed weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headprobe.data.stream import ImageBatch
from headprobe.describe.base import HeadStatistic
from headprobe.module import HeadProbe
from tests.conftest import TINY, perturbed


def tiny_probe(kind: str, **options: object) -> HeadProbe:
    """Build a HeadProbe around one of the tiny models of `tests.conftest`, its options changed by `options`."""
    name, known = TINY[kind]
    return small_probe(name, **{**known, **options})


def small_probe(name: str, **options: object) -> HeadProbe:
    """Build a HeadProbe around a timm model with perturbed random weights and 10 classes; its heads look sharply."""
    torch.manual_seed(0)
    probe = HeadProbe(name, pretrained=False, num_classes=10, options=dict(options)).eval()
    perturbed(probe.backbone)
    with torch.no_grad():
        for path, parameter in probe.backbone.named_parameters():
            if path.endswith(("qkv.weight", "q_proj.weight")):
                parameter[: parameter.shape[1]] *= 8  # the queries: otherwise all attention would be uniform
    return probe


def noise(probe: HeadProbe, images: int, seed: int = 0) -> Tensor:
    """Draw uint8 images of noise, a random colour and contrast each, in the size that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    size = probe.data_config["input_size"]
    colour = 60 + 140 * torch.rand(images, size[0], 1, 1, generator=generator)
    contrast = 10 + 50 * torch.rand(images, 1, 1, 1, generator=generator)
    drawn = colour + contrast * torch.randn(images, *size, generator=generator)
    return drawn.clamp(0, 255).to(torch.uint8)


def prepare(
    probe: HeadProbe, statistics: Sequence[HeadStatistic], specs: Sequence[str] = (), units: int = 1, batch: int = 16
) -> None:
    """Do all that comes before the first image."""
    probe.choose_masks(list(specs))
    probe.statistics = tuple(statistics)
    probe.begin_units(units)
    probe.plan_passes(batch)
    probe.observe_heads()


def feed(probe: HeadProbe, images: Tensor, sizes: Sequence[int], batch: int = 16) -> None:
    """Send images in units of these sizes, each unit in batches; a unit may be of size 0. Then add them up."""
    starts = np.cumsum([0, *sizes])
    for unit, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        for first in range(0, max(size, 1), batch):
            rows = torch.arange(first, min(first + batch, size))
            labels = torch.zeros(len(rows), dtype=torch.int64)
            last = first + batch >= size
            with torch.inference_mode():
                probe.test_step(ImageBatch(images[start + rows], labels, unit, rows, last), 0)
    assert probe.unit_sums is not None
    probe.unit_sums.whole()


def describe(
    probe: HeadProbe,
    statistics: Sequence[HeadStatistic],
    images: Tensor,
    specs: Sequence[str] = (),
    units: int | Sequence[int] = 1,
    batch: int = 16,
) -> None:
    """Describe the heads of a model on uint8 images `[images, channels, height, width]`.

    Args:
        probe: The model.
        statistics: What to collect; they hold the numbers afterwards.
        specs: Masks; a single one is described too.
        units: Number of units, as equal as can be, or the size of each.
        batch: Images per batch.
    """
    shares = [len(part) for part in torch.arange(len(images)).tensor_split(units)] if isinstance(units, int) else units
    prepare(probe, statistics, specs, len(shares), batch)
    feed(probe, images, list(shares), batch)


def normalised(probe: HeadProbe, images: Tensor) -> Any:
    """Return images as the model takes them, by timm's recipe and in float64 numpy."""
    config = probe.data_config
    mean, deviation = (np.reshape(config[name], (-1, 1, 1)) for name in ("mean", "std"))
    return (images.numpy().astype(np.float64) / 255 - mean) / deviation
