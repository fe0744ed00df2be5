import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.stream import ImageBatch
from headprobe.data.training import TrainingDataModule
from headprobe.errors import RunError, UsageError
from tests.data.parquet_sets import CLASSES, DATA_CONFIG, numbers, png, table, write_files, write_table
from tests.data.test_datamodule import Collector, trainer


class Learner(Collector):
    """Learns nothing, and keeps the images that it validates on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def validation_step(self, batch: ImageBatch) -> None:
        self.seen.append(batch)

    def training_step(self, batch: ImageBatch) -> Tensor:
        assert batch.unit == -1
        return self.layer(batch.images.float().mean().view(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def ready(path: Path, **options: Any) -> TrainingDataModule:
    """Return a data module that is bound to a model, without a trainer."""
    data = TrainingDataModule(path=str(path), **options)
    data.bind(DATA_CONFIG, CLASSES)
    return data


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_fit_trains_on_the_training_split_and_scores_the_other(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [[9]], split="train")
    write_files(tmp_path, [[3, 2]], split="test")
    module = Learner()
    data = TrainingDataModule(path=str(folder), batch_size=4, augment=False)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, log_every_n_steps=1).fit(module, datamodule=data)
    assert numbers(module.seen) == list(range(5))
    batches: Any = list(data.train_dataloader())
    assert sorted(numbers(batches)) == list(range(9))


def test_training_images_are_shuffled_by_the_seed_and_augmented(tmp_path: Path) -> None:
    write_files(tmp_path, [[40]], split="train")
    write_files(tmp_path, [[2]], split="test")

    def order(seed: int, augment: bool = False) -> list[list[int]]:
        data = ready(tmp_path, seed=seed, augment=augment, batch_size=8)
        data.setup("fit")
        batches: Any = list(data.train_dataloader())
        assert augment or numbers(batches) == [row for batch in batches for row in batch.rows.tolist()]
        assert not augment or all(batch.images.amin() == 0 for batch in batches)  # turned: black corners
        return [batch.rows.tolist() for batch in batches]

    assert order(0) == order(0) == order(0, augment=True) != order(1)


def test_a_bad_training_image_stops_fit(tmp_path: Path) -> None:
    write_table(tmp_path, table([png(1), b"x"], [0, 1]), "train.parquet")
    write_table(tmp_path, table([png(1)], [0]), "test.parquet")
    data = ready(tmp_path)
    with pytest.raises(RunError, match=r"training image is bad: train\.parquet row group 0 \(img_1\.png\), row 1"):
        data.setup("fit")


def test_a_large_training_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headprobe.data.training.MOST_IMAGES", 8)
    data = ready(write_files(tmp_path, [[9]], split="train"))
    with pytest.raises(UsageError, match="up to 8 training images, got 9"):
        data.setup("fit")


def test_training_before_the_split_is_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'call setup\("fit"\)'):
        ready(write_files(tmp_path, [[3]])).train_dataloader()


def options_of(kind: type[ImageNetDataModule]) -> set[str]:
    """The options that a command line of this data module has."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    return set(parser.parse_args([]).data.as_dict())


def test_fit_and_test_have_the_options_that_each_of_them_uses() -> None:
    fit, test = options_of(TrainingDataModule), options_of(ImageNetDataModule)
    assert fit - test == {"train_split", "augment", "seed"}
    assert test - fit == {"restrict_classes", "on_bad_image", "calibration", "calibration_images"}
    assert test == set(inspect.signature(ImageNetDataModule).parameters)


def test_an_option_that_does_not_exist_is_refused_in_python_too() -> None:
    with pytest.raises(TypeError, match="image_colum"):
        TrainingDataModule(image_colum="img")
