"""Every prediction of a run on the bundled images, held to plain timm, numpy and scikit-learn.

The oracle knows no code of headprobe's: timm builds the bundled model without its classifier, a plain hook zeroes what
enters `proj`, and the halves are told apart by the documented hash.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

import headprobe
from tests.classifiers.drawn import Features, Labels, normed
from tests.cli_runs import Ended, command

DIGITS = Path(headprobe.__file__).with_name("data") / "digits"
LAYERS, CLASSES, UNITS = 6, 10, 5
TEMPERATURE, K = 0.07, 20
MASKS = ["none", *(f"layer:{layer}" for layer in range(LAYERS))]
WORDS = ("test", "--mask-spec", "each:layer", "--records", "--data.num_workers", "0", "--trainer.accelerator", "cpu")

Row = tuple[int, int]


class Oracle(NamedTuple):
    """Features of every image, under every mask by name; labels, and images as the model takes them."""

    features: dict[str, dict[Row, Features]]
    labels: dict[Row, int]
    pixels: dict[Row, torch.Tensor]

    def of(self, mask: str, judged: bool) -> tuple[list[Row], Features, Labels]:
        rows = [row for row in self.labels if judges(row) == judged]
        features = np.stack([self.features[mask][row] for row in rows])
        return rows, features, np.array([self.labels[row] for row in rows])


def judges(row: Row) -> bool:
    return hashlib.sha256(f"half:{row[0]}:{row[1]}".encode()).digest()[0] >= 128


def without_classifier() -> Any:
    weights = DIGITS / "digits_vit.safetensors"
    with safe_open(weights, framework="pt") as file:
        recipe = json.loads(file.metadata()["headprobe"])
    model = timm.create_model(recipe["name"], num_classes=0, **recipe["options"])
    state = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    model = without_classifier()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    file = pq.ParquetFile(DIGITS / "test.parquet")
    pixels, rows, labels = [], [], {}
    for unit in range(file.num_row_groups):
        for number, cell in enumerate(file.read_row_group(unit).to_pylist()):
            image = Image.open(BytesIO(cell["image"]["bytes"])).convert("RGB")
            pixels.append(transform(image))
            rows.append((unit, number))
            labels[unit, number] = cell["label"]
    batch, features = torch.stack(pixels), {}
    for mask in MASKS:
        with torch.inference_mode(), masked(model, mask):
            features[mask] = dict(zip(rows, model(batch).double().numpy(), strict=True))
    return Oracle(features, labels, dict(zip(rows, pixels, strict=True)))


@contextmanager
def masked(model: Any, mask: str) -> Iterator[None]:
    """Zero what a layer's heads give."""
    handles = []
    if mask != "none":
        projection = model.blocks[int(mask.removeprefix("layer:"))].attn.proj
        handles = [projection.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))]
    yield
    for handle in handles:
        handle.remove()


def means(oracle: Oracle) -> Features:
    _, features, labels = oracle.of("none", judged=False)
    return normed(np.stack([normed(features)[labels == one].mean(axis=0) for one in range(CLASSES)]))


def class_means(oracle: Oracle) -> Callable[[Features], Features]:
    centres = means(oracle)
    return lambda features: np.asarray(normed(features) @ centres.T / TEMPERATURE)


def neighbours(oracle: Oracle) -> Callable[[Features], Features]:
    _, bank, labels = oracle.of("none", judged=False)

    def votes(distances: Features) -> Features:
        return np.asarray(np.exp((1 - distances) / TEMPERATURE))

    fitted = KNeighborsClassifier(K, weights=votes, algorithm="brute", metric="cosine").fit(bank, labels)

    def logits(features: Features) -> Features:
        distances, _ = fitted.kneighbors(features)
        total = votes(distances).sum(axis=1, keepdims=True)
        return np.asarray(np.log(fitted.predict_proba(features) * total + math.exp(-1 / TEMPERATURE)))

    return logits


@pytest.fixture(scope="module", params=["class-mean", "knn"])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Ended]:
    ended = command(tmp_path_factory.mktemp(request.param), *WORDS, "--model.classifier", request.param)
    assert ended.code == 0, ended.err
    return request.param, ended


def logits_by_hand(oracle: Oracle, classifier: str, mask: str) -> tuple[list[Row], Features, Labels]:
    of_features = class_means(oracle) if classifier == "class-mean" else neighbours(oracle)
    rows, features, labels = oracle.of(mask, judged=True)
    return rows, of_features(features), labels


