"""The bundled digits: Parquet files of a known kind, read by pyarrow alone.

Hugging Face `datasets`, which reads all other Parquet files, takes a second of a run of seconds to load.
What is read is what `streamed` reads of a copy of the folder, down to the identity of the data.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from headprobe.data.sources.footer import label_digest, plan_units, read_footer
from headprobe.data.sources.source import NOT_READ, Chunk, LabelColumn, Request, Source, choose_split

SPLITS = ["train", "test"]


def open_bundled(request: Request, folder: Path) -> Source | None:
    """Open the bundled digits; None where columns, units or a configuration are asked for that are not their own.

    Raises:
        UsageError: There is no such split.
        RunError: The file is broken.
    """
    usual = Request(request.path, split=request.split, sizes=request.sizes, labelled=request.labelled)
    if request not in (usual, replace(usual, unit="row_group")) or request.split == ".":
        return None
    split = choose_split(request.split, SPLITS, request.shown)
    return BundledSource(folder.resolve() / f"{split}.parquet", split, request)


class BundledSource(Source):
    """One split; each row group of its file is a unit.

    Args:
        file: Its file.
        split: Its name.
        request: What the user wants to open.
    """

    def __init__(self, file: Path, split: str, request: Request) -> None:
        self._file, self._columns = file.as_posix(), list(request.columns.values())
        footer = read_footer(self._file)
        self._names, sizes = plan_units([footer], "row_group")
        self.units, self.unit_sizes, self.images = len(sizes), sizes, sum(sizes)
        features = json.loads(footer.schema.metadata[b"huggingface"])["info"]["features"]
        names = tuple(features[request.label_column]["names"])
        self.labels = LabelColumn("class", names, numbered=True) if request.labelled else NOT_READ
        self.identity = {
            "split": split,
            "revision": None,
            "unit": "row_group",
            "files": [footer.identity()],
            "labels_sha256": label_digest([self._file], request.label_column) if request.labelled else None,
        }

    def unit_name(self, unit: int) -> str:
        """Return the name of the file and of the row group that a unit is."""
        return self._names[unit]

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time."""
        table = pq.ParquetFile(self._file).read_row_group(unit, columns=self._columns)
        for start in range(0, len(table), rows):
            columns = [column.to_pylist() for column in table.slice(start, rows).select(self._columns).columns]
            images, labels = columns if len(columns) > 1 else (columns[0], [None] * len(columns[0]))
            yield Chunk(images, labels, [f"{self._names[unit]} ({cell['path']})" for cell in images])
