"""Writes the files of a small run by hand, as `test` would: nothing is scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headprobe.callbacks.derived import write_derived
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.accuracy.scores import paired_scores
from headprobe.run.ablations import ablation_rows
from headprobe.run.load import calibration_of, read_files
from headprobe.run.results import (
    group_arrays,
    head_rows,
    variant_rows,
    write_arrays,
    write_masks,
    write_record,
    write_rows,
)

HEADS = (2, 2, 3)
IMAGES = 40


def write_run(folder: Path, specs: Sequence[str], ablations: Sequence[str] = ("zero",), **record: Any) -> Path:
    """Write the tables, `groups.npz` and `run.json` of random answers to 40 images under these masks.

    Further arguments are entries of `run.json`, and `seed`, of the random answers.
    """
    variants = expand_all([MaskSpec(spec) for spec in specs], HEADS, "tiny", Ablations(ablations))
    generator = torch.Generator().manual_seed(record.pop("seed", 0))
    metric = PairedAccuracy(len(variants), 6)
    logits = torch.randn(1 + len(variants), IMAGES, 6, generator=generator)
    metric.update(logits, torch.randint(0, 6, (IMAGES,), generator=generator), torch.arange(IMAGES))

    scores = paired_scores(metric.to_arrays())
    rows = variant_rows(variants, scores, rule := calibration_of({"data": {}, **record}))
    groups = group_arrays(rows, scores)
    write_rows(folder / "masks.csv", rows)
    write_masks(folder / "masks.json", variants)
    write_arrays(folder / "groups.npz", groups)
    if compared := ablation_rows(rows, groups, rule):
        write_rows(folder / "ablations.csv", compared)
    model = {"name": "tiny", "weights": None, "pretrained": False, "heads_per_layer": list(HEADS)}
    data = {"path": "digits", "split": "test"}
    write_record(folder, {"status": "done", "model": model, "data": data, "specs": list(specs), **record})
    for _ in write_derived(read_files(folder)):
        pass
    return folder


def keep_one_group(folder: Path) -> None:
    """Leave only the images of the first group in a run's `groups.npz`, as if the run had no others."""
    groups = read_files(folder).arrays("groups.npz")
    there = np.arange(len(groups["images"])) == np.flatnonzero(groups["images"])[0]
    groups |= {"images": there.astype(np.int64), **{name: groups[name] * there for name in ("nll", "top1_count")}}
    write_arrays(folder / "groups.npz", groups)


def write_heads(folder: Path, columns: Mapping[str, NDArray[Any]], mask: str = "", name: str = "heads.csv") -> None:
    """Write columns `[heads]` as `heads.csv`, the same for the baseline and, if there is one, a masked model."""
    images = {"images": np.full(sum(HEADS), IMAGES), **columns}
    write_rows(folder / name, head_rows(HEADS, {"none": images} | ({mask: images} if mask else {})))