def test_every_image_under_every_mask_is_predicted_as_by_hand(judged: tuple[str, Ended], oracle: Oracle) -> None:
    classifier, ended = judged
    table = pq.read_table(ended.directory() / "records").to_pylist()
    found = {(one["mask"], one["unit"], one["row"]): one["prediction"] for one in table}
    wanted: dict[tuple[str, int, int], int] = {}
    for mask in MASKS:
        rows, logits, _ = logits_by_hand(oracle, classifier, mask)
        wanted |= {(mask, *row): int(place) for row, place in zip(rows, logits.argmax(axis=1), strict=True)}
    assert found == wanted
    assert len(found) == len(MASKS) * 249


def test_accuracy_and_nll_are_those_by_hand(judged: tuple[str, Ended], oracle: Oracle) -> None:
    classifier, ended = judged
    table = {row["mask"]: row for row in ended.rows()}
    for mask in MASKS:
        _, logits, labels = logits_by_hand(oracle, classifier, mask)
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        assert int(table[mask]["top1_count"]) == int((logits.argmax(axis=1) == labels).sum())
        assert float(table[mask]["nll"]) == pytest.approx(float(nll.mean()), abs=2e-5)


def test_the_bundled_model_reaches_the_accuracy_that_the_docs_state(judged: tuple[str, Ended]) -> None:
    assert judged[1].rows()[0]["top1_count"] == "247"  # of 249: 99.2%, docs/own_model.md


def test_the_calibrations_file_holds_the_means_of_the_other_half(judged: tuple[str, Ended], oracle: Oracle) -> None:
    classifier, ended = judged
    with safe_open(ended.directory() / "calibration.safetensors", framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    _, bank, labels = oracle.of("none", judged=False)
    np.testing.assert_array_equal(arrays["classifier.images"], np.bincount(labels))
    if classifier == "class-mean":
        np.testing.assert_allclose(arrays["classifier.means"], means(oracle), atol=1e-6)
    else:
        np.testing.assert_allclose(arrays["classifier.bank"], normed(bank), atol=1e-6)
        np.testing.assert_array_equal(arrays["classifier.labels"], labels)


def logits_in_torch(oracle: Oracle, classifier: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the formula of the logits of features `[images, features]`, float64, as torch differentiates it."""
    _, bank, labels = oracle.of("none", judged=False)
    rows = torch.from_numpy(means(oracle) if classifier == "class-mean" else normed(bank))

    def logits(features: torch.Tensor) -> torch.Tensor:
        cosines = torch.nn.functional.normalize(features.double(), dim=-1) @ rows.T
        if classifier == "class-mean":
            return cosines / TEMPERATURE
        nearest = cosines >= cosines.topk(K, dim=-1).values[:, -1:]
        votes = nearest * (cosines / TEMPERATURE).exp()
        by_class = torch.nn.functional.one_hot(torch.from_numpy(labels), CLASSES).double()
        return (votes @ by_class + math.exp(-1 / TEMPERATURE)).log()

    return logits


@pytest.mark.parametrize("classifier", ["class-mean", "knn"])
def test_scores_by_gradient_are_those_of_autograd_through_the_formula(
    tmp_path: Path, oracle: Oracle, classifier: str
) -> None:
    words = ("test", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--score-heads")
    ended = command(tmp_path, *words, "--model.classifier", classifier)
    assert ended.code == 0, ended.err
    model, logits = without_classifier(), logits_in_torch(oracle, classifier)
    xi = [torch.ones(4, requires_grad=True) for _ in range(LAYERS)]

    def times(layer: int) -> Any:
        return lambda _, args: ((args[0].unflatten(-1, (4, 16)) * xi[layer][:, None]).flatten(-2),)

    for layer, block in enumerate(model.blocks):
        block.attn.proj.register_forward_pre_hook(times(layer))
    total = np.zeros((LAYERS, 4))
    fitted = [row for row in oracle.labels if not judges(row)]
    for row in fitted:
        feature = model(oracle.pixels[row][None])
        loss = torch.nn.functional.cross_entropy(logits(feature), torch.tensor([oracle.labels[row]]))
        total += np.abs(np.stack([gradient.numpy() for gradient in torch.autograd.grad(loss, xi)]))
    with (ended.directory() / "scores.csv").open(newline="") as file:
        found = np.array([float(one["gradient_abs"]) for one in csv.DictReader(file)]).reshape(LAYERS, 4)
    np.testing.assert_allclose(found, total / len(fitted), rtol=1e-3, atol=1e-5)
