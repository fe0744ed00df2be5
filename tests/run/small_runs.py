"""Writes the files of a small run by hand, as `test` would: nothing is scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec, Variant, expand_all
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.accuracy.scores import paired_scores
from headprobe.run.results import head_rows, variant_rows, write_masks, write_record, write_rows

HEADS = (2, 2, 3)
IMAGES = 40


def write_run(
    folder: Path, specs: Sequence[str], ablations: Sequence[str] = ("zero",), draws: Sequence[int] = (0,), **record: Any
) -> Path:
    """Write `masks.csv`, `masks.json` and `run.json` of random answers to 40 images under these masks."""
    masks = expand_all([MaskSpec(spec) for spec in specs], HEADS, "tiny", Ablations(ablations))
    variants = [Variant(one.mask, one.ablation, draw) for one in masks for draw in draws]
    generator = torch.Generator().manual_seed(0)
    metric = PairedAccuracy(len(variants), 6)
    logits = torch.randn(1 + len(variants), IMAGES, 6, generator=generator)
    metric.update(logits, torch.randint(0, 6, (IMAGES,), generator=generator), torch.arange(IMAGES))

    write_rows(folder / "masks.csv", variant_rows(variants, paired_scores(metric.to_arrays())))
    write_masks(folder / "masks.json", variants)
    model = {"name": "tiny", "weights": None, "pretrained": False, "heads_per_layer": list(HEADS)}
    data = {"path": "digits", "split": "test"}
    write_record(folder, {"status": "done", "model": model, "data": data, "specs": list(specs), **record})
    return folder


def write_heads(folder: Path, columns: Mapping[str, NDArray[Any]], mask: str = "", name: str = "heads.csv") -> None:
    """Write columns `[heads]` as `heads.csv`, the same for the baseline and, if there is one, a masked model."""
    images = {"images": np.full(sum(HEADS), IMAGES), **columns}
    write_rows(folder / name, head_rows(HEADS, {"none": images} | ({mask: images} if mask else {})))
