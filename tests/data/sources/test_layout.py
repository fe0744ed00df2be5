"""Folders that people download, as they unpack them: which are read, and what is said of the others."""

import re
from collections import Counter
from pathlib import Path

import pytest

from headprobe.data.sources.layout import names_no_class, names_split
from headprobe.errors import UsageError
from tests.data.parquet_sets import bound
from tests.data.sources.folders import crossed, write

CATS_DOGS = ["cats", "dogs"]
WORDNET = ["n01440764", "n01443537"]
SPLITS: dict[str, tuple[list[str], str]] = {
    "training_set and test_set": (crossed(["training_set", "test_set"], CATS_DOGS), "--data.split"),
    "Training and Testing": (crossed(["Training", "Testing"], CATS_DOGS), r"\(Testing, Training\)"),
    "folds": (crossed(["fold_1", "fold_2"], CATS_DOGS), r"fold_1, fold_2"),
    "folds by number": (crossed(["1", "2"], CATS_DOGS), r"cats, dogs come again"),
    "any names, same classes": (crossed(["north", "south"], CATS_DOGS), r"cats, dogs come again.*\(north, south\)"),
    "most classes the same": (
        [*crossed(["north"], ["a", "b", "c"]), *crossed(["south"], ["A", "b", "d"])],
        "a, b come again",
    ),
    "train and dev, other classes": ([*crossed(["train"], ["a", "b"]), *crossed(["dev"], ["c", "d"])], "dev, train"),
    "parts of ImageNet": ([*crossed(["x"], WORDNET), *crossed(["y"], ["n02085620"])], r"\(x, y\)"),
    "folders around, twice": (
        [*crossed(["seg_train/seg_train", "seg_test/seg_test"], CATS_DOGS), "seg_pred/seg_pred/1.jpg"],
        "seg_test, seg_train",
    ),
    "splits without classes": (crossed(["train", "test"], [""]), "test, train are no names of classes"),
    "an unlabelled test folder": ([*crossed(["train"], CATS_DOGS), "test/1.png"], r"one of them \(train\)"),
    "images beside others": ([*crossed(["images"], CATS_DOGS), "annotations/1.xml", "samples/1.png"], r"\(images\)"),
    "masks of each class": (crossed(CATS_DOGS, ["images", "masks"]), "images, masks come again"),
    "the classes' videos": (crossed(CATS_DOGS, ["video_1", "video_2"]), r"or --data\.split \. if they are the cl"),
    "one split": (crossed(["Training"], CATS_DOGS), "holds one folder, Training, .* --data.path .*/set/Training"),
    "ImageNet's own": (crossed(["ILSVRC2012_img_val"], WORDNET), "--data.path .*/set/ILSVRC2012_img_val"),
    "folders around": (crossed(["archive/images"], CATS_DOGS), "give --data.path .*/set/archive/images, or"),
    "beside __MACOSX": ([*crossed(["archive"], CATS_DOGS), "__MACOSX/archive/._1.png"], "one folder, archive"),
    "no folders": (["1.png", "2.png"], r"all images of set lie in one folder, so nothing says"),
    "no class folders": (["images/1.png", "images/2.png"], r"lie in one folder, images, .* metadata\.csv"),
    "Tiny-ImageNet's val": (["val/images/1.JPEG", "val/images/2.JPEG"], r"images of val lie in one folder, images"),
    "Oxford-Pets": (["images/1.jpg", "annotations/1.xml", "annotations/list.txt"], "lie in one folder, images"),
    "a flat val beside test": (
        [*crossed(["test"], CATS_DOGS), "val/1.png"],
        "val has no class folders.*--data.split test",
    ),
    "ImageNet's flat val": ([*crossed(["train"], WORDNET), "val/1.JPEG"], r"one of them \(train\)"),
    "metadata in each": ([*crossed(["x", "y"], [""]), "x/metadata.csv", "y/metadata.csv"], r"describe .*\(x, y\)"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_folders_of_splits_are_never_classes(tmp_path: Path, case: str) -> None:
    files, message = SPLITS[case]
    with pytest.raises(UsageError) as refusal:
        bound(write(tmp_path / "set", files), classes=2)
    assert re.search(message, str(refusal.value))
    assert ", got " in str(refusal.value)
    assert "\n" not in str(refusal.value)


READ: dict[str, tuple[list[str], dict[str, int]]] = {
    "class folders": (crossed(CATS_DOGS, [""]), {"cats": 2, "dogs": 2}),
    "a class called train": (crossed(["bus", "train"], [""]), {"bus": 2, "train": 2}),
    "images in each class": (crossed(["a", "b"], ["images"]), {"a": 2, "b": 2}),
    "other folders in each class": ([*crossed(["a"], ["x", "y"]), *crossed(["b"], ["z", "w"])], {"a": 4, "b": 4}),
    "more images deeper": ([*crossed(["a", "b"], ["", "more"])], {"a": 4, "b": 4}),
    "Val and Train": ([*crossed(["Val"], CATS_DOGS, "1.png"), *crossed(["Train"], CATS_DOGS)], {"cats": 1, "dogs": 1}),
    "TEST alone beside TRAIN": (
        [*crossed(["TEST"], CATS_DOGS, "1.png"), *crossed(["TRAIN"], ["x"])],
        {"cats": 1, "dogs": 1},
    ),
    "beside stray folders": (
        [*crossed(["val"], CATS_DOGS), "annotations/1.xml", "__MACOSX/1.png"],
        {"cats": 2, "dogs": 2},
    ),
    "a folder of other files": ([*crossed(CATS_DOGS, [""]), "labels/1.xml"], {"cats": 2, "dogs": 2}),
}


def classes_of(path: Path, **options: str) -> Counter[str]:
    data = bound(path, classes=2, **options)
    assert data.class_names is not None
    return Counter(data.class_names[label] for batch in data.stream() for label in batch.labels.tolist())


@pytest.mark.parametrize("case", READ)
def test_folders_of_classes_are_read(tmp_path: Path, case: str) -> None:
    files, images = READ[case]
    assert classes_of(write(tmp_path / "set", files)) == images


def test_tiny_imagenets_classes_are_read_and_so_are_videos_of_wordnet_classes(tmp_path: Path) -> None:
    for name, inner in (("tiny", ["images"]), ("videos", ["video_1", "video_2"])):
        data = bound(write(tmp_path / name, crossed(WORDNET, inner)), classes=1000)
        assert data.valid_classes == [0, 1]


@pytest.mark.parametrize("split", ["training_set", "test_set"])
def test_a_named_split_is_read(tmp_path: Path, split: str) -> None:
    write(tmp_path, crossed(["training_set", "test_set"], CATS_DOGS))
    assert classes_of(tmp_path, split=split) == {"cats": 2, "dogs": 2}


def test_the_word_dot_makes_folders_classes_whatever_they_hold(tmp_path: Path) -> None:
    write(tmp_path, crossed(CATS_DOGS, ["video_1", "video_2"]))
    assert classes_of(tmp_path, split=".") == {"cats": 4, "dogs": 4}
    write(tmp_path / "deeper" / "val", crossed(CATS_DOGS, ["video_1", "video_2"]))
    with pytest.raises(UsageError, match=r"or --data\.path .*/deeper/val --data\.split \. if"):
        bound(tmp_path / "deeper", classes=2)


def test_a_choice_among_one_class_is_refused_and_among_all_of_the_model_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path, crossed(WORDNET[:1], [""]))
    with pytest.raises(UsageError, match=r"only one class to choose among, .*restrict_classes false .*, got n01440764"):
        bound(folder, classes=1000)
    assert bound(folder, classes=1000, restrict_classes=False).expected_images == 2
    with pytest.raises(UsageError, match="only one class"):
        bound(write(tmp_path / "plain", ["cats/1.png"]), classes=1)


@pytest.mark.parametrize("path", [".", "./", "../set", "../set/."])
def test_messages_and_keys_name_the_folder_and_never_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    write(tmp_path / "set", crossed(["a", "b"], [""]))
    monkeypatch.chdir(tmp_path / "set")
    assert bound(path, classes=2).identity()["path"] == "set"
    with pytest.raises(UsageError, match=r"a folder in set \(a, b\), got c"):
        bound(path, classes=2, split="c")


@pytest.mark.parametrize(
    "name", ["train", "Training", "test_set", "TEST", "val", "validation_data", "fold_1", "fold2", "split-3", "dev"]
)
def test_names_of_splits(name: str) -> None:
    assert names_split(name)
    assert names_no_class(name)


@pytest.mark.parametrize(
    "name", ["cats", "bullet_train", "test_tube", "invalid", "0", "n01440764", "datasetdatasetdatasetdatasetdatasetx"]
)
def test_names_of_classes(name: str) -> None:
    assert not names_split(name)
    assert not names_no_class(name)
