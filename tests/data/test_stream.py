import itertools
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from headprobe.errors import RunError, UsageError
from tests.data.parquet_sets import CLASSES, bound, features, number_of, numbers, png, table, write_files, write_table

FILES = [[5, 3], [0, 4], [], [1], [6, 6, 2]]  # a file and a row group without rows among them
TOTAL = 27
GROUPS = [5, 3, 0, 4, 1, 6, 6, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("set"), FILES)


@pytest.mark.parametrize("unit", ["row_group", "file"])
@pytest.mark.parametrize("processes", [1, 2, 3, 7, 16])
def test_every_image_comes_once_for_any_number_of_processes(folder: Path, unit: str, processes: int) -> None:
    data = bound(folder, unit=unit)
    seen = [numbers(data.stream(process, processes)) for process in range(processes)]
    assert sorted(itertools.chain(*seen)) == list(range(TOTAL))


@pytest.mark.parametrize("unit", ["row_group", "file"])
@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_every_image_comes_once_for_any_number_of_real_workers(
    folder: Path, unit: str, processes: int, workers: int
) -> None:
    data = bound(folder, unit=unit)
    streams = [data.stream(process, processes) for process in range(processes)]
    seen = [numbers(DataLoader(stream, batch_size=None, num_workers=workers)) for stream in streams]
    assert sorted(itertools.chain(*seen)) == list(range(TOTAL))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_every_image_comes_once_when_workers_start_from_nothing(folder: Path, start: str) -> None:
    loader = DataLoader(bound(folder).stream(), batch_size=None, num_workers=2, multiprocessing_context=start)
    assert sorted(numbers(loader)) == list(range(TOTAL))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_stay_inside_their_unit_and_number_its_rows(folder: Path, batch_size: int) -> None:
    first_of_unit = [sum(GROUPS[:unit]) for unit in range(len(GROUPS))]
    for batch in bound(folder, batch_size=batch_size).stream():
        assert len(batch.images) == len(batch.labels) == len(batch.rows) <= batch_size
        assert numbers([batch]) == [first_of_unit[batch.unit] + row for row in batch.rows.tolist()]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_each_unit_has_exactly_one_last_batch_and_it_comes_last(folder: Path, batch_size: int) -> None:
    batches = list(bound(folder, batch_size=batch_size).stream())
    for unit in range(len(GROUPS)):
        tags = [batch.last for batch in batches if batch.unit == unit]
        assert tags == [False] * (len(tags) - 1) + [True]


def test_labels_belong_to_their_images(folder: Path) -> None:
    for batch in bound(folder).stream():
        assert batch.labels.tolist() == [number % CLASSES for number in numbers([batch])]


def test_batches_have_the_promised_types_also_when_empty(folder: Path) -> None:
    for batch in bound(folder).stream():
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (3, 16, 16)
        assert batch.labels.dtype == batch.rows.dtype == torch.int64


def test_streaming_twice_gives_the_same_batches(folder: Path) -> None:
    stream = bound(folder).stream()
    for one, other in zip(stream, stream, strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.unit, one.last, one.rows.tolist()) == (other.unit, other.last, other.rows.tolist())


def test_todo_reads_only_these_units_in_any_split_over_processes(folder: Path) -> None:
    data = bound(folder)
    data.todo = [7, 0, 3]
    units = [[batch.unit for batch in data.stream(process, 2) if batch.last] for process in range(2)]
    assert units == [[7], [0, 3]]


def test_what_is_finished_is_not_read_again_until_all_is_wanted(folder: Path) -> None:
    data = bound(folder)
    data.continue_after(SimpleNamespace(rows={unit: GROUPS[unit] for unit in (0, 1, 2, 4, 5, 6)}))
    assert data.images_to_do == GROUPS[3] + GROUPS[7]
    assert [batch.unit for batch in data.stream() if batch.last] == [3, 7]
    data.continue_after(None)
    assert sorted(numbers(data.stream())) == list(range(TOTAL))


def test_nothing_to_do_gives_no_batch(folder: Path) -> None:
    data = bound(folder)
    data.todo = []
    assert list(data.stream()) == []


def test_a_unit_that_does_not_exist_is_refused(folder: Path) -> None:
    data = bound(folder)
    data.todo = [8]
    with pytest.raises(UsageError, match=r"units must be in 0\.\.7, got 8"):
        data.stream()


def test_unit_sizes_are_those_of_the_row_groups(folder: Path) -> None:
    data = bound(folder)
    assert data.unit_sizes == GROUPS
    assert data.expected_images == TOTAL


