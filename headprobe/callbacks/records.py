"""Writes one row per image and variant, for statistics of your own, and where each image is from."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from headprobe.callbacks.identity import run_directory
from headprobe.callbacks.resume import resume_callback
from headprobe.errors import HeadprobeWarning
from headprobe.files import cannot_write, partial_path, writing
from headprobe.masks.spec import NONE
from headprobe.metrics.accuracy.paired_accuracy import top_five
from headprobe.metrics.features import of_images
from headprobe.module import AfterBatch, HeadProbe, StepResult
from headprobe.text import counted

SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("label", pa.int32()),
        pa.field("mask", pa.dictionary(pa.int32(), pa.string())),
        pa.field("ablation", pa.dictionary(pa.int32(), pa.string())),
        pa.field("draw", pa.int32()),
        pa.field("prediction", pa.int32()),
        pa.field("margin", pa.float32()),
        pa.field("nll", pa.float32()),
        pa.field("feature_cosine", pa.float32()),
        pa.field("feature_distance", pa.float32()),
        pa.field("source", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""`margin` is the label's logit minus the largest other one, `nll` is in nats. An image is right where the prediction
is its label. With a NaN or infinite logit there is no prediction (null), as in the counts, and no margin (NaN). Without
a classifier there is no label, prediction, margin and NLL; without a feature, or where it is NaN, no cosine.
"""

