from pathlib import Path

import pytest

from headprobe.data.datamodule import ImageNetDataModule

DATA_CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.mark.real
def test_the_sample_gives_each_of_its_500_images_once_with_every_even_label(sample_images: Path) -> None:
    data = ImageNetDataModule(path=str(sample_images), num_workers=2)
    data.prepare_data()
    data.bind(DATA_CONFIG, 1000)
    assert (data.units, data.expected_images) == (7, 500)
    rows = []
    labels = []
    for batch in data.test_dataloader():
        assert not batch.bad
        assert batch.failure is None
        assert batch.images.shape[1:] == (3, 224, 224)
        rows += [(batch.unit, row) for row in batch.rows.tolist()]
        labels += batch.labels.tolist()
    assert sorted(rows) == [(unit, row) for unit, size in enumerate(data.unit_sizes or []) for row in range(size)]
    assert sorted(labels) == list(range(0, 1000, 2))
