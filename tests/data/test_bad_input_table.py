"""Every kind of bad input that was ever seen: counted right, or named with its file, its row and the reason.

Three files; what is wrong is in the second. The hub's own failures are in test_hub.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from headprobe.data.sources.footer import plan_units
from tests.data.parquet_sets import CLASSES, encoded, features, png, read_all, table
from tests.data.test_decode import by_hand, by_timm, noise

ROWS = 4  # of each file, numbered through
FILES = ["a.parquet", "b.parquet", "c.parquet"]
BAD_FILE, BAD_ROW = "b.parquet row group 0", 2


def rows_of(file: int) -> pa.Table:
    numbers = range(file * ROWS, (file + 1) * ROWS)
    return table([png(number) for number in numbers], [number % CLASSES for number in numbers])


def write_set(folder: Path, second: pa.Table | None = None) -> Path:
    for file, name in enumerate(FILES):
        pq.write_table(second if second is not None and file == 1 else rows_of(file), folder / name)
    return folder / "*.parquet"


def with_row(image: Any = b"", label: Any = 3) -> pa.Table:
    """Return the second file with another image and label in one row."""
    whole = rows_of(1).to_pylist()
    whole[BAD_ROW] = {"image": image if image is None or isinstance(image, dict) else {"bytes": image}, "label": label}
    return pa.Table.from_pylist(whole, schema=features().arrow_schema)


JPEG = encoded(noise(size=(64, 48)), "jpeg")
PNG = encoded(noise(size=(64, 48)))
BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "truncated JPEG": (JPEG[:-500], "truncated"),
    "JPEG cut inside its header": (JPEG[:200], "."),
    "truncated PNG": (PNG[:-500], "truncated"),
    "empty bytes": (b"", r"empty \(0 bytes\)"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "not an image file"),
    "HTML": (b"<!DOCTYPE html><html>Too many requests</html>", "not an image file"),
    "no image": (None, "no image in this row"),
    "a path without bytes": ({"bytes": None, "path": "../../private.png"}, "only a path, which is not followed"),
    "PNG damaged in the middle": (PNG[:900] + b"\0\0\0\0" + PNG[904:], "."),
    "20000 x 20000 PNG": (by_hand(20_000, 20_000), "exceeds limit|at most"),
    "13000 x 13000 PNG": (by_hand(13_000, 13_000), "at most 89,478,485 pixels, got 13000 x 13000"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image file"),
}
EXIF = Image.Exif()
EXIF[0x0112] = 6
GOOD_IMAGES: dict[str, bytes] = {
    "trailing garbage": JPEG + b"garbage" * 9,
    "progressive JPEG": encoded(noise(), "jpeg", progressive=True),
    "EXIF orientation": encoded(noise(), "jpeg", exif=EXIF),
    "CMYK": encoded(noise("CMYK"), "jpeg"),
    "palette with transparency": encoded(noise("P"), transparency=b"\x00\x80\xff"),
    "1 x 1": encoded(noise(size=(1, 1))),
    **{mode: encoded(noise(mode)) for mode in ("L", "LA", "1", "P", "RGBA")},
}


def others(outcome: Any) -> dict[tuple[str, int], tuple[int, bytes]]:
    return {place: image for place, image in outcome.images.items() if place != (BAD_FILE, BAD_ROW)}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    whole = read_all(write_set(tmp_path_factory.mktemp("whole")))
    assert len(whole.images) == 3 * ROWS
    return whole


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named_and_no_other_is_touched(tmp_path: Path, undamaged: Any, case: str) -> None:
    image, reason = BAD_IMAGES[case]
    outcome = read_all(write_set(tmp_path, with_row(image)))
    ((place, bad),) = outcome.bad.items()
    assert place == (BAD_FILE, BAD_ROW)
    assert bad.source.startswith(BAD_FILE)
    assert re.search(reason, bad.reason)
    assert outcome.images == others(undamaged)
    assert outcome.failures == []


@pytest.mark.parametrize("case", GOOD_IMAGES)
def test_an_odd_image_is_counted_with_the_pixels_that_timm_sees(tmp_path: Path, undamaged: Any, case: str) -> None:
    outcome = read_all(write_set(tmp_path, with_row(GOOD_IMAGES[case])))
    assert (outcome.said, others(outcome)) == ("", others(undamaged))
    label, pixels = outcome.images[BAD_FILE, BAD_ROW]
    expected = by_timm(GOOD_IMAGES[case], use_prefetcher=True)
    assert (label, pixels) == (3, torch.as_tensor(expected).numpy().tobytes())


def test_a_sixteen_bit_png_is_counted_and_not_clipped(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((20, 20), 100 * 257, dtype=np.uint16))
    outcome = read_all(write_set(tmp_path, with_row(encoded(grey))))
    assert set(outcome.images[BAD_FILE, BAD_ROW][1]) == {100}


def test_a_jpeg_damaged_in_its_pixels_cannot_be_told_and_is_counted_once(tmp_path: Path, undamaged: Any) -> None:
    middle = len(JPEG) // 2
    damaged = JPEG[:middle] + bytes([JPEG[middle] ^ 1]) + JPEG[middle + 1 :]
    outcome = read_all(write_set(tmp_path, with_row(damaged)))
    assert (BAD_FILE, BAD_ROW) in outcome.images
    assert others(outcome) == others(undamaged)


@pytest.mark.parametrize(("label", "reason"), [(-1, "label -1 outside 0..9"), (None, "no label in this row")])
def test_a_bad_label_is_named(tmp_path: Path, undamaged: Any, label: Any, reason: str) -> None:
    outcome = read_all(write_set(tmp_path, with_row(png(6), label)))
    assert reason in outcome.said
    assert list(outcome.bad) == [(BAD_FILE, BAD_ROW)]
    assert outcome.images == others(undamaged)


def test_a_label_beyond_the_classes_is_named(tmp_path: Path, undamaged: Any) -> None:
    outcome = read_all(write_set(tmp_path, with_row(png(6), CLASSES)))
    assert "label 10 outside 0..9" in outcome.said
    assert outcome.images == others(undamaged)


def plain(**columns: list[Any]) -> pa.Table:
    """Return the second file with other columns, without datasets' description of them."""
    whole = rows_of(1)
    kept = {name: whole[name] for name in whole.column_names}
    return pa.table({name: content for name, content in {**kept, **columns}.items() if content is not None})


