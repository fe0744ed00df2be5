"""Makes train.parquet and test.parquet from scikit-learn's digits: `python -m headprobe.data.digits.build`."""

import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

TEST_IMAGES_PER_CLASS = 50
ROWS_PER_GROUP = 100  # several units, so that several processes and workers have something to do
GREY_LEVELS = 16


def choose_test_rows(labels: Sequence[int]) -> set[int]:
    """Return the rows of the test split: in each class the rows with the smallest SHA-256 of their number.

    The choice is fixed for ever, and balanced.
    """
    rows = sorted(range(len(labels)), key=lambda row: hashlib.sha256(str(row).encode()).digest())
    chosen: set[int] = set()
    for digit in set(labels):
        of_digit = [row for row in rows if labels[row] == digit]
        chosen.update(of_digit[:TEST_IMAGES_PER_CLASS])
    return chosen


def to_png(pixels: NDArray[np.float64]) -> bytes:
    """Return one image `[8, 8]` with grey levels 0..16 as a greyscale PNG with levels 0..255."""
    grey = np.round(pixels * 255 / GREY_LEVELS).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def to_table(rows: Sequence[int], images: NDArray[np.float64], labels: Sequence[int]) -> pa.Table:
    """Return the rows in the schema of the hub's image datasets."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    cells = [{"bytes": to_png(images[row]), "path": f"digit_{row:04}.png"} for row in rows]
    columns = {"image": cells, "label": [labels[row] for row in rows]}
    return pa.table(columns, schema=features.arrow_schema)


def build(folder: Path) -> None:
    """Write both files into `folder`."""
    from sklearn.datasets import load_digits  # an extra: only this script needs it

    digits = load_digits()
    labels = [int(label) for label in digits.target]
    test = choose_test_rows(labels)
    splits = {
        "train": [row for row in range(len(labels)) if row not in test],
        "test": sorted(test),
    }
    for split, rows in splits.items():
        table = to_table(rows, digits.images, labels)
        # PNGs do not shrink further; without a codec the bytes depend on fewer libraries
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=ROWS_PER_GROUP, compression="none")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
