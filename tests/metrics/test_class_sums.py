"""Sums and banks of features: any split of the images gives the same, and nothing is counted silently."""

import numpy as np
import pytest
import torch

from headprobe.errors import RunError
from headprobe.metrics import feature_bank
from headprobe.metrics.class_sums import ClassSums
from headprobe.metrics.feature_bank import FeatureBank
from tests.classifiers.drawn import drawn, normed

CLASSES, WIDTH = 4, 6


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = drawn(60, CLASSES, WIDTH)
    labels[5] = -1  # without a label
    features[7], features[8, 2], features[9, 0] = 0, np.nan, np.inf
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_images_without_label_or_direction_are_counted_and_left_out(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    sums, bank = ClassSums(CLASSES, WIDTH), FeatureBank(WIDTH)
    sums.update(*images)
    bank.update(*images)
    for one in (sums, bank):
        assert int(one.unlabelled) == 1
        assert int(one.unusable) == 3
    assert int(sums.images.sum()) == bank.images == 56
    assert np.isfinite(sums.compute()[0]).all()
    assert np.isfinite(bank.directions()).all()


@pytest.mark.parametrize("kind", ["sums", "bank"])
def test_merged_parts_written_and_read_are_the_whole(kind: str, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    def empty() -> ClassSums | FeatureBank:
        return ClassSums(CLASSES, WIDTH) if kind == "sums" else FeatureBank(WIDTH)

    whole, parts = empty(), [empty(), empty()]
    whole.update(*images)
    for number, part in enumerate(parts):
        part.update(images[0][number * 25 :][: 25 + 10 * number], images[1][number * 25 :][: 25 + 10 * number])
    merged = empty().from_arrays(parts[0].to_arrays())
    merged.merge(parts[1])  # type: ignore[arg-type]
    for name, array in whole.to_arrays().items():
        np.testing.assert_allclose(merged.to_arrays()[name].astype(float), array.astype(float), rtol=1e-14)


def test_a_bank_keeps_the_order_of_its_images_at_unit_length() -> None:
    features, labels = drawn(30, CLASSES, WIDTH)
    bank = FeatureBank(WIDTH)
    for first in range(0, 30, 7):
        bank.update(torch.from_numpy(features[first : first + 7]), torch.from_numpy(labels[first : first + 7]))
    np.testing.assert_array_equal(bank.labels(), labels)
    np.testing.assert_allclose(bank.directions(), normed(features), rtol=1e-6)


def test_a_bank_that_would_be_too_large_is_refused_with_the_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_bank, "MOST_BYTES", 40 * WIDTH * 4)
    features, labels = drawn(30, CLASSES, WIDTH)
    one, other = FeatureBank(WIDTH), FeatureBank(WIDTH)
    one.update(torch.from_numpy(features), torch.from_numpy(labels))
    other.update(torch.from_numpy(features), torch.from_numpy(labels))
    with pytest.raises(RunError, match=r"--data\.calibration_images 40"):
        one.merge(other)


def test_arrays_of_another_bank_are_refused() -> None:
    bank = FeatureBank(WIDTH)
    with pytest.raises(ValueError, match="directions must be float32"):
        FeatureBank(WIDTH + 1).from_arrays(bank.to_arrays() | {"labels": np.zeros(2, dtype=np.int64)})
    with pytest.raises(ValueError, match="the arrays must be"):
        bank.from_arrays({"sums": np.zeros(1)})
    with pytest.raises(ValueError, match="equal width"):
        bank.merge(FeatureBank(WIDTH + 1))