IMAGES = pa.schema(
    [
        pa.field("unit", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("source", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("reason", pa.string()),
    ]
)
"""The columns of `images.parquet`, a row per image. One that could not be used has a `reason` and no label."""


class RecordsWriter(AfterBatch):
    """Writes `records/unit-00000.parquet`, one file per unit, so that no two processes write to one file.

    The files lie beside the sums of their units, which several sessions may finish. At the end of the last one they are
    put among its results, with `images.parquet`, which lists every image once. Stands before `Resume`: a unit is
    finished only with its records.
    """

    keeps_records = True

    def __init__(self) -> None:
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._directory = self._results = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory."""
        self._results = run_directory(trainer) / "records"

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the units' directory."""
        resume = resume_callback(trainer)
        self._directory = resume.store.records if resume is not None and resume.store is not None else self._results

    def after_batch(self, trainer: lightning.Trainer, probe: HeadProbe, step: StepResult, batch: Any) -> None:
        """Append this batch's rows to its unit's file."""
        try:
            writer = self._writers.get(step.unit) or self._open(step.unit)
            writer.write_batch(_records(step, probe, batch.sources))
            if step.last:
                self._finish(step.unit)
        except OSError as error:
            raise cannot_write(self._directory, error) from error

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the records of all units among the results: as links, which take no room, where the disk can."""
        if not trainer.is_global_zero:
            return
        found = sorted(self._directory.glob("unit-*.parquet"))
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            for file in found:
                _link_or_copy(file, self._results / file.name)
        except OSError as error:
            raise cannot_write(self._results, error) from error
        bad = pl_module.coverage.bad if isinstance(pl_module, HeadProbe) and pl_module.coverage else []
        write_images(found, bad, self._results.parent / "images.parquet")

        missing = trainer.datamodule.units - len(found)  # type: ignore[attr-defined]
        if missing:
            lightning.pytorch.utilities.rank_zero_warn(
                f"the records of {counted(missing, 'unit')} are not on this machine's disk: they are where the "
                f"processes ran that scored these units, in {self._directory} there; images.parquet lacks their images",
                category=HeadprobeWarning,
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close what a broken run left open."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _open(self, unit: int) -> pq.ParquetWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._writers[unit] = pq.ParquetWriter(self._partial(unit), SCHEMA)
        return self._writers[unit]

    def _finish(self, unit: int) -> None:
        self._writers.pop(unit).close()
        self._partial(unit).replace(self._directory / f"unit-{unit:05d}.parquet")

    def _partial(self, unit: int) -> Path:
        return partial_path(self._directory / f"unit-{unit:05d}.parquet")


def _link_or_copy(file: Path, place: Path) -> None:
    if place.exists() and place.samefile(file):
        return
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def write_images(records: Sequence[Path], bad: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write which image each row of the records is.

    Args:
        records: The records' files, one of each unit.
        bad: Rows that could not be used: `unit`, `row`, `source`, `reason`.
        path: The file to write.
    """
    with writing(path) as out, pq.ParquetWriter(out, IMAGES) as writer:
        for file in records:
            table = pq.read_table(file, columns=["unit", "row", "source", "label", "ablation"])
            baseline = table.filter(pc.equal(table["ablation"].cast(pa.string()), NONE)).drop_columns(["ablation"])
            reasons = pa.nulls(len(baseline), pa.string())
            writer.write_table(baseline.append_column("reason", reasons).cast(IMAGES))
        if bad:
            unread = [{**row, "source": _text(row["source"]), "reason": _text(row["reason"])} for row in bad]
            writer.write_table(pa.Table.from_pylist(unread, schema=IMAGES))


def _records(step: StepResult, probe: HeadProbe, sources: list[str]) -> pa.RecordBatch:
    """Return the rows of one batch, image by image under each variant in turn, the baseline first."""
    # All tensors below are [1 + variants, images], the baseline first.
    count, images = step.logits.shape[:2]
    scored = _scored(step, probe) if probe.labelled else {}
    moved = _moved(step) if step.features.shape[-1] else {}
    numbers = torch.arange(count)[:, None].expand(-1, images)  # of each row's variant, the baseline's 0
    draws = torch.tensor([0, *(variant.draw for variant in probe.variants)])
    columns = {
        "unit": torch.full((count, images), step.unit),
        "row": step.rows.cpu().expand(count, -1),
        "mask": _named(numbers, [NONE, *(variant.mask.name for variant in probe.variants)]),
        "ablation": _named(numbers, [NONE, *(variant.ablation for variant in probe.variants)]),
        "draw": draws[numbers],
        "source": _named(torch.arange(images).expand(count, -1), [_text(source) for source in sources]),
        **scored,
        **moved,
    }
    arrays: list[pa.Array] = []
    for field in SCHEMA:
        column = columns.get(field.name)
        if column is None:
            arrays.append(pa.nulls(count * images, field.type))
        else:
            arrays.append(_flat(column, field.type) if isinstance(column, Tensor) else column)
    return pa.record_batch(arrays, schema=SCHEMA)


def _scored(step: StepResult, probe: HeadProbe) -> dict[str, Tensor | pa.Array]:
    """Return the columns that need labels, `[1 + variants, images]` each."""
    labels = step.labels.expand(len(step.logits), -1)
    own = step.logits.gather(-1, labels[..., None])[..., 0].float()
    others = step.logits.float().scatter(-1, labels[..., None], -torch.inf).amax(dim=-1)  # largest other logit
    nll = -step.logits.double().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    finite = step.logits.isfinite().all(dim=-1)
    classes = probe.valid_classes if probe.valid_classes is not None else torch.arange(step.logits.shape[-1])
    prediction = _flat(classes[top_five(step.logits)[..., 0].cpu()], SCHEMA.field("prediction").type)
    return {
        "label": classes[labels.cpu()],
        "prediction": pc.if_else(_flat(finite, pa.bool_()), prediction, None),
        "margin": torch.where(finite, own - others, torch.nan),
        "nll": nll,
    }


def _moved(step: StepResult) -> dict[str, pa.Array]:
    """Return the columns of features; null where they are not defined."""
    features = step.features.cpu().double()
    found = of_images(features, features[0])
    known = _flat(found.counts, pa.bool_())
    values = {"feature_cosine": 1 - found.away, "feature_distance": found.distance}
    return {name: pc.if_else(known, _flat(value, pa.float32()), None) for name, value in values.items()}


def _text(name: str) -> str:
    """Return the name of a file as text: bytes in it that are none are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _named(numbers: Tensor, names: list[str]) -> pa.DictionaryArray:
    """Return names by number, as a dictionary: each name is kept once."""
    distinct = list(dict.fromkeys(names))
    codes = torch.tensor([distinct.index(name) for name in names])
    return pa.DictionaryArray.from_arrays(_flat(codes[numbers], pa.int32()), distinct)


def _flat(column: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.array(column.detach().cpu().flatten().numpy()).cast(kind)
