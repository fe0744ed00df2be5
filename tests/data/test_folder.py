import shutil
from pathlib import Path

import pytest

from headprobe.errors import UsageError
from tests.data.parquet_sets import bound, numbers, png


def write_classes(root: Path, classes: dict[str, int]) -> Path:
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"bullet_train_{number}.PNG").write_bytes(png(number))
            number += 1
    return root


def test_every_image_of_a_class_folder_comes_once_with_its_label(tmp_path: Path) -> None:
    data = bound(write_classes(tmp_path, {"dog": 150, "cat": 70}), classes=2, num_workers=2)
    batches = list(data.test_dataloader())
    labels = dict(zip(numbers(batches), [label for batch in batches for label in batch.labels.tolist()], strict=True))
    assert labels == {number: int(number < 150) for number in range(220)}  # cat is 0 and dog 1: sorted names
    assert (data.units, data.expected_images, data.class_names) == (2, 220, ["cat", "dog"])


def test_units_of_a_class_folder_mix_classes_in_an_order_that_only_names_decide(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "one", {"a": 100, "b": 100})
    for name in ("b", "a"):  # another order of creation
        shutil.copytree(folder / name, tmp_path / "other" / name)
    one, other = (
        [batch.labels.tolist() for batch in bound(tmp_path / name, classes=2).stream()] for name in ("one", "other")
    )
    assert one == other
    assert {0, 1} == {label for batch in one[:4] for label in batch}


def test_wordnet_folders_get_imagenets_numbers(tmp_path: Path) -> None:
    data = bound(write_classes(tmp_path, {"n02123045": 2, "n07734744": 1}), classes=1000)
    assert sorted(label for batch in data.stream() for label in batch.labels.tolist()) == [281, 281, 947]
    assert data.valid_classes == [281, 947]


def test_without_restriction_all_classes_of_the_model_stay(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"n02123045": 2, "n07734744": 1})
    assert bound(folder, classes=1000, restrict_classes=False).valid_classes is None


def test_a_validation_folder_is_preferred_and_a_split_can_be_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", {"a": 1, "b": 1})
    write_classes(tmp_path / "train", {"a": 3, "b": 4})
    assert bound(tmp_path, classes=2).expected_images == 2
    assert bound(tmp_path, classes=2, split="train").expected_images == 7
    with pytest.raises(UsageError, match=r"must be a folder in .* \(train, val\), got tset"):
        bound(tmp_path, classes=2, split="tset")


def test_files_that_are_no_images_are_not_rows(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "b": 1})
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "b" / ".hidden.png").write_bytes(b"x")
    assert bound(folder, classes=2).expected_images == 2


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="Parquet files, or one folder of images per class"):
        bound(tmp_path)


def test_row_groups_of_a_folder_of_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data\.unit must be file or auto"):
        bound(write_classes(tmp_path, {"a": 1}), unit="row_group")


def test_a_bad_image_is_named_by_its_file(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1})
    (folder / "a" / "broken.jpg").write_bytes(b"")
    (bad,) = [bad for batch in bound(folder, classes=1).stream() for bad in batch.bad]
    assert (bad.source, bad.reason) == ("a/broken.jpg", "the image file is empty (0 bytes)")


def test_the_description_changes_with_the_files_and_not_with_their_place(tmp_path: Path) -> None:
    first = write_classes(tmp_path / "1" / "set", {"a": 2})
    second = write_classes(tmp_path / "2" / "set", {"a": 2})
    description = bound(first, classes=1).describe()
    assert description == bound(second, classes=1).describe()
    (second / "a" / "more.png").write_bytes(png(9))
    assert description != bound(second, classes=1).describe()
