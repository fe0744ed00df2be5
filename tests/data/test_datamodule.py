import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import jsonargparse
import pyarrow as pa
import pytest
from lightning import LightningModule, Trainer

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.labels.numbering import restricted
from headprobe.data.sources.source import file_name
from headprobe.data.stream import ImageBatch
from headprobe.data.training import TrainingDataModule
from headprobe.errors import RunError, UsageError
from tests.data.parquet_sets import CLASSES, DATA_CONFIG, bound, numbers, png, table, write_files, write_table


class Collector(LightningModule):
    """A module with what the data module needs of one; it keeps the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.data_config = DATA_CONFIG
        self.num_classes = CLASSES
        self.class_names: list[str] | None = None
        self.seen: list[ImageBatch] = []

    def test_step(self, batch: ImageBatch) -> None:
        self.seen.append(batch)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    options |= {"logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_a_trainer_sees_every_image_once(tmp_path: Path) -> None:
    module = Collector()
    data = ImageNetDataModule(path=str(write_files(tmp_path, [[5, 3], [4]])), batch_size=4)
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert numbers(module.seen) == list(range(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"--data\.batch_size must be at least 1, got 0"),
        ({"max_images": 0}, r"--data\.max_images must be at least 1, got 0"),
        ({"num_workers": -1}, r"--data\.num_workers must be at least 0, got -1"),
        ({"path": ""}, "must name a dataset"),
        ({"class_map": "nowhere.txt"}, r"class_map .*got nowhere\.txt"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageNetDataModule(**options)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"no file or folder here and is no hub id \(owner/name\), got \./nowhere"),
        ("/no/where/at/all", "no file or folder here"),
        ("data/nowhere.parquet", "no file or folder here"),
        ("nowhere/*.parquet", r"no file matches --data\.path, got nowhere/\*\.parquet"),
    ],
)
def test_a_wrong_path_is_refused_without_asking_the_hub(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bound(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, r"choose --data\.split from validation, got tset"),
        ({"image_column": "img"}, r"columns image, label: set --data\.image_column .*got img"),
        ({"label_column": "fine_label"}, r"set --data\.label_column .*got fine_label"),
        ({"label_column": "image"}, "column of class numbers or names, got image"),
        ({"revision": "main"}, r"--data\.revision is for hub datasets.*got main"),
    ],
)
def test_what_is_not_in_the_files_is_refused_with_what_is(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bound(write_files(tmp_path, [[3]]), **options)


def test_a_split_of_files_that_were_named_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [[3]])
    with pytest.raises(UsageError, match="has no meaning where"):
        bound(f"{folder}/data/*.parquet", split="validation")


def test_the_split_is_validation_then_test_then_the_only_one(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [[3]], split="train")
    assert bound(folder).identity()["split"] == "train"
    write_files(folder, [[2]], split="test")
    assert bound(folder).identity()["split"] == "test"
    write_files(folder, [[1]], split="validation")
    assert bound(folder).identity()["split"] == "validation"
    assert bound(folder, split="train").expected_images == 3


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    rows = table([png(0)] * 3, [-1, -1, -1])
    with pytest.raises(UsageError, match=r"no labels in this split \(all are -1\).*got test"):
        bound(write_table(tmp_path, rows, "test.parquet"))


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rows at all"):
        bound(write_table(tmp_path, table([], [])))


def decisions(data: ImageNetDataModule) -> dict[str, tuple[str, bool]]:
    return {decision.about: (decision.text, decision.shown) for decision in data.decisions()}


def test_a_choice_among_fewer_classes_is_said_with_both_numbers_before_the_table(tmp_path: Path) -> None:
    for name in ("3", "8", "9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(0))
    data = bound(tmp_path, class_map="identity")
    text, shown = decisions(data)["restricted classes"]
    assert "chosen among the 3 classes that the data has, of 10; --data.restrict_classes false for all" in text
    assert shown
    assert data.identity()["chosen_among"] == 3
    everything = bound(tmp_path, class_map="identity", restrict_classes=False)
    assert "restricted classes" not in decisions(everything)
    assert everything.identity()["chosen_among"] == 10


@pytest.mark.parametrize(("letter", "said"), [("r", "ImageNet-R"), ("a", "ImageNet-A"), ("", "timm's validation")])
def test_a_choice_among_published_classes_is_told_from_one_by_accident(letter: str, said: str) -> None:
    listed = files("timm.data") / "_info" / f"imagenet_{letter}_indices.txt"
    valid = [int(line) for line in listed.read_text().split()] if letter else list(range(0, 1000, 5))
    assert len(valid) == 200
    assert said in restricted(valid, 1000)


def test_what_was_decided_about_labels_and_rows_is_said(tmp_path: Path) -> None:
    names = [f"c{number}" for number in (1, 10, 2)]
    schema = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=names)}).arrow_schema
    cells = [{"bytes": png(0), "path": None}] * 6
    write_table(tmp_path / "1", pa.table({"img": cells, "kind": [0, 1, 2] * 2}, schema=schema))
    said = decisions(bound(tmp_path / "1", 3, image_column="img", label_column="kind", max_images=3))
    assert said["columns"] == ("images in img, labels in kind", False)
    assert "class 1 is 'c10' in" in said["classes"][0]
    assert said["classes"][1]
    assert said["images"] == (
        "3 of 6, an even share of every unit, spread over its rows (--data.max_images)",
        False,
    )
    plain = decisions(bound(write_files(tmp_path / "2", [[3]])))
    assert {"columns", "images", "restricted classes"} & plain.keys() == set()
    assert plain["classes"] == ("by position, the dataset's k-th class is the model's k-th", False)


def test_a_modules_class_names_reach_the_labels(tmp_path: Path) -> None:
    for name in ("digit_1", "digit_2", "digit_10"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(int(name.split("_")[1])))
    module = Collector()
    module.num_classes, module.class_names = 3, ["digit_1", "digit_2", "digit_10"]
    data = ImageNetDataModule(path=str(tmp_path / "set"), num_workers=0)
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert sorted(zip(numbers(module.seen), module.seen[0].labels.tolist(), strict=True)) == [(1, 0), (2, 1), (10, 2)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_labels_of_every_kind_of_text_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([{"bytes": png(number)} for number in range(3)])
    labels = pa.array(["cat", "dog", "cat"]).cast(kind)
    write_table(tmp_path / "set", pa.table({"image": images, "label": labels}))
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    (batch,) = bound(tmp_path / "set", classes=2, class_map=str(tmp_path / "map.txt")).stream()
    assert batch.labels.tolist() == [1, 0, 1]


def test_labels_that_are_texts_are_read_by_a_class_map(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"cat": 1, "dog": 0}')
    rows = table([png(0), png(1), png(2)], ["cat", "dog", "eel"], datasets.Value("string"))
    data = bound(write_table(tmp_path / "set", rows), classes=2, class_map=str(tmp_path / "map.json"))
    (batch,) = data.stream()
    assert batch.labels.tolist() == [1, 0]
    assert batch.bad[0].reason == "label 'eel' is not in the class map"


def test_using_it_before_it_is_bound_says_what_to_do() -> None:
    with pytest.raises(RunError, match="call bind"):
        _ = ImageNetDataModule().units


def test_a_windows_path_leaves_no_folder_in_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as windows:
        windows.setattr("os.sep", "\\")
        name = file_name(r"C:\Users\me\set\a.parquet")
    assert name == "a.parquet"


def test_the_description_is_json_and_knows_rows_but_not_places(tmp_path: Path) -> None:
    first = write_files(tmp_path / "1" / "set", [[3, 2]])
    second = write_files(tmp_path / "2" / "set", [[3, 2]])
    description = bound(first).identity()
    assert json.loads(json.dumps(description)) == description
    assert str(tmp_path) not in json.dumps(description)
    assert description == bound(second).identity()
    assert description != bound(write_files(second, [[3, 3]])).identity()
    assert description != bound(first, max_images=3).identity()
    assert description != bound(first, unit="file").identity()


@pytest.mark.parametrize("kind", [ImageNetDataModule, TrainingDataModule])
def test_every_option_has_its_line_of_help(kind: type[ImageNetDataModule]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    text = " ".join(parser.format_help().split())
    for option in parser.parse_args([]).data.as_dict():
        # an option without help is followed by its type at once
        assert re.search(rf"--data\.{option} \S+( \{{[^}}]*\}})? [A-Z`]", text), option
    assert parser.parse_args(["--data.max_images", "5", "--data.unit", "file"]).data.max_images == 5
