"""What `datasets` and WebDataset leave on a disk, read once; and for the rest a message whose line really works."""

import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from headprobe.errors import UsageError
from tests.data.parquet_sets import CLASSES, bound, features, numbers, png, read_all
from tests.data.sources.folders import crossed, write


def dataset(first: int, stop: int) -> datasets.Dataset:
    rows = range(first, stop)
    cells = {"image": [{"bytes": png(n), "path": None} for n in rows], "label": [n % CLASSES for n in rows]}
    return datasets.Dataset.from_dict(cells, features=features())


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, stop: int) -> list[tuple[str, bytes]]:
    pairs = [((f"{n:03}.png", png(n)), (f"{n:03}.cls", str(n % CLASSES).encode())) for n in range(first, stop)]
    return [member for pair in pairs for member in pair]


TAR_COLUMNS: dict[str, Any] = {"image_column": "png", "label_column": "cls", "class_map": "identity"}


# -- save_to_disk ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_a_saved_dataset_is_read_once(tmp_path: Path, workers: int) -> None:
    dataset(0, 300).save_to_disk(tmp_path / "saved", num_shards=2)
    data = bound(tmp_path / "saved", num_workers=workers)
    batches = list(data.test_dataloader())
    assert sorted(numbers(batches)) == list(range(300))
    assert (data.units, data.unit_sizes, data.expected_images) == (3, [100, 100, 100], 300)
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert labels == [number % CLASSES for number in numbers(batches)]


def test_a_saved_dict_of_splits_has_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": dataset(0, 20), "test": dataset(20, 25)}).save_to_disk(tmp_path)
    assert sorted(numbers(bound(tmp_path).stream())) == list(range(20, 25))
    assert bound(tmp_path, split="train").expected_images == 20
    with pytest.raises(UsageError, match=r"choose --data\.split from train, test, got nope"):
        bound(tmp_path, split="nope")


def test_a_saved_choice_of_rows_is_that_choice(tmp_path: Path) -> None:
    dataset(0, 20).select([3, 1, 19]).with_format("numpy").save_to_disk(tmp_path)
    assert sorted(numbers(bound(tmp_path).stream())) == [1, 3, 19]


def test_labels_change_the_key_of_a_saved_dataset(tmp_path: Path) -> None:
    dataset(0, 20).save_to_disk(tmp_path / "1" / "set")
    changed = dataset(0, 20).to_dict() | {"label": [1] * 20}
    datasets.Dataset.from_dict(changed, features=features()).save_to_disk(tmp_path / "2" / "set")
    assert bound(tmp_path / "1" / "set").identity() != bound(tmp_path / "2" / "set").identity()


@pytest.mark.parametrize("damage", ["missing", "cut", "outside", "no json", "dict outside"])
def test_a_damaged_saved_dataset_is_refused(tmp_path: Path, damage: str) -> None:
    dataset(0, 20).save_to_disk(tmp_path / "other")
    dataset(0, 20).save_to_disk(tmp_path / "set")
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    state = tmp_path / "set" / "state.json"
    if damage == "missing":
        arrow.unlink()
    elif damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:300])
    elif damage == "outside":
        state.write_text(state.read_text().replace(arrow.name, f"../other/{arrow.name}"))
    elif damage == "no json":
        state.write_text("{")
    else:
        (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    refusal = read_all(tmp_path / "set").refusal
    assert re.search("never read" if "outside" in damage else "save it again|cannot be read", refusal)


# -- WebDataset --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["", "*.tar", "x-0001.tar"])
def test_tars_are_read_once(tmp_path: Path, path: str) -> None:
    write_tar(tmp_path / "x-0000.tar", samples(0, 7))
    write_tar(tmp_path / "x-0001.tar", samples(7, 12))
    data = bound(tmp_path / path, num_workers=2, **TAR_COLUMNS)
    batches = list(data.test_dataloader())
    assert sorted(numbers(batches)) == list(range(7 if "1" in path else 0, 12))
    assert data.unit_sizes == ([5] if "1" in path else [7, 5])
    assert all(
        label == n % CLASSES for batch in batches for n, label in zip(numbers([batch]), batch.labels, strict=True)
    )


def test_tars_in_split_folders_are_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", samples(0, 7))
    write_tar(tmp_path / "test" / "0.tar", samples(7, 12))
    assert bound(tmp_path, **TAR_COLUMNS).expected_images == 5


def test_a_compressed_tar_is_read_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar.gz", samples(0, 7), "w:gz")
    assert sorted(numbers(bound(tmp_path / "x.tar.gz", **TAR_COLUMNS).stream())) == list(range(7))


def test_the_columns_of_tars_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(0, 7))
    with pytest.raises(UsageError, match=r"has the columns png, cls, .*: set --data\.image_column .*, got image"):
        bound(tmp_path / "x.tar")