def swapped() -> pa.Table:
    return rows_of(1).rename_columns(["label", "image"]).replace_schema_metadata(None)


def other_names() -> pa.Table:
    names = ["b", "a", *map(str, range(2, 10))]
    return rows_of(1).cast(features(datasets.ClassLabel(names=names)).arrow_schema)


REFUSED: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "no label column in one file": (lambda: rows_of(1).drop_columns("label"), "b.parquet .* column label.*no such"),
    "no image column in one file": (lambda: rows_of(1).drop_columns("image"), "b.parquet .* column image.*no such"),
    "swapped columns": (swapped, "b.parquet differs from a.parquet in the column image.*got numbers"),
    "numbers for images": (lambda: plain(image=[1, 2, 3, 4]), "b.parquet .*column image.*got numbers instead of bytes"),
    "paths for images": (lambda: plain(image=["x.png"] * 4), "b.parquet .*column image.*got text instead of bytes"),
    "fractions for labels": (lambda: plain(label=[0.5] * 4), "b.parquet .*column label.*got double instead of numb"),
    "other class names": (other_names, "b.parquet .*column label.*got 'b' as class 0 instead of '0'"),
    "no class names": (plain, "b.parquet .*column label.*got 0 class names instead of 10"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_another_schema_is_named_before_anything_is_scored(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    assert re.search(message, read_all(write_set(tmp_path, make())).refusal)


def test_a_label_column_missing_everywhere_is_refused_with_the_columns_that_are_there(tmp_path: Path) -> None:
    for file, name in enumerate(FILES):
        pq.write_table(rows_of(file).drop_columns("label"), tmp_path / name)
    assert "has the columns image: set --data.label_column" in read_all(tmp_path / "*.parquet").refusal


def test_labels_as_digits_in_one_file_are_read_as_numbers(tmp_path: Path, undamaged: Any) -> None:
    outcome = read_all(write_set(tmp_path, plain(label=["4", "5", "6", "7"])))
    assert (outcome.said, outcome.images) == ("", undamaged.images)


def test_labels_as_other_words_in_one_file_end_its_unit_with_its_name(tmp_path: Path, undamaged: Any) -> None:
    outcome = read_all(write_set(tmp_path, plain(label=["cat"] * 4)))
    assert re.search(r"b\.parquet row group 0 \(unit 1\) cannot be read: .*cat", outcome.said)
    assert all(undamaged.images[place] == image for place, image in outcome.images.items())


@pytest.mark.parametrize(("content", "reason"), [(b"", "0 bytes"), (b"PAR1" * 100, "."), (b"\x89PNG" * 99, ".")])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write_set(tmp_path)
    (tmp_path / "b.parquet").write_bytes(content)
    assert re.search(rf"b\.parquet cannot be read as Parquet: .*{reason}", read_all(path).refusal)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-100])
    assert "b.parquet cannot be read as Parquet" in read_all(path).refusal


