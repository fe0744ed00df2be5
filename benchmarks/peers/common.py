"""What all hand-written loops share: the setting, the model, the images, and how a result is reported."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn import functional

BASELINE = "none"
Heads = tuple[tuple[int, int], ...]
"""Layers and heads, both from 0."""


@dataclass(frozen=True)
class Score:
    """What came of some images; scores of several batches add up.

    Attributes:
        right: How many are right.
        images: How many there are.
        nll: Sum of their labels' negative log-likelihood in nats; None where logits are not at hand.
    """

    right: int = 0
    images: int = 0
    nll: float | None = 0.0

    def __add__(self, other: "Score") -> "Score":
        nll = None if self.nll is None or other.nll is None else self.nll + other.nll
        return Score(self.right + other.right, self.images + other.images, nll)

    @property
    def mean_nll(self) -> float | None:
        """Mean negative log-likelihood, None where it is not known."""
        return None if self.nll is None or not self.images else self.nll / self.images


Scores = dict[str, Score]
"""What came of the images, by mask; `none` is the unmasked model."""


@dataclass(frozen=True)
class Setting:
    """The images, the model and how to run it; the same for all contestants of a comparison.

    Attributes:
        model: timm's name of the architecture.
        named: The name that headprobe takes; a bundled model's differs from timm's.
        options: Further arguments of `timm.create_model`.
        given: Those of them that headprobe does not know by itself.
        classes: Classes of the model.
        weights: Safetensors file.
        images: Parquet file with the columns `image` (bytes of a file) and `label` (the model's own class).
        count: How many images it holds.
        config: timm's evaluation transform: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        threads: Of torch, in one process.
        workers: Processes that decode beside the one that computes; 0 decodes in it.
        batch: Images per forward pass of the hand-written loops: the fastest of some that were tried.
        unit: Images in a row group of the file.
        precision: float32, or bfloat16 for autocast.
    """

    model: str
    named: str
    options: dict[str, Any]
    given: dict[str, Any]
    classes: int
    weights: str
    images: str
    count: int
    config: dict[str, Any]
    threads: int
    workers: int
    batch: int
    unit: int = 0
    precision: str = "float32"


def read(file: str | Path) -> Setting:
    """Read the setting in a file."""
    return Setting(**json.loads(Path(file).read_text()))


def build(setting: Setting) -> Any:
    """Return timm's model with its weights, ready to be evaluated."""
    torch.set_num_threads(setting.threads)
    model = timm.create_model(setting.model, pretrained=False, num_classes=setting.classes, **setting.options)
    model.load_state_dict(load_file(setting.weights))
    return model.eval()


def attentions(model: nn.Module) -> list[Any]:
    """Return the attention modules of a timm ViT or Swin, in the order in which they run."""
    return [module for name, module in model.named_modules() if name.endswith(".attn")]


def single_heads(model: nn.Module) -> Heads:
    """Return every head of every layer."""
    return tuple((layer, head) for layer, module in enumerate(attentions(model)) for head in range(module.num_heads))


def named(layer: int, head: int) -> str:
    """Return the name that headprobe gives to the mask of one head."""
    return f"head:{layer}.{head}"


class Images(torch.utils.data.Dataset[Any]):
    """The images of the setting, decoded by Pillow and timm's transform; items are `(image, label)`.

    `transform` may be replaced, as timm's own loader does.
    """

    def __init__(self, setting: Setting) -> None:
        table = pq.read_table(setting.images)
        self.files: list[bytes] = table["image"].to_pylist()
        self.labels: list[int] = table["label"].to_pylist()
        self.mode = "L" if setting.config["input_size"][0] == 1 else "RGB"
        self.transform: Callable[[Any], Any] = create_transform(**setting.config, is_training=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.transform(Image.open(io.BytesIO(self.files[number])).convert(self.mode)), self.labels[number]


def decoded(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return all images `[images, channels, height, width]`, normalised, and their labels `[images]`."""
    data = Images(setting)
    pairs = [data[number] for number in range(len(data))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut images and labels into batches of `size`."""
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))


def scored(logits: Tensor, labels: Tensor) -> Score:
    """Score a batch: right is an image whose largest logit is the label's."""
    right = int((logits.argmax(dim=1) == labels).sum())
    return Score(right, len(labels), float(functional.cross_entropy(logits.float(), labels, reduction="sum")))


def total(scores: Iterable[Score]) -> Score:
    """Add up scores."""
    return sum(scores, start=Score())


def arithmetic(setting: Setting) -> Any:
    """Return a context of the setting's precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16")


@contextmanager
def head_zeroed(attention: Any, head: int) -> Iterator[None]:
    """Zero one head at the input of its output projection while open; fused attention stays on."""
    size = attention.proj.in_features // attention.num_heads

    def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].clone()
        heads[..., head * size : (head + 1) * size] = 0
        return (heads,)

    handle = attention.proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def layer_zeroed(attention: Any) -> Iterator[None]:
    """Zero all heads of a layer at the input of its output projection while open."""
    handle = attention.proj.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def main(prepared: Callable[[Setting], Callable[[], Scores]]) -> None:
    """Set up, run the loop once on the clock, and print what it took and counted as one JSON line.

    Args:
        prepared: Builds the model, warms it up, and returns the loop.
    """
    setting = read(sys.argv[1])
    loop = prepared(setting)
    with torch.inference_mode(), arithmetic(setting):
        began = time.perf_counter()
        scores = loop()
        ended = time.perf_counter()
    print(json.dumps({"loop": ended - began, **as_json(scores)}))


def as_json(scores: Scores) -> dict[str, Any]:
    """Return how many images are right and, where it is known, the mean NLL, by mask."""
    means = {name: score.mean_nll for name, score in scores.items()}
    return {
        "top1": {name: score.right for name, score in scores.items()},
        "nll": {name: mean for name, mean in means.items() if mean is not None},
    }


def warm(model: Any, setting: Setting) -> None:
    """Run one forward pass of zeros: the first one allocates and chooses kernels."""
    with torch.inference_mode(), arithmetic(setting):
        model(torch.zeros(min(setting.batch, setting.count), *setting.config["input_size"]))