def test_a_label_that_lacks_in_a_tar_is_a_bad_row_and_none_is_lost(tmp_path: Path) -> None:
    members = samples(0, 9)
    del members[15]  # of image 7
    outcome = read_all(write_tar(tmp_path / "x.tar", members), **TAR_COLUMNS)
    assert (len(outcome.images), outcome.said) == (8, "x.tar (007.png): there is no label in this row")


def test_another_label_in_a_tar_changes_the_key(tmp_path: Path) -> None:
    one = bound(write_tar(tmp_path / "1" / "x.tar", samples(0, 3)), **TAR_COLUMNS).identity()
    members = [(name, b"9" if name == "001.cls" else content) for name, content in samples(0, 3)]
    assert one != bound(write_tar(tmp_path / "2" / "x.tar", members), **TAR_COLUMNS).identity()


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_broken_tar_is_refused(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "x.tar", samples(0, 7))
    path.write_bytes(path.read_bytes()[:size])
    outcome = read_all(path, **TAR_COLUMNS)
    assert "x.tar" in outcome.said
    assert len(outcome.images) == 0


# -- other places: the line of the message is run ----------------------------------------------------------------------
def message(path: Path) -> str:
    refusal = read_all(path, classes=2).refusal
    assert refusal.count("\n") == 0
    assert ", got " in refusal
    return refusal


def run(line: str, folder: Path) -> None:
    words = shlex.split(line)
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_zip_of_class_folders_is_unpacked_by_the_line_of_its_message(tmp_path: Path) -> None:
    write(tmp_path / "set", crossed(["a", "b"], [""]))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "set"))
    found = re.search(r"unpack it: (python -m zipfile -e \S+ FOLDER), then", message(tmp_path / "set.zip"))
    assert found is not None
    run(found[1], tmp_path)
    assert bound(tmp_path / "FOLDER", classes=2).expected_images == 4


def test_a_tar_of_class_folders_is_unpacked_by_the_line_of_its_message(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(f"{name}/{n}.png", png(n)) for name in "ab" for n in range(2)])
    found = re.search(r"mkdir FOLDER && tar -xf x\.tar -C FOLDER", message(tmp_path / "x.tar"))
    assert found is not None
    subprocess.run(["/bin/sh", "-c", found[0]], cwd=tmp_path, check=True)
    assert bound(tmp_path / "FOLDER", classes=2).expected_images == 4


@pytest.mark.parametrize("place", ["folder", "file"])
def test_arrow_files_are_converted_by_the_line_of_their_message(tmp_path: Path, place: str) -> None:
    dataset(0, 7).save_to_disk(tmp_path / "x")
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    (tmp_path / "cache").mkdir()
    arrow.rename(tmp_path / "cache" / "set-validation.arrow")
    path = tmp_path / "cache" if place == "folder" else tmp_path / "cache" / "set-validation.arrow"
    found = re.search(r"as Parquet: (python -c \".*\"), got", message(path))
    assert found is not None
    run(found[1], tmp_path)
    assert sorted(numbers(bound(tmp_path / "NAME.parquet").stream())) == list(range(7))


def test_arrow_files_of_several_splits_are_not_mixed_by_the_line(tmp_path: Path) -> None:
    for name in ("set-test.arrow", "set-train.arrow", "set-validation.arrow"):
        write(tmp_path, [name])
    assert "data_files='" + str(tmp_path) + "/*validation*.arrow'" in message(tmp_path)


@pytest.mark.parametrize("name", ["x.npz", "x.mat", "x.h5", "x.pkl", "x.tfrecord"])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_arrays_are_refused_with_the_page_that_has_the_lines(tmp_path: Path, name: str, place: str) -> None:
    write(tmp_path, [name])
    assert "by the lines in docs/own_model.md" in message(tmp_path if place == "folder" else tmp_path / name)


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.jfif"])
def test_a_single_image_is_refused(tmp_path: Path, name: str) -> None:
    assert "not a single image" in message(write(tmp_path, [name]) / name)


@pytest.mark.parametrize("name", ["x.txt", "x.yaml", "x.pdf"])
def test_another_file_is_refused_with_the_choices(tmp_path: Path, name: str) -> None:
    assert "a folder of images, Parquet files, tars, or a list of images" in message(write(tmp_path, [name]) / name)


def test_the_lines_of_the_docs_turn_arrays_into_parquet(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "own_model.md").read_text()
    found = re.search(r"```python\n(import datasets\n.*?)```", page, re.DOTALL)
    assert found is not None
    write_arrays = (
        "import numpy as np; np.savez('images.npz', images=np.zeros((5, 8, 8, 3), 'uint8'), labels=np.arange(5))"
    )
    run(shlex.join(["python", "-c", write_arrays]), tmp_path)
    run(shlex.join(["python", "-c", found[1]]), tmp_path)
    assert bound(tmp_path / "images.parquet", classes=5, class_map="identity").expected_images == 5