@pytest.mark.parametrize("groups", [[0, 4], [4, 0], [2, 0, 2]])
def test_a_row_group_without_rows_loses_none_of_the_others(tmp_path: Path, undamaged: Any, groups: list[int]) -> None:
    path = write_set(tmp_path)
    first = 0
    with pq.ParquetWriter(tmp_path / "b.parquet", features().arrow_schema) as writer:
        for size in groups:
            writer.write_batch(rows_of(1).slice(first, size).combine_chunks().to_batches()[0]) if size else None
            writer.write_batch(pa.RecordBatch.from_pylist([], features().arrow_schema)) if not size else None
            first += size
    for unit in ("row_group", "file"):
        outcome = read_all(path, unit=unit)
        assert outcome.said == ""
        assert sorted(outcome.images.values()) == sorted(undamaged.images.values())


@pytest.mark.parametrize("columns", [["image", "label"], ["other"]])
def test_a_file_without_rows_in_the_middle_loses_none_of_the_others(tmp_path: Path, columns: list[str]) -> None:
    nothing = rows_of(1).slice(0, 0)
    outcome = read_all(
        write_set(tmp_path, nothing if "image" in columns else pa.table({"other": pa.array([], "int8")}))
    )
    assert (outcome.said, len(outcome.images)) == ("", 2 * ROWS)


def test_no_file_at_all_is_refused_with_the_pattern(tmp_path: Path) -> None:
    assert re.search(r"no file matches --data\.path, got .*\*\.parquet", read_all(tmp_path / "*.parquet").refusal)


def test_a_footer_that_promises_more_rows_than_there_are_ends_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_set(tmp_path)
    monkeypatch.setattr("headprobe.data.sources.streamed.plan_units", lambda *what: (plan_units(*what)[0], [4, 5, 4]))
    (failure,) = read_all(path).failures
    assert "b.parquet row group 0 (unit 1) is damaged: its footer promises 5 rows, and there are fewer" in failure


def test_files_that_a_readme_names_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    pq.write_table(rows_of(0), tmp_path / "outside" / "x.parquet")
    inside = tmp_path / "set"
    inside.mkdir()
    pq.write_table(rows_of(0), inside / "a.parquet")
    (inside / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: ../outside/x.parquet\n---\n"
    )
    assert "README.md" in (refusal := read_all(inside).refusal)
    assert "never read" in refusal


def test_another_column_in_one_file_does_not_matter(tmp_path: Path, undamaged: Any) -> None:
    outcome = read_all(write_set(tmp_path, rows_of(1).append_column("size", [[1, 2, 3, 4]])))
    assert (outcome.said, outcome.images) == ("", undamaged.images)


@pytest.mark.parametrize("path", ["", "*.parquet"])
def test_reading_local_files_asks_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    asked: list[object] = []

    def no_network(*address: Any, **options: Any) -> Any:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)  # as in a process that has just begun
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    write_set(tmp_path)
    assert len(read_all(tmp_path / path).images) == 3 * ROWS
    assert asked == []


def test_no_number_of_rows_in_a_footer_is_believed_alone(tmp_path: Path) -> None:
    path, file = write_set(tmp_path), tmp_path / "b.parquet"
    content = file.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = [place for place in range(start, len(content) - 8) if content[place] == 2 * ROWS]  # as Thrift writes 4
    assert len(places) >= 3  # of the file, of its row group, and of each of its columns
    for place in places:
        file.write_bytes(content[:place] + bytes([2 * ROWS - 2]) + content[place + 1 :])
        outcome = read_all(path)
        assert "b.parquet" in outcome.said or len(outcome.images) == 3 * ROWS