@pytest.mark.parametrize("unit", ["row_group", "file"])
@pytest.mark.parametrize("images", [1, 3, 8, 20, 26, 27, 1000])
def test_max_images_takes_as_many_rows_as_it_promises_and_numbers_them_truly(
    folder: Path, images: int, unit: str
) -> None:
    data = bound(folder, max_images=images, unit=unit)
    sizes = GROUPS if unit == "row_group" else [8, 4, 0, 1, 14]
    first = [sum(sizes[:number]) for number in range(len(sizes))]
    batches = list(data.stream())
    assert len(numbers(batches)) == data.expected_images == min(images, TOTAL)
    for number, share in enumerate(data.unit_sizes or []):
        mine = [batch for batch in batches if batch.unit == number]
        rows = [row for batch in mine for row in batch.rows.tolist()]
        assert rows == sorted(set(rows)) == list((data.unit_rows or [])[number])
        assert len(rows) == share
        # png() makes images of their own number, whatever the stream says
        assert numbers(mine) == [first[number] + row for row in rows]
        assert [batch.last for batch in mine] == [False] * (len(mine) - 1) + [True]
        assert all(len(batch.images) == 4 for batch in mine[:-1])


@pytest.mark.parametrize("order", ["sorted", "in turn"])
@pytest.mark.parametrize("groups", [[200], [20] * 10, [2] * 100])
def test_max_images_takes_every_class_of_sorted_rows_and_of_rows_in_turn(
    tmp_path: Path, groups: list[int], order: str
) -> None:
    labels = [row // 20 if order == "sorted" else row % CLASSES for row in range(200)]
    with pq.ParquetWriter(tmp_path / "validation.parquet", features().arrow_schema) as writer:
        for number, size in enumerate(groups):
            rows = range(number * size, (number + 1) * size)
            writer.write_table(table([png(row) for row in rows], [labels[row] for row in rows]))
    taken = [label for batch in bound(tmp_path, max_images=40).stream() for label in batch.labels.tolist()]
    counts = [taken.count(label) for label in range(CLASSES)]
    assert sum(counts) == 40
    if order == "sorted":
        assert counts == [4] * CLASSES
    else:  # at equal distances, 5 rows, there would be two classes
        assert sum(count > 0 for count in counts) >= 8, counts


def test_max_images_of_any_number_of_processes_are_the_same(folder: Path) -> None:
    data = bound(folder, max_images=15)
    alone = sorted(numbers(data.stream()))
    assert len(alone) == 15
    for processes in (2, 3, 8):
        seen = [numbers(data.stream(process, processes)) for process in range(processes)]
        assert sorted(itertools.chain(*seen)) == alone


def test_the_plan_of_units_does_not_depend_on_the_files_being_read_through_a_glob(folder: Path) -> None:
    data = bound(f"{folder}/data/*.parquet")
    assert data.unit_sizes == GROUPS
    assert sorted(numbers(data.stream())) == list(range(TOTAL))


def test_a_folder_whose_name_looks_like_a_glob_is_read_file_by_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set [1]", [[3]])
    file = folder / "data" / "validation-00000-of-00001.parquet"
    assert numbers(bound(file).stream()) == [0, 1, 2]


def test_extra_columns_are_ignored(tmp_path: Path) -> None:
    rows = table([b"x"] * 3, range(3)).append_column("size", [[1, 2, 3]])
    assert sum(len(batch.bad) for batch in bound(write_table(tmp_path, rows)).stream()) == 3


def test_a_broken_file_is_named_before_anything_is_scored(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [[3], [3]])
    (folder / "data" / "validation-00001-of-00002.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"validation-00001-of-00002\.parquet cannot be read as Parquet: .*0 bytes"):
        bound(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_damaged_inside_arrives_as_a_failure_that_names_it(tmp_path: Path, workers: int) -> None:
    folder = write_files(tmp_path, [[40], [40]])
    file = folder / "data" / "validation-00001-of-00002.parquet"
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # the footer stays whole
    file.write_bytes(content)
    data = bound(folder, num_workers=workers)
    batches = list(data.test_dataloader())
    failures = [batch.failure for batch in batches if batch.failure]
    assert len(failures) == 1
    assert "validation-00001-of-00002.parquet row group 0 (unit 1) cannot be read" in failures[0]
    assert sorted(set(numbers(batches)) & set(range(40))) == list(range(40))
    assert not any(batch.last for batch in batches if batch.unit == 1)


def test_number_of_reads_back_what_png_wrote(folder: Path) -> None:
    batch = next(iter(bound(folder).stream()))
    assert [number_of(pixels) for pixels in batch.images] == [0, 1, 2, 3]
