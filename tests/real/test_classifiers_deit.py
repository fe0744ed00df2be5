"""Class means and neighbours on DeiT-Ti's own features and real images, its classifier set aside.

The sample has about one image of each of ImageNet's classes, so these are joined into ten ranges of the class index.
The oracle is plain timm, numpy and scikit-learn: it knows no code of headprobe's.
"""

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from tests.cli_runs import Ended, command, only_message
from tests.real.few_images import write_few

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]  # on busy cores the run takes long

RANGES = 10
MASKED = (0, 6, 11)  # layers: of all twelve the growing pass is held to plain passes in test_growing_deit.py
OF_EACH_FILE = 30  # of 71 or 72

Array = NDArray[np.float64]


class Part(NamedTuple):
    """Images of one half: their units and rows, pixels `[images, 3, 224, 224]` and ranges `[images]`."""

    rows: list[tuple[int, int]]
    pixels: Tensor
    labels: NDArray[np.int64]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    """Write the first images of each file into a data set of its own."""
    folder = write_few(sample_images, tmp_path_factory.mktemp("sample"), OF_EACH_FILE)
    ranges = {str(number): number * RANGES // 1000 for number in range(1000)}
    (folder / "ranges.json").write_text(json.dumps(ranges))
    return folder


def words(sample: Path, weights: Path) -> tuple[str, ...]:
    model = ("--model.name", "deit_tiny_patch16_224", "--model.weights", str(weights.resolve()))
    return "test", *model, "--data.path", str(sample), "--data.num_workers", "0", "--trainer.accelerator", "cpu"


@pytest.fixture(scope="module", params=["class-mean", "knn"])
def judged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sample: Path, deit_tiny_weights: Path
) -> tuple[str, Ended]:
    masks = f"[{','.join(f'layer:{layer}' for layer in MASKED)}]"
    joined = ("--data.class_map", str(sample / "ranges.json"), "--mask-spec", masks, "--records")
    given = (*words(sample, deit_tiny_weights), *joined, "--model.classifier", request.param)
    ended = command(tmp_path_factory.mktemp("run"), *given)
    assert ended.code == 0, ended.err
    return request.param, ended


@pytest.fixture(scope="module")
def deit(deit_tiny_weights: Path) -> Any:
    model: Any = timm.create_model("deit_tiny_patch16_224", num_classes=0)
    state = {name: tensor for name, tensor in load_file(deit_tiny_weights).items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def halves(deit: Any, sample: Path) -> dict[str, Part]:
    """Read the images as timm's validate.py does, and tell the halves apart by the documented hash."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(deit), is_training=False)
    found: dict[str, list[tuple[tuple[int, int], Tensor, int]]] = {"fitted": [], "judged": []}
    for unit, file in enumerate(sorted((sample / "data").glob("*.parquet"))):
        for number, row in enumerate(pq.read_table(file).to_pylist()):
            half = "judged" if hashlib.sha256(f"half:{unit}:{number}".encode()).digest()[0] >= 128 else "fitted"
            image = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
            found[half].append(((unit, number), transform(image), row["label"] * RANGES // 1000))
    return {
        half: Part([row for row, _, _ in own], torch.stack([p for _, p, _ in own]), np.array([t for _, _, t in own]))
        for half, own in found.items()
    }


@pytest.fixture(scope="module")
def features(deit: Any, halves: dict[str, Part]) -> dict[str, Array]:
    """Features of the fitted images, and of the judged ones under every mask by name."""
    entering: list[Tensor] = []
    with torch.inference_mode():
        found = {"fitted": deit(halves["fitted"].pixels)}
        keep = [block.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for block in deit.blocks]
        found["none"] = deit(halves["judged"].pixels)
        for handle in keep:
            handle.remove()
        for layer in MASKED:
            projection = deit.blocks[layer].attn.proj
            handle = projection.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
            found[f"layer:{layer}"] = deit.forward_head(deit.norm(deit.blocks[layer:](entering[layer])))
            handle.remove()
    return {name: own.double().numpy() for name, own in found.items()}


def normed(features: Array) -> Array:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def predictions(classifier: str, fitted: Array, labels: NDArray[np.int64], judged: Array) -> NDArray[np.int64]:
    if classifier == "class-mean":
        means = normed(np.stack([normed(fitted)[labels == one].mean(axis=0) for one in range(RANGES)]))
        return np.asarray((normed(judged) @ means.T).argmax(axis=1))

    def votes(distances: Array) -> Array:
        return np.asarray(np.exp((1 - distances) / 0.07))

    model = KNeighborsClassifier(20, weights=votes, algorithm="brute", metric="cosine").fit(fitted, labels)
    return np.asarray(model.predict(judged))


def test_every_prediction_under_every_mask_is_that_of_plain_timm(
    judged: tuple[str, Ended], halves: dict[str, Part], features: dict[str, Array]
) -> None:
    classifier, ended = judged
    records = pq.read_table(ended.directory() / "records").to_pylist()
    found = {(one["mask"], one["unit"], one["row"]): one["prediction"] for one in records}
    fitted, own = halves["fitted"], halves["judged"]
    assert len(found) == len(own.rows) * (1 + len(MASKED))
    table = {row["mask"]: row for row in ended.rows()}
    for mask in ("none", *(f"layer:{layer}" for layer in MASKED)):
        wanted = predictions(classifier, features["fitted"], fitted.labels, features[mask])
        assert [found[mask, *row] for row in own.rows] == wanted.tolist(), mask
        assert int(table[mask]["top1_count"]) == int((wanted == own.labels).sum())


def test_ten_ranges_of_a_hundred_classes_are_told_apart_better_than_by_chance(judged: tuple[str, Ended]) -> None:
    first = judged[1].rows()[0]
    right, images = int(first["top1_count"]), int(first["images"])
    # about eleven images of a range fit, of as many classes; chance is a tenth
    assert binomtest(right, images, 0.1, alternative="greater").pvalue < 1e-3


def test_one_image_of_each_class_is_refused_with_names_and_not_scored_as_nothing_right(
    tmp_path: Path, sample: Path, deit_tiny_weights: Path
) -> None:
    ended = command(tmp_path, *words(sample, deit_tiny_weights), "--model.classifier", "class-mean")
    assert ended.code == 2
    message = only_message(ended)
    assert "of 1,000 classes have no calibration image, so the classifier does not know them" in message
    assert not list(tmp_path.glob("lightning_logs/version_*/masks.csv"))
