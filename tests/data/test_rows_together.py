"""Batches that hold whole groups of neighbouring rows, for ablations that need several images at once."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.sources.source import Chunk
from headprobe.data.stream import UnitStream
from headprobe.errors import RunError, UsageError
from tests.data.parquet_sets import CLASSES, DATA_CONFIG, numbers, write_files

SIZES = [5, 13, 4, 2, 9, 8, 17]


def together(path: Path, batch_size: int = 4, **options: Any) -> ImageNetDataModule:
    data = ImageNetDataModule(path=str(path), batch_size=batch_size, num_workers=0, **options)
    data.keep_together(4)
    data.bind(DATA_CONFIG, CLASSES)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("set"), [[size] for size in SIZES])


@pytest.mark.parametrize("options", [{}, {"max_images": 41}, {"calibration": "same"}], ids=["all", "some", "same"])
@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_batches_are_cut_at_groups_and_no_row_stands_alone(
    folder: Path, batch_size: int, options: dict[str, Any]
) -> None:
    data = together(folder, batch_size, **options)
    for unit, batches in itertools.groupby(data.stream(), key=lambda batch: batch.unit):
        sizes = [len(batch.rows) for batch in batches]
        rows = data.unit_sizes[unit] if data.unit_sizes else 0
        full, left = divmod(rows, batch_size)
        expected = [batch_size] * full + [left] * (left > 0)
        if left == 1 and full:
            expected[-2:] = [batch_size + 1]
        assert sizes == expected
    assert sum(len(batch.rows) for batch in data.stream()) == data.expected_images


def test_every_image_comes_once_with_its_own_row_and_source(folder: Path) -> None:
    data = together(folder)
    batches = list(data.stream())
    assert numbers(batches) == list(range(sum(SIZES)))
    assert [len(batch.rows) for batch in batches if batch.unit == 1] == [4, 4, 5]
    assert all(len(batch.sources) == len(batch.rows) == len(batch.labels) for batch in batches)
    assert [batch.last for batch in batches if batch.unit == 1] == [False, False, True]


class Counted:
    """A source of one unit whose number of rows nobody knows before it is read."""

    def __init__(self, rows: int) -> None:
        self.total = rows

    def chunks(self, unit: int, rows: int) -> Any:
        for first in range(0, self.total, rows):
            some = list(range(first, min(first + rows, self.total)))
            yield Chunk(some, some, [str(row) for row in some])


@given(rows=st.integers(0, 70), groups=st.integers(1, 9))
def test_rows_of_an_unknown_number_are_cut_in_the_same_way(rows: int, groups: int) -> None:
    source: Any = Counted(rows)
    nothing: Any = None
    stream = UnitStream(source, nothing, nothing, batch_size=4 * groups, todo=[0], together=4)
    stream._batch = lambda unit, numbers, chunk, last: (list(numbers), chunk.images, last)  # type: ignore[method-assign, assignment, return-value]
    found: list[Any] = list(stream)
    assert [row for numbers, _, _ in found for row in numbers] == list(range(rows))
    assert all(numbers == images for numbers, images, _ in found)
    assert [last for _, _, last in found] == [False] * (len(found) - 1) + [True]
    sizes = [len(numbers) for numbers, _, _ in found]
    assert all(size == 4 * groups for size in sizes[:-1])
    assert rows < 2 or 2 <= sizes[-1] <= 4 * groups + 1


@pytest.mark.parametrize("batch_size", [1, 6, 33])
def test_a_batch_size_that_cuts_groups_is_refused_with_the_remedy(folder: Path, batch_size: int) -> None:
    with pytest.raises(UsageError, match=rf"choose a --data.batch_size that is a multiple of 4, got {batch_size}$"):
        together(folder, batch_size)


def test_a_unit_of_one_row_is_refused_by_name(tmp_path: Path) -> None:
    write_files(tmp_path, [[4], [1]])
    with pytest.raises(RunError, match=r"validation-00001-of-00002.* gives one row only: take more .*, got 1 row$"):
        together(tmp_path)


def test_images_that_calibrate_are_cut_as_in_any_other_run(folder: Path) -> None:
    data = together(folder, calibration="half")
    data.calibrating = True
    assert all(len(batch.rows) <= 4 for batch in data.stream())
