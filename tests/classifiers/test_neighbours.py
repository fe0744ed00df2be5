"""The oracle is scikit-learn's brute force on cosines, and float64 numpy."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from headprobe.classifiers import neighbours
from headprobe.classifiers.fitted import Images
from headprobe.classifiers.neighbours import NearestNeighbours
from tests.classifiers.drawn import Features, Labels, drawn, normed

CLASSES, WIDTH = 6, 16


def bank_of(features: Features, labels: Labels, k: int = 20, temperature: float = 0.07) -> NearestNeighbours:
    images = Images(np.bincount(labels, minlength=CLASSES))
    return NearestNeighbours(normed(features).astype(np.float32), labels, images, k, temperature)


def probabilities(own: NearestNeighbours, features: Features) -> Features:
    """Return each class's share of the votes beyond those that every class has from the start."""
    votes = own.logits(torch.from_numpy(features)).exp().numpy() - np.exp(-1 / own.temperature)
    return np.asarray(votes / votes.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (200, 1.0)])
def test_votes_are_those_of_scikit_learns_brute_force(k: int, temperature: float) -> None:
    features, labels = drawn(200, CLASSES, WIDTH)
    others, _ = drawn(80, CLASSES, WIDTH, seed=1)

    def weights(distances: Features) -> Features:
        return np.asarray(np.exp((1 - distances) / temperature))

    oracle = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine").fit(features, labels)
    own = bank_of(features, labels, k, temperature)
    wanted = oracle.predict_proba(others)
    np.testing.assert_allclose(probabilities(own, others), wanted, atol=1e-5)
    np.testing.assert_array_equal(own.logits(torch.from_numpy(others)).argmax(dim=-1).numpy(), oracle.predict(others))


def test_logits_are_the_logarithm_of_votes_by_hand() -> None:
    features, labels = drawn(50, CLASSES, WIDTH)
    image = features[:1] + 0.3
    cosines = normed(normed(features).astype(np.float32).astype(np.float64)) @ normed(image)[0]
    votes = np.full(CLASSES, np.exp(-1 / 0.07))
    for place in np.argsort(-cosines)[:4]:
        votes[labels[place]] += np.exp(cosines[place] / 0.07)
    logits = bank_of(features, labels, k=4).logits(torch.from_numpy(image))
    np.testing.assert_allclose(logits[0].numpy(), np.log(votes), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.003, 0.07])
def test_a_class_without_neighbours_has_the_stated_logit(temperature: float) -> None:
    features, labels = drawn(50, CLASSES, WIDTH)
    logits = bank_of(features, labels, 1, temperature).logits(torch.from_numpy(features))
    others = logits[torch.arange(CLASSES) != torch.from_numpy(labels)[:, None]]
    np.testing.assert_allclose(others.numpy(), -1 / temperature, rtol=1e-12)


def test_logits_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = drawn(100, CLASSES, WIDTH)
    own, rows = bank_of(features, labels), torch.from_numpy(features).reshape(4, 25, WIDTH)
    whole = own.logits(rows)
    monkeypatch.setattr(neighbours, "CHUNK_BYTES", 1)  # row by row
    one_by_one = own.logits(rows)
    assert whole.shape == (4, 25, CLASSES)
    torch.testing.assert_close(one_by_one, whole, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    features, labels = drawn(40, CLASSES, WIDTH)
    own = bank_of(features, labels, k=7, temperature=0.5)
    inputs = torch.from_numpy(features[:3] + 0.01).requires_grad_()

    def logits(rows: Tensor) -> Tensor:
        return own.logits(rows)

    assert torch.autograd.gradcheck(logits, (inputs,), eps=1e-7, atol=1e-5)


def test_no_image_has_no_logit() -> None:
    features, labels = drawn(40, CLASSES, WIDTH)
    assert bank_of(features, labels).logits(torch.empty(3, 0, WIDTH)).shape == (3, 0, CLASSES)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_feature_without_direction_has_a_logit_that_is_not_finite(broken: float) -> None:
    features, labels = drawn(40, CLASSES, WIDTH)
    row = torch.zeros(1, WIDTH)
    row[0, 3] = broken
    assert not bank_of(features, labels).logits(row).isfinite().all()


def test_fewer_images_than_neighbours_all_vote_and_that_is_said() -> None:
    features, labels = drawn(5, CLASSES, WIDTH)
    own = bank_of(features, labels, k=20)
    assert own.about()["k"] == 5
    assert any("5 vote where 20 were asked for" in decision.text for decision in own.decisions())
    assert own.logits(torch.from_numpy(features)).isfinite().all()


def test_images_under_two_classes_are_counted() -> None:
    features, labels = drawn(40, CLASSES, WIDTH)
    twice = bank_of(np.concatenate([features, features[:3]]), np.append(labels, (labels[:3] + 1) % CLASSES))
    assert any(decision.text.startswith("3 images of the bank") for decision in twice.decisions())
    again = bank_of(np.concatenate([features, features[:3]]), np.append(labels, labels[:3]))
    assert not any(decision.about == "duplicate classes" for decision in again.decisions())


def test_the_digest_follows_bank_labels_neighbours_and_temperature() -> None:
    features, labels = drawn(40, CLASSES, WIDTH)
    digests = {
        bank_of(features, labels).digest,
        bank_of(features, labels, k=10).digest,
        bank_of(features, labels, temperature=0.1).digest,
        bank_of(features, labels[::-1].copy()).digest,
        bank_of(features + 0.1, labels).digest,
    }
    assert len(digests) == 5
    assert bank_of(features, labels).digest in digests
