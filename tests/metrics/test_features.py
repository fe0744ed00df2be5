"""Features of masks against the baseline's: numpy on the same numbers is the oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.paired_accuracy import image_groups
from headprobe.metrics.accuracy.paired_tests import mean_interval
from headprobe.metrics.features import FeatureScores, FeatureSums, feature_scores


def features(masks: int = 3, images: int = 40, width: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    baseline = torch.randn(images, width, generator=generator)
    moved = baseline + 0.5 * torch.randn(masks, images, width, generator=generator)
    return torch.cat([baseline[None], moved])


def groups(images: int) -> Tensor:
    return torch.tensor(image_groups(0, range(images)))


def summed(values: Tensor) -> FeatureScores:
    sums = FeatureSums(len(values) - 1)
    sums.update(values, groups(values.shape[1]))
    return sums.compute()


def by_numpy(values: Tensor) -> tuple[Any, Any]:
    """Cosine and relative distance of each row and image, `[rows, images]`."""
    wide = values.double().numpy()
    sizes = np.linalg.norm(wide, axis=-1)
    cosine = (wide * wide[0]).sum(axis=-1) / sizes / sizes[0]
    return cosine, np.linalg.norm(wide - wide[0], axis=-1) / sizes[0]


def test_means_and_intervals_are_those_of_numpy() -> None:
    values = features()
    scores, (cosine, distance) = summed(values), by_numpy(values)
    np.testing.assert_allclose(scores.feature_cosine, cosine.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(scores.feature_distance, distance.mean(axis=1), atol=1e-12)
    for row in (1, 2, 3):
        low, high = mean_interval([(distance[row] ** power).sum() for power in (1, 2, 3, 4)], 40)
        assert scores.feature_distance_low[row] == pytest.approx(float(low), rel=1e-10)
        assert scores.feature_distance_high[row] == pytest.approx(float(high), rel=1e-10)
        low, high = mean_interval([((1 - cosine[row]) ** power).sum() for power in (1, 2, 3, 4)], 40)
        assert scores.feature_cosine_low[row] == pytest.approx(1 - float(high), rel=1e-10)
        assert scores.feature_cosine_high[row] == pytest.approx(min(1 - float(low), 1), rel=1e-10)


def test_the_baseline_is_1_and_0_exactly_and_has_no_interval() -> None:
    scores = summed(features(images=1000, width=768))
    assert (scores.feature_cosine[0], scores.feature_distance[0]) == (1.0, 0.0)
    limits = [getattr(scores, f"feature_{name}_{end}")[0] for name in ("cosine", "distance") for end in ("low", "high")]
    assert np.isnan(limits).all()


def test_a_feature_that_hardly_moves_keeps_its_digits() -> None:
    baseline = features(masks=0, images=200, width=64)[0].double()
    turned = baseline.roll(1, dims=-1) * 1e-6
    scores, (_, distance) = (
        summed(torch.stack([baseline, baseline + turned])),
        by_numpy(torch.stack([baseline, baseline + turned])),
    )
    assert scores.feature_distance[1] == pytest.approx(distance[1].mean(), rel=1e-9)
    assert scores.feature_distance_low[1] < distance[1].mean() < scores.feature_distance_high[1]
    assert scores.feature_distance_high[1] - scores.feature_distance_low[1] < 1e-7


def test_any_split_into_batches_gives_the_same_sums() -> None:
    values, whole = features(), FeatureSums(3)
    whole.update(values, groups(40))
    parts = FeatureSums(3)
    for place in (slice(0, 13), slice(13, 40)):
        part = FeatureSums(3)
        part.update(values[:, place], groups(40)[place])
        parts.merge(FeatureSums(3).from_arrays(part.to_arrays()))
    found: Any = parts.to_arrays()
    for name, array in whole.to_arrays().items():
        np.testing.assert_allclose(found[name], np.asarray(array, dtype=np.float64), rtol=1e-12, err_msg=name)


def test_sums_of_groups_add_up_to_those_of_all_images() -> None:
    values = features()
    scores, (cosine, distance) = summed(values), by_numpy(values)
    np.testing.assert_allclose(scores.group_cosine.sum(axis=1), cosine.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(scores.group_distance.sum(axis=1), distance.sum(axis=1), atol=1e-12)
    own = np.flatnonzero(groups(40).numpy() == int(groups(40)[5]))
    assert scores.group_distance[2, int(groups(40)[5])] == pytest.approx(distance[2, own].sum())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_counted_and_left_out_of_its_row_alone(broken: float) -> None:
    values = features()
    _, distance = by_numpy(values)
    values[2, 7, 3] = broken
    scores = summed(values)
    assert scores.nonfinite.tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(scores.feature_distance[[1, 3]], distance[[1, 3]].mean(axis=1), rtol=1e-12)
    assert scores.feature_distance[2] == pytest.approx(np.delete(distance[2], 7).mean())


def test_without_a_finite_baseline_an_image_counts_in_no_row() -> None:
    values = features()
    values[0, 4] = 0
    values[0, 5, 0] = torch.nan
    scores = summed(values)
    assert scores.nonfinite.tolist() == [2, 2, 2, 2]
    assert scores.images.tolist() == [40] * 4
    assert np.isfinite(scores.feature_cosine).all()


def test_a_masked_feature_of_zeros_has_cosine_0_and_distance_1() -> None:
    values = features()
    values[1] = 0
    scores = summed(values)
    assert (scores.feature_cosine[1], scores.feature_distance[1]) == (0.0, 1.0)


def test_no_image_gives_nan_and_no_error() -> None:
    scores = feature_scores(FeatureSums(2).to_arrays())
    assert np.isnan(scores.feature_cosine).all()


@pytest.mark.parametrize(
    ("values", "of_groups", "message"),
    [
        (torch.zeros(3, 5, 2), torch.zeros(5, dtype=torch.int64), r"must be \[2, images, features\].*got \[3, 5, 2\]"),
        (torch.zeros(2, 5, 2), torch.zeros(4, dtype=torch.int64), r"groups must be \[5\], one per image, got \[4\]"),
        (torch.zeros(2, 5, 2, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), "floating point"),
    ],
)
def test_wrong_shapes_are_refused(values: Tensor, of_groups: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FeatureSums(1).update(values, of_groups)
