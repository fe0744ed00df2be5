"""The oracle is float64 numpy, class by class."""

import numpy as np
import pytest
import torch

from headprobe.classifiers.class_mean import ClassMean
from headprobe.classifiers.fitted import Images
from headprobe.metrics.class_sums import ClassSums
from tests.classifiers.drawn import Features, Labels, drawn, normed

CLASSES, WIDTH = 7, 24


def fitted(features: Features, labels: Labels, classes: int = CLASSES, temperature: float = 0.07) -> ClassMean:
    sums = ClassSums(classes, features.shape[1])
    for part in np.array_split(np.arange(len(labels)), 5):
        sums.update(torch.from_numpy(features[part]).float(), torch.from_numpy(labels[part]))
    means, images = sums.compute()
    return ClassMean(means, Images(images), temperature)


def means_by_hand(features: Features, labels: Labels, classes: int = CLASSES) -> Features:
    directions = normed(features.astype(np.float32).astype(np.float64))
    return normed(np.stack([directions[labels == one].mean(axis=0) for one in range(classes)]))


def test_means_are_those_of_numpy_in_float64() -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    np.testing.assert_allclose(fitted(features, labels).means, means_by_hand(features, labels), atol=1e-14)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_logits_are_the_cosine_over_the_temperature(temperature: float) -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    others, _ = drawn(50, CLASSES, WIDTH, seed=1)
    wanted = normed(others) @ means_by_hand(features, labels).T / temperature
    logits = fitted(features, labels, temperature=temperature).logits(torch.from_numpy(others))
    np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_long_and_short_features_count_alike() -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    longer = features * np.random.default_rng(2).uniform(0.01, 100, (300, 1))
    np.testing.assert_allclose(fitted(longer, labels).means, fitted(features, labels).means, atol=1e-6)


def test_logits_keep_leading_dimensions_and_are_those_of_each_row_alone() -> None:
    features, labels = drawn(60, CLASSES, WIDTH)
    own = fitted(features, labels)
    rows = torch.from_numpy(features).reshape(3, 20, WIDTH)
    logits = own.logits(rows)
    assert logits.shape == (3, 20, CLASSES)
    torch.testing.assert_close(logits[1, 4], own.logits(rows[1, 4]), rtol=1e-12, atol=1e-12)


def test_gradients_pass_through() -> None:
    features, labels = drawn(60, CLASSES, WIDTH)
    own = fitted(features, labels)
    inputs = torch.from_numpy(features[:4]).requires_grad_()
    assert torch.autograd.gradcheck(own.logits, (inputs,))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_feature_without_direction_has_no_finite_logits(broken: float) -> None:
    features, labels = drawn(60, CLASSES, WIDTH)
    row = torch.zeros(1, WIDTH)
    row[0, 3] = broken
    assert not fitted(features, labels).logits(row).isfinite().any()


def test_equal_classes_are_named_and_others_are_not() -> None:
    features, labels = drawn(400, CLASSES, WIDTH)
    features, labels = np.concatenate([features, features[labels == 2][::-1]]), np.append(labels, labels[labels == 2])
    labels[400:] = CLASSES  # one more class with the images of class 2, in another order
    names = [f"kind {number}" for number in range(CLASSES + 1)]
    own = fitted(features, labels, CLASSES + 1)
    own.class_names = names
    (found,) = [decision for decision in own.decisions() if decision.about == "duplicate classes"]
    assert found.shown
    assert "1 pair of classes" in found.text
    assert "kind 2, kind 7" in found.text
    others = fitted(features[:400], labels[:400])
    assert not [decision for decision in others.decisions() if decision.about == "duplicate classes"]


def test_classes_without_images_are_named_and_never_get_nan_into_others() -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    own = fitted(features[labels != 3], labels[labels != 3])
    assert own.unseen == [3]
    assert own.about()["classes_without_images"] == [3]
    assert own.logits(torch.from_numpy(features)).isfinite().all()
    (found,) = [decision for decision in own.decisions() if decision.about == "classes without calibration images"]
    assert "class 3: 1 of 7 classes" in found.text


def test_a_run_is_told_how_many_images_each_class_has_and_what_it_is_not() -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    per_class = np.bincount(labels)
    text = fitted(features, labels).decisions()[0].text
    assert f"of 300 images, {per_class.min()} to {per_class.max()} of each class" in text
    assert "temperature 0.07" in text
    assert "a class-mean classifier is not a linear probe" in text


def test_the_digest_follows_means_and_temperature() -> None:
    features, labels = drawn(300, CLASSES, WIDTH)
    one = fitted(features, labels)
    assert one.digest == fitted(features, labels).digest
    assert one.digest != fitted(features, labels, temperature=0.1).digest
    assert one.digest != fitted(features[:-1], labels[:-1]).digest
