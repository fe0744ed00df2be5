import json
import re
from pathlib import Path
from typing import Any

import datasets
import jsonargparse
import pytest
from lightning import LightningModule, Trainer

from headprobe.data.datamodule import ImageNetDataModule
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
