"""Classes that a fitted classifier does not know: refused with their names, or left out with all their images."""

from pathlib import Path

import pytest

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import UsageError
from tests.data.parquet_sets import CLASSES, DATA_CONFIG, write_files


def own(path: Path, **options: object) -> ImageNetDataModule:
    data = ImageNetDataModule(path=str(path), batch_size=4, num_workers=0, **options)  # type: ignore[arg-type]
    data.bind(DATA_CONFIG, None, own_classes=True)
    return data


def test_they_are_refused_with_their_names_and_the_remedy(tmp_path: Path) -> None:
    data = own(write_files(tmp_path, [[30]]))
    with pytest.raises(UsageError) as refused:
        data.leave_out([2, 7])
    message = str(refused.value)
    assert message.startswith("2 of 10 classes have no calibration image")
    assert "--data.on_bad_image skip to leave their images out" in message
    assert message.endswith("got class 2, class 7")
    data.bind(DATA_CONFIG, None, own_classes=True)
    assert data.valid_classes is None  # a refusal changes nothing


def test_counting_them_as_wrong_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have no calibration image"):
        own(write_files(tmp_path, [[30]]), on_bad_image="wrong").leave_out([2])


@pytest.mark.parametrize("restrict", [True, False])
def test_left_out_they_are_not_chosen_and_their_images_are_listed(tmp_path: Path, restrict: bool) -> None:
    data = own(write_files(tmp_path, [[30]]), on_bad_image="skip", restrict_classes=restrict)
    before = data.identity()
    data.leave_out([2, 7])
    data.bind(DATA_CONFIG, None, own_classes=True)
    assert data.valid_classes == [0, 1, 3, 4, 5, 6, 8, 9]
    batches = list(data.stream())
    assert {int(label) for batch in batches for label in batch.labels} == set(range(CLASSES)) - {2, 7}
    bad = [one for batch in batches for one in batch.bad]
    assert [one.row for one in bad] == [2, 7, 12, 17, 22, 27]
    assert bad[0].reason == "class 2 has no calibration image"
    assert data.identity()["chosen_among"] == 8
    assert before["chosen_among"] == 10
    data.leave_out([])
    data.bind(DATA_CONFIG, None, own_classes=True)
    assert data.identity() == before


def test_one_class_that_is_left_is_no_choice(tmp_path: Path) -> None:
    data = own(write_files(tmp_path, [[30]]), on_bad_image="skip")
    with pytest.raises(UsageError, match="there must be two classes to choose among"):
        data.leave_out(list(range(9)))


def test_a_module_that_is_fitted_takes_the_datas_classes(tmp_path: Path) -> None:
    class Fits:
        takes_classes, classes_asked, data_config, num_classes = True, None, DATA_CONFIG, 0
        taken: object = None

        def take_classes(self, classes: int, names: object) -> None:
            self.taken = (classes, names)

    data, module = ImageNetDataModule(path=str(write_files(tmp_path, [[30]])), num_workers=0), Fits()
    data.bind_to(module)
    assert module.taken == (CLASSES, [str(number) for number in range(CLASSES)])
