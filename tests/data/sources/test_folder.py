import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from headprobe.errors import UsageError
from tests.data.parquet_sets import bound, numbers, png, read_all


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
        bound(write_classes(tmp_path, {"a": 1, "z": 0}), unit="row_group")


def test_a_bad_image_is_named_by_its_file(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "z": 0})
    (folder / "a" / "broken.jpg").write_bytes(b"")
    (bad,) = [bad for batch in bound(folder, classes=2).stream() for bad in batch.bad]
    assert (bad.source, bad.reason) == ("a/broken.jpg", "the image file is empty (0 bytes)")


def test_the_description_changes_with_the_files_and_not_with_their_place(tmp_path: Path) -> None:
    first = write_classes(tmp_path / "1" / "set", {"a": 2, "z": 0})
    second = write_classes(tmp_path / "2" / "set", {"a": 2, "z": 0})
    description = bound(first, classes=2).identity()
    assert description != bound(second, classes=2).identity()  # other files, perhaps other pixels, of the same sizes
    moved = (tmp_path / "1").rename(tmp_path / "3") / "set"
    assert description == bound(moved, classes=2).identity()
    (moved / "a" / "more.png").write_bytes(png(9))
    assert description != bound(moved, classes=2).identity()


def test_a_link_to_a_file_of_the_same_dataset_is_as_good_as_the_file(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 1, "z": 0})
    write_classes(tmp_path / "val", {"a": 1, "z": 0})
    (tmp_path / "val" / "a" / "link.png").symlink_to("../../train/a/bullet_train_0.PNG")
    assert numbers(bound(tmp_path, classes=2).stream()) == [0, 0]


def test_a_dataset_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    write_classes(tmp_path / "elsewhere", {"a": 2, "z": 0})
    (tmp_path / "set").symlink_to("elsewhere")
    assert bound(tmp_path / "set", classes=2).expected_images == 2


def test_a_link_to_a_file_outside_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png(1))
    folder = write_classes(tmp_path / "set", {"a": 2, "z": 0})
    (folder / "a" / "b.png").symlink_to("../../private.png")
    with pytest.raises(UsageError, match=r"links out of --data\.path .*, got a/b\.png -> \.\./\.\./private\.png"):
        bound(folder, classes=2)


def test_a_link_to_a_folder_whose_name_only_begins_like_the_datasets_is_outside(tmp_path: Path) -> None:
    (tmp_path / "set2.png").write_bytes(png(1))
    folder = write_classes(tmp_path / "set", {"a": 1, "z": 0})
    (folder / "a" / "b.png").symlink_to(tmp_path / "set2.png")
    with pytest.raises(UsageError, match="links out of"):
        bound(folder, classes=2)


@pytest.mark.parametrize("target", ["../elsewhere/b", "nowhere", "a", "."])
def test_a_class_folder_that_is_a_link_is_refused_and_never_left_out(tmp_path: Path, target: str) -> None:
    write_classes(tmp_path / "elsewhere", {"b": 1, "z": 0})
    folder = write_classes(tmp_path / "set", {"a": 1, "z": 0})
    (folder / "b").symlink_to(target)
    with pytest.raises(UsageError, match=rf"links to folders .* put the folder there .*, got b -> {target}$"):
        bound(folder, classes=2)


@pytest.mark.parametrize("target", ["../../elsewhere/b", "nowhere", ".", ".."])
def test_a_link_to_a_folder_inside_of_a_class_is_refused(tmp_path: Path, target: str) -> None:
    write_classes(tmp_path / "elsewhere", {"b": 1, "z": 0})
    folder = write_classes(tmp_path / "set", {"a": 1, "z": 0})
    (folder / "a" / "more").symlink_to(target)
    with pytest.raises(UsageError, match=r"links to folders .*, got a/more -> "):
        bound(folder, classes=2)


def test_a_split_that_is_a_link_is_refused_only_where_it_is_the_one_to_read(tmp_path: Path) -> None:
    write_classes(tmp_path / "elsewhere", {"a": 1, "z": 0})
    write_classes(tmp_path / "set" / "val", {"a": 2, "z": 0})
    (tmp_path / "set" / "train").symlink_to("../elsewhere")
    assert bound(tmp_path / "set", classes=2).expected_images == 2
    with pytest.raises(UsageError, match=r"got train -> \.\./elsewhere"):
        bound(tmp_path / "set", classes=2, split="train")


def test_images_in_folders_inside_of_a_class_belong_to_it(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "b": 1})
    (folder / "b" / "more" / "deep").mkdir(parents=True)
    (folder / "b" / "more" / "deep" / "x.png").write_bytes(png(7))
    batches = list(bound(folder, classes=2).stream())
    labels = dict(zip(numbers(batches), [label for batch in batches for label in batch.labels.tolist()], strict=True))
    assert labels == {0: 0, 1: 1, 7: 1}


def test_a_file_that_vanishes_after_the_listing_is_one_bad_image(tmp_path: Path) -> None:
    data = bound(write_classes(tmp_path, {"a": 3, "z": 0}), classes=2)
    (tmp_path / "a" / "bullet_train_1.PNG").unlink()
    (batch,) = data.stream()
    assert sorted(numbers([batch])) == [0, 2]
    assert [(bad.source, bad.reason) for bad in batch.bad] == [
        ("a/bullet_train_1.PNG", "the file cannot be read: No such file or directory")
    ]


def test_a_link_that_leads_nowhere_is_a_bad_image(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "z": 0})
    (folder / "a" / "link.png").symlink_to("gone.png")
    (folder / "a" / "round.png").symlink_to("round.png")
    outcome = read_all(folder, classes=2)
    assert sorted(bad.source for bad in outcome.bad.values()) == ["a/link.png", "a/round.png"]
    assert len(outcome.images) == 1


def fail_to_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the system refuse to open one file, as it does not do for tests that run as root."""
    real = Path.open

    def refusing(path: Path, *how: Any, **options: Any) -> Any:
        if path.name == "bullet_train_1.PNG":
            raise OSError(number, os.strerror(number))
        return real(path, *how, **options)

    monkeypatch.setattr(Path, "open", refusing)


def test_a_file_without_permission_is_one_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_classes(tmp_path, {"a": 3, "z": 0})
    fail_to_open(monkeypatch, errno.EACCES)
    assert read_all(folder, classes=2).said == "a/bullet_train_1.PNG: the file cannot be read: Permission denied"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_ends_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    data = bound(write_classes(tmp_path, {"a": 3, "z": 0}), classes=2)
    fail_to_open(monkeypatch, number)
    failures = [batch.failure for batch in data.stream() if batch.failure]
    assert len(failures) == 1
    assert "a/bullet_train_1.PNG cannot be read" in failures[0]


def test_a_dataset_that_vanishes_as_a_whole_ends_the_unit(tmp_path: Path) -> None:
    data = bound(write_classes(tmp_path / "set", {"a": 3, "z": 0}), classes=2)
    shutil.rmtree(tmp_path / "set")
    (batch,) = data.stream()
    assert batch.failure is not None
    assert "cannot be read: No such file" in batch.failure


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_classes(tmp_path, {"a": 1, "b": 1})
    real = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match="b cannot be listed: Permission denied"):
        bound(folder, classes=2)


def test_a_pipe_that_is_named_like_an_image_is_no_image(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "z": 0})
    os.mkfifo(folder / "a" / "pipe.png")
    assert bound(folder, classes=2).expected_images == 1
