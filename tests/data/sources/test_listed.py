"""Images beside a list of their labels: the rows of `datasets` own reader are the oracle for metadata files."""

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headprobe.errors import UsageError
from tests.data.parquet_sets import bound, numbers, png, read_all
from tests.data.sources.folders import write

FILES = [f"{number}.png" for number in range(6)]
LABELS = [number % 3 for number in range(6)]


def write_list(
    path: Path, files: list[str], labels: list[Any], names: tuple[str, str] = ("file_name", "label")
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(names, row, strict=True)) for row in zip(files, labels, strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def labels_of(path: Path, **options: Any) -> dict[int, int]:
    batches = list(bound(path, classes=3, **options).stream())
    found = [label for batch in batches for label in batch.labels.tolist()]
    return dict(zip(numbers(batches), found, strict=True))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata_has_the_rows_of_datasets(tmp_path: Path, kind: str) -> None:
    write(tmp_path, FILES)
    write_list(tmp_path / f"metadata.{kind}", FILES, LABELS)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    expected = [row["label"] for row in theirs]
    assert labels_of(tmp_path, class_map="identity") == dict(enumerate(expected)) == dict(enumerate(LABELS))


def test_metadata_come_before_class_folders_as_in_datasets(tmp_path: Path) -> None:
    write(tmp_path, ["x/0.png", "y/1.png"])
    write_list(tmp_path / "metadata.csv", ["x/0.png", "y/1.png"], [2, 1])
    assert labels_of(tmp_path, class_map="identity") == {0: 2, 1: 1}
    assert bound(tmp_path, classes=2, split=".").class_names == ["x", "y"]


def test_labels_that_are_texts_need_a_map(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    write_list(tmp_path / "metadata.csv", FILES, ["cat", "dog"] * 3)
    (tmp_path / "map.yaml").write_text("{cat: 2, dog: 0}")
    with pytest.raises(UsageError, match=r"labels are texts.*--data\.class_map"):
        bound(tmp_path, classes=3)
    assert labels_of(tmp_path, class_map=str(tmp_path / "map.yaml")) == {
        number: 2 - 2 * (number % 2) for number in range(6)
    }


def test_metadata_in_a_split_folder_and_above_it(tmp_path: Path) -> None:
    write(tmp_path / "in", ["val/0.png", "train/1.png"])
    write_list(tmp_path / "in/val/metadata.csv", ["0.png"], [1])
    write_list(tmp_path / "in/train/metadata.csv", ["1.png"], [2])
    assert labels_of(tmp_path / "in", class_map="identity") == {0: 1}
    assert labels_of(tmp_path / "in", class_map="identity", split="train") == {1: 2}

    write(tmp_path / "above", ["test/0.png", "train/1.png"])
    write_list(tmp_path / "above/metadata.csv", ["test/0.png", "train/1.png"], [1, 2])
    assert labels_of(tmp_path / "above", class_map="identity") == {0: 1}
    assert labels_of(tmp_path / "above", class_map="identity", split="train") == {1: 2}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_list_with_columns_of_any_names_is_read(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [f"images/{name}" for name in FILES])
    names = ("Image", "class id")
    file = write_list(tmp_path / f"labels.{kind}", [f"images/{name}" for name in FILES], LABELS, names)
    found = labels_of(file, class_map="identity", image_column="Image", label_column="class id")
    assert found == dict(enumerate(LABELS))


def test_file_names_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    write(tmp_path, ["0001", "0002"])
    file = write_list(tmp_path / "labels.csv", ["0001", "0002"], [1, 2], ("id", "label"))
    assert labels_of(file, class_map="identity", image_column="id") == {0: 1, 1: 2}


def test_a_row_without_a_file_is_a_bad_image_and_a_file_without_a_row_is_counted(tmp_path: Path) -> None:
    write(tmp_path, ["0.png", "1.png", "deep/2.png"])
    write_list(tmp_path / "metadata.csv", ["0.png", "gone.png"], [1, 1])
    outcome = read_all(tmp_path, classes=3, class_map="identity")
    assert len(outcome.images) == 1
    assert outcome.said == "gone.png: the file cannot be read: No such file or directory"
    said = {decision.about: decision for decision in bound(tmp_path, classes=3, class_map="identity").decisions()}
    assert said["images left out"].text == "2 images that metadata.csv does not list, first 1.png"
    assert said["images left out"].shown


def test_a_row_without_a_label_is_a_bad_image(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    write_list(tmp_path / "metadata.csv", FILES, [*LABELS[:5], None])
    outcome = read_all(tmp_path, classes=3, class_map="identity")
    assert outcome.said == "5.png: there is no label in this row"


REFUSED: dict[str, tuple[list[str], list[Any], tuple[str, str], str]] = {
    "outside": (["../private.png"], [1], ("file_name", "label"), r"outside of its folder, .* got \.\./private\.png"),
    "absolute": (["/etc/hostname"], [1], ("file_name", "label"), "outside of its folder"),
    "an address": (["file://etc/hostname"], [1], ("file_name", "label"), "outside of its folder"),
    "twice": (["0.png", "./0.png"], [1, 1], ("file_name", "label"), "lists an image twice.*got 0.png"),
    "no label": (["0.png"], [1], ("file_name", "class"), "has the columns file_name, class: set --data.label_column"),
    "none there": (["0", "1"], [1, 2], ("file_name", "label"), "none of the images that metadata.csv lists is there"),
    "fractions": (["0.png"], [0.5], ("file_name", "label"), r"class numbers or names .* \(double\)"),
    "no names": (["0.png"], [1], ("file", "label"), "must have a column file_name"),
    "an empty name": (["", "0.png"], [1, 1], ("file_name", "label"), "no file name in row 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_list_that_cannot_be_meant_is_refused(tmp_path: Path, case: str) -> None:
    files, labels, names, message = REFUSED[case]
    write(tmp_path / "set", FILES)
    (tmp_path / "private.png").write_bytes(png(9))
    write_list(tmp_path / "set" / "metadata.csv", files, labels, names)
    refusal = read_all(tmp_path / "set", classes=3, class_map="identity").refusal
    assert re.search(message, refusal)


def test_a_link_to_a_file_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png(9))
    write(tmp_path / "set", ["1.png"])
    (tmp_path / "set" / "0.png").symlink_to("../private.png")
    write_list(tmp_path / "set" / "metadata.csv", ["0.png"], [1])
    assert "links out of --data.path" in read_all(tmp_path / "set", classes=3, class_map="identity").refusal


def test_metadata_without_file_names_leave_class_folders_alone(tmp_path: Path) -> None:
    write(tmp_path, ["a/0.png", "b/1.png"])
    (tmp_path / "metadata.csv").write_text("class,colour\na,red\n")
    data = bound(tmp_path, classes=2)
    assert data.class_names == ["a", "b"]
    assert {decision.about for decision in data.decisions() if decision.shown} == {"metadata"}


def test_the_line_of_the_docs_lists_tiny_imagenets_images(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "own_model.md").read_text()
    line = re.search(r"cd tiny-imagenet-200/val && .*", page)
    assert line is not None
    folder = write(tmp_path / "tiny-imagenet-200" / "val", ["images/val_0.JPEG", "images/val_1.JPEG"])
    rows = "val_0.JPEG\tn03444034\t0\t32\t44\t62\nval_1.JPEG\tn04067472\t52\t55\t57\t59\n"
    (folder / "val_annotations.txt").write_text(rows)
    subprocess.run(["/bin/sh", "-c", line[0]], cwd=tmp_path, check=True)
    (tmp_path / "map.json").write_text('{"n03444034": 2, "n04067472": 1}')
    assert labels_of(folder, class_map=str(tmp_path / "map.json")) == {0: 2, 1: 1}


def test_labels_with_leading_zeros_stay_as_they_are_written(tmp_path: Path) -> None:
    write(tmp_path, FILES[:3])
    write_list(tmp_path / "metadata.csv", FILES[:3], ["01", "1", "2"])
    (tmp_path / "map.json").write_text('{"01": 2, "1": 1, "2": 0}')
    assert labels_of(tmp_path, class_map=str(tmp_path / "map.json")) == {0: 2, 1: 1, 2: 0}


def test_labels_with_leading_zeros_may_be_the_models_own_numbers(tmp_path: Path) -> None:
    write(tmp_path, FILES[:3])
    write_list(tmp_path / "metadata.csv", FILES[:3], ["00", "02", "01"])
    assert labels_of(tmp_path, class_map="identity") == {0: 0, 1: 2, 2: 1}
    write_list(tmp_path / "metadata.csv", FILES[:3], ["02", "2", "01"])
    with pytest.raises(UsageError, match="labels that are texts need a file"):
        labels_of(tmp_path, class_map="identity")


def test_whole_numbers_with_a_point_are_class_numbers(tmp_path: Path) -> None:
    write(tmp_path, FILES[:3])
    write_list(tmp_path / "metadata.csv", FILES[:3], ["1.0", "2.0", "0.0"])
    assert labels_of(tmp_path, class_map="identity") == {0: 1, 1: 2, 2: 0}


def test_class_names_in_a_metadata_file_of_datasets_are_used(tmp_path: Path) -> None:
    write(tmp_path, FILES[:3])
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}
    )
    rows = {"file_name": FILES[:3], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "metadata.parquet")
    (tmp_path / "map.json").write_text('{"cat": 2, "dog": 0, "eel": 1}')
    assert labels_of(tmp_path, class_map=str(tmp_path / "map.json")) == {0: 2, 1: 0, 2: 1}
