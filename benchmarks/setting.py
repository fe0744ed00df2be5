"""What all contestants of a comparison are given: the same images, the same weights and one file that names them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from benchmarks.peers.common import Setting, batches, build, decoded
from headprobe.backbone.preparation import data_config
from headprobe.backbone.sandbox import perturbed
from headprobe.backbone.weights import BUNDLED, ModelSource, built_options, create_backbone
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.data.decode import image_bytes
from headprobe.data.sources.source import Request, open_source

SHARED = Path(__file__).resolve().parents[2] / "shared"
DIGITS = "digits"
MOST_ROWS = 100
"""Images in a row group, which headprobe reads as one unit: about as many as ImageNet's own files have."""


@dataclass(frozen=True)
class Materials:
    """Where a user's images and weights are, before they are copied for the contestants.

    Attributes:
        data: As `--data.path` of headprobe.
        model: As `--model.name` of headprobe.
        weights: A safetensors file; None takes the bundled weights of a bundled model, or random ones.
        options: Further arguments of `timm.create_model`.
    """

    data: str
    model: str
    weights: Path | None
    options: dict[str, Any]

    def describe(self) -> str:
        """Return in words what is measured."""
        name = f"{self.model} {json.dumps(self.options)}" if self.options else self.model
        return f"{name} with {'trained' if trained(self) else 'random'} weights, images of {Path(self.data).name}"


def usual(data: str | None, model: str, weights: Path | None) -> Materials:
    """Return the materials that were asked for; by default those in ../shared where they exist."""
    sample, trained = SHARED / "imagenet_sample", SHARED / "deit_tiny" / "model.safetensors"
    if data is None:
        data = str(sample) if sample.exists() else DIGITS
    if weights is None and model == "deit_tiny_patch16_224" and data != DIGITS and trained.exists():
        weights = trained
    return Materials(data, model, weights, {})


def prepare(materials: Materials, images: int, threads: int, workers: int, folder: Path) -> Path:
    """Copy images and weights to `folder` and return the file of the setting there.

    Raises:
        UsageError: The model, its weights or the data cannot be used.
        RunError: They cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = source_of(materials)
    torch.manual_seed(0)
    backbone = create_backbone(source)
    if not trained(materials):
        perturbed(backbone)  # fresh weights barely answer to masks: what is counted must tell one mask from another
    config: Any = data_config(backbone)
    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    classes = int(backbone.num_classes)  # type: ignore[arg-type]  # timm: int
    found = copy_images(materials.data, config, classes, images, folder / "images.parquet")
    recipe: Any = backbone.pretrained_cfg
    options = {name: value for name, value in built_options(source).items() if name != "num_classes"}
    setting = Setting(
        model=recipe["architecture"],
        named=materials.model,
        options=options,
        given=materials.options,
        classes=classes,
        weights=str(folder / "weights.safetensors"),
        images=str(folder / "images.parquet"),
        count=found,
        config={name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")},
        threads=threads,
        workers=workers,
        batch=1,
        unit=unit_of(found),
    )
    if not trained(materials):
        label_by_predictions(setting)
    return write(setting, folder)


def source_of(materials: Materials) -> ModelSource:
    """Return what headprobe builds the model from."""
    classes = 10 if materials.data == DIGITS and materials.weights is None else None
    weights = None if materials.weights is None else str(materials.weights)
    return ModelSource(materials.model, weights, materials.model in BUNDLED, classes, materials.options)


def trained(materials: Materials) -> bool:
    """Return whether the weights are of any use."""
    return materials.weights is not None or materials.model in BUNDLED


def label_by_predictions(setting: Setting) -> None:
    """Call right what the unmasked model says: counts of what random weights get right would tell no masks apart."""
    model, table = build(setting), pq.read_table(setting.images)
    with torch.inference_mode():
        parts = [model(images).argmax(dim=1) for images, _ in batches(*decoded(setting), 16)]
    table = table.set_column(1, "label", pa.array(torch.cat(parts).tolist()))
    pq.write_table(table, setting.images, row_group_size=setting.unit)


def write(setting: Setting, folder: Path) -> Path:
    """Write the file of a setting and return its path."""
    file = folder / "setting.json"
    file.write_text(json.dumps(asdict(setting), indent=1))
    return file


def unit_of(images: int) -> int:
    """Return how many images a row group has: at least two groups, for two processes to share."""
    return max(1, min(MOST_ROWS, -(-images // 2)))


def copy_images(path: str, config: dict[str, Any], classes: int, images: int, file: Path) -> int:
    """Write the bytes and the model's classes of the images that headprobe would choose, and return how many."""
    data = ImageNetDataModule(path, max_images=images, num_workers=0)
    data.prepare_data()
    data.bind(config, classes)
    labels: dict[tuple[int, int], int] = {}
    for batch in data.stream():
        labels |= {(batch.unit, int(row)): int(label) for row, label in zip(batch.rows, batch.labels, strict=True)}
    source = open_source(Request(path, sizes=True))
    contents: dict[tuple[int, int], bytes] = {}
    for unit in sorted({unit for unit, _ in labels}):
        last = max(row for of_unit, row in labels if of_unit == unit)
        chunk = next(source.chunks(unit, last + 1))
        contents |= {(unit, row): image_bytes(chunk.images[row]) for row in range(last + 1) if (unit, row) in labels}
    places = sorted(contents)
    table = pa.table({"image": [contents[at] for at in places], "label": [labels[at] for at in places]})
    pq.write_table(table, file, row_group_size=unit_of(len(places)))
    return len(places)
