"""A few ImageNet classes in folders named by WordNet id, as Imagenette or ImageNet-R come: labels find their class."""

from pathlib import Path

import lightning
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def subset(tmp_path: Path, sample_images: Path) -> Path:
    """Write the first 24 images of the sample as class folders."""
    rows = pq.read_table(sorted(sample_images.glob("data/*.parquet"))[0]).slice(0, 24).to_pylist()
    info = timm.data.ImageNetInfo()
    for number, row in enumerate(rows):
        folder = tmp_path / "subset" / info.index_to_label_name(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(row["image"]["bytes"])
    return tmp_path / "subset"


def logits_by_hand(subset: Path, weights: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels as timm's validate.py computes them, without headprobe."""
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(weights))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names = timm.data.ImageNetInfo().label_names()
    files = sorted(subset.glob("*/*"))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))
    return logits, torch.tensor([names.index(file.parent.name) for file in files])


@pytest.mark.parametrize("restrict", [True, False])
def test_folders_named_by_wordnet_ids_are_scored_as_their_classes(
    subset: Path, deit_tiny_weights: Path, tmp_path: Path, restrict: bool
) -> None:
    probe = HeadProbe("deit_tiny_patch16_224", str(deit_tiny_weights))
    probe.choose_masks([MaskSpec("none")])
    data = ImageNetDataModule(str(subset), num_workers=0, restrict_classes=restrict)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.test(probe, data, verbose=False)
    by_hand, labels = logits_by_hand(subset, deit_tiny_weights)
    logits = by_hand.clone()  # out of inference mode
    if restrict:
        others = torch.ones(1000, dtype=torch.bool)
        others[labels] = False
        logits[:, others] = -torch.inf
    assert probe.scores is not None
    assert probe.scores.top1_count[0] == int((logits.argmax(dim=1) == labels).sum())
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert probe.scores.nll[0] == pytest.approx(float(expected), abs=1e-5)
