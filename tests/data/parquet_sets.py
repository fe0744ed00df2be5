"""Small image datasets made on the spot, in the schema of the hub's, and what the tests read back from them."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.stream import BadImage, ImageBatch
from headprobe.errors import RunError, UsageError

CLASSES = 10
DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def png(number: int, size: tuple[int, int] = (20, 12)) -> bytes:
    """Return an image of one colour that tells which one it is, also after resizing."""
    return encoded(Image.new("RGB", size, (number // 256, number % 256, 77)))


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def number_of(pixels: Any) -> int:
    """Return which image these pixels `[channels, height, width]` are of."""
    red, green, blue = pixels[:, 0, 0].tolist()
    assert blue == 77
    return int(red) * 256 + int(green)


def features(label: Any = None) -> datasets.Features:
    return datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(num_classes=CLASSES)})


def table(cells: Sequence[Any], labels: Sequence[Any], label: Any = None) -> pa.Table:
    """Return a table of image cells (bytes or None) and labels."""
    images = [None if cell is None else {"bytes": cell, "path": f"img_{index}.png"} for index, cell in enumerate(cells)]
    return pa.table({"image": images, "label": list(labels)}, schema=features(label).arrow_schema)


def write_files(folder: Path, files: Sequence[Sequence[int]], split: str = "validation") -> Path:
    """Write one file for each list of row-group sizes; images are numbered through, labels are number % 10."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    number = 0
    for index, groups in enumerate(files):
        name = f"{split}-{index:05}-of-{len(files):05}.parquet"
        with pq.ParquetWriter(folder / "data" / name, features().arrow_schema) as writer:
            for size in groups:
                numbers = range(number, number + size)
                rows = table([png(n) for n in numbers], [n % CLASSES for n in numbers])
                writer.write_table(rows) if size else writer.write_batch(_no_rows())
                number += size
    return folder


def write_table(folder: Path, rows: pa.Table, name: str = "validation.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / name)
    return folder


def bound(path: Path | str, classes: int = CLASSES, **options: Any) -> ImageNetDataModule:
    """Return a data module that is ready to stream."""
    options = {"batch_size": 4, "num_workers": 0} | options
    data = ImageNetDataModule(path=str(path), **options)
    data.prepare_data()
    data.bind(DATA_CONFIG, classes)
    return data


def numbers(batches: Iterable[ImageBatch]) -> list[int]:
    """Return which images the batches hold, in order."""
    return [number_of(pixels) for batch in batches for pixels in batch.images]


@dataclass
class Outcome:
    """What became of a dataset: every good image's label and pixels by unit and row, and whatever else was said."""

    images: dict[tuple[str, int], tuple[int, bytes]] = field(default_factory=dict)
    bad: dict[tuple[str, int], BadImage] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def said(self) -> str:
        parts = [*(f"{bad.source}: {bad.reason}" for bad in self.bad.values()), *self.failures, self.refusal]
        return " | ".join(filter(None, parts))


def read_all(path: Path | str, classes: int = CLASSES, **options: Any) -> Outcome:
    """Read a whole dataset as a run would; a row that comes twice is an error, and so is a wrong number of rows."""
    outcome = Outcome()
    try:
        data = bound(path, classes, **options)
        batches = list(data.stream())
    except (UsageError, RunError) as error:
        outcome.refusal = str(error)
        return outcome
    for batch in batches:
        if batch.failure is not None:
            outcome.failures.append(batch.failure)
        for row, label, pixels in zip(batch.rows.tolist(), batch.labels.tolist(), batch.images, strict=True):
            assert (batch.name, row) not in outcome.images
            outcome.images[batch.name, row] = (label, pixels.numpy().tobytes())
        for bad in batch.bad:
            assert (batch.name, bad.row) not in outcome.bad.keys() | outcome.images.keys()
            outcome.bad[batch.name, bad.row] = bad
    if not outcome.failures:
        assert len(outcome.images) + len(outcome.bad) == data.expected_images
        assert sum(batch.last for batch in batches) == data.units
    return outcome


def _no_rows() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=features().arrow_schema)
