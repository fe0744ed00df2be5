"""Writes one row per image and mask, for those who want their own statistics."""

from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from headprobe.callbacks.directory import run_directory
from headprobe.errors import RunError
from headprobe.metrics.accuracy import top_five
from headprobe.module import HeadProbe, StepResult
from headprobe.run.results import BASELINE

SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("label", pa.int32()),
        pa.field("mask", pa.dictionary(pa.int32(), pa.string())),
        pa.field("prediction", pa.int32()),
        pa.field("margin", pa.float32()),
        pa.field("nll", pa.float32()),
    ]
)
"""`margin` is the label's logit minus the largest other one (positive = right), `nll` is in nats."""


class RecordsWriter(lightning.Callback):
    """Writes `records/unit-00000.parquet`, one file per unit, so that no two processes write to one file."""

    def __init__(self) -> None:
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._directory = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer) / "records"

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append this batch's rows to its unit's file."""
        if not isinstance(pl_module, HeadProbe) or not isinstance(outputs, StepResult):
            return
        try:
            writer = self._writers.get(outputs.unit) or self._open(outputs.unit)
            writer.write_batch(_records(outputs, pl_module))
            if outputs.last:
                self._writers.pop(outputs.unit).close()
        except OSError as error:
            where = str(self._directory)
            raise RunError(f"cannot write records to {where!r} ({error}); make room and run again") from error

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close what a broken run left open."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _open(self, unit: int) -> pq.ParquetWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._writers[unit] = pq.ParquetWriter(self._directory / f"unit-{unit:05d}.parquet", SCHEMA)
        return self._writers[unit]


def _records(step: StepResult, probe: HeadProbe) -> pa.RecordBatch:
    """Return the rows of one batch, image by image under each mask in turn."""
    names = [BASELINE, *(named.name for named in probe.masks)]
    rows, images = step.logits.shape[:2]
    labels = step.labels.expand(rows, -1)
    own = step.logits.gather(-1, labels[..., None])[..., 0].float()
    others = step.logits.float().scatter(-1, labels[..., None], -torch.inf).amax(dim=-1)
    nll = -step.logits.double().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    numbers = probe.valid_classes if probe.valid_classes is not None else torch.arange(step.logits.shape[-1])
    columns = [
        torch.full((rows, images), step.unit),
        step.rows.cpu().expand(rows, -1),
        numbers[labels.cpu()],
        pa.DictionaryArray.from_arrays(_flat(torch.arange(rows)[:, None].expand(-1, images), pa.int32()), names),
        numbers[top_five(step.logits)[..., 0].cpu()],
        own - others,
        nll,
    ]
    arrays = [
        _flat(column, field.type) if isinstance(column, Tensor) else column
        for column, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def _flat(column: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.array(column.detach().cpu().flatten().numpy()).cast(kind)
