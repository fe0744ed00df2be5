from pathlib import Path

import datasets
import pytest
import torch

from headprobe.data.stream import BadImage, ImageBatch
from tests.data.parquet_sets import bound, png, table, write_table

GOOD = png(7)


def only_batch(folder: Path, cells: list[bytes | None], labels: list[int | None]) -> ImageBatch:
    (batch,) = bound(write_table(folder, table(cells, labels)), batch_size=100).stream()
    return batch


def test_bad_rows_are_listed_with_their_place_and_left_out(tmp_path: Path) -> None:
    batch = only_batch(tmp_path, [GOOD, b"", GOOD, None, b"<html>", GOOD[:60], GOOD], [0, 1, 2, 3, 4, 5, 6])
    assert batch.rows.tolist() == batch.labels.tolist() == [0, 2, 6]
    assert [bad.row for bad in batch.bad] == [1, 3, 4, 5]
    assert all(bad.unit == 0 for bad in batch.bad)
    assert batch.bad[0] == BadImage(
        0, 1, "validation.parquet row group 0 (img_1.png)", "the image file is empty (0 bytes)"
    )
    reasons = " | ".join(bad.reason for bad in batch.bad)
    kinds = "(JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM)"
    assert f"there is no image in this row | not an image file of a kind that is read here {kinds} | " in reasons
    assert "truncated" in reasons.lower()


@pytest.mark.parametrize(
    ("label", "reason"),
    [(-1, "label -1 outside 0..9"), (None, "there is no label in this row")],
)
def test_bad_labels_are_listed(tmp_path: Path, label: int | None, reason: str) -> None:
    batch = only_batch(tmp_path, [GOOD, GOOD], [3, label])
    assert [(bad.row, bad.reason) for bad in batch.bad] == [(1, reason)]
    assert batch.labels.tolist() == [3]


def test_a_label_beyond_the_classes_is_listed(tmp_path: Path) -> None:
    rows = table([GOOD, GOOD], [999, 1000], datasets.Value("int64"))
    (batch,) = bound(write_table(tmp_path, rows), classes=1000, class_map="identity").stream()
    assert batch.labels.tolist() == [999]
    assert batch.bad[0].reason == "label 1000 outside 0..999"


def test_a_unit_of_bad_rows_alone_still_sends_its_last_batch(tmp_path: Path) -> None:
    batch = only_batch(tmp_path, [b"x", b"y"], [0, 1])
    assert batch.last
    assert batch.images.shape == (0, 3, 16, 16)
    assert len(batch.bad) == 2


def test_a_batch_moves_to_a_device_with_its_bookkeeping(tmp_path: Path) -> None:
    batch = only_batch(tmp_path, [GOOD, b"x"], [0, 1])
    moved = batch.to("meta")
    assert moved.images.device == moved.labels.device == torch.device("meta")
    assert moved.rows is batch.rows
    assert moved.bad == batch.bad
