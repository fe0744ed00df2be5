"""A run in another number format says what that changes, and changes nothing else."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from headprobe.backbone.preparation import normalised
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.module import HeadProbe
from tests.cli_runs import QUICK, command

pytestmark = pytest.mark.usefixtures("no_pictures")

LINE = re.compile(
    r"^(\S+): (\d+) of the first (\d+) baseline predictions differ from float32 .*: (\S+)\)$", re.MULTILINE
)


def said(folder: Path, *words: str) -> list[tuple[str, ...]]:
    ended = command(folder, "test", "--mask-spec", "layer:3", *QUICK, *words)
    assert ended.code == 0, ended.err
    return LINE.findall(ended.out)


@torch.inference_mode()
def by_hand(images: int) -> tuple[int, float]:
    """Predictions that differ, and the largest difference of a logit, of plain forward passes of the first images."""
    probe, data = HeadProbe().eval(), ImageNetDataModule(max_images=40, num_workers=0)
    data.prepare_data()
    data.bind(probe.data_config, probe.num_classes)
    read = torch.cat([batch.images for batch in data.stream()])[:images]
    single = probe.backbone(probe.normalised(read))
    with torch.autocast("cpu", torch.bfloat16):
        cheap = probe.backbone(probe.normalised(read)).float()
    return int((single.argmax(1) != cheap.argmax(1)).sum()), float((single - cheap).abs().max())


def test_mixed_precision_prints_what_it_changes(tmp_path: Path) -> None:
    predictions, difference = by_hand(40)
    ((precision, differ, images, logit),) = said(tmp_path, "--trainer.precision", "bf16-mixed")
    assert (precision, int(differ), int(images)) == ("bf16-mixed", predictions, 40)
    assert float(logit) == pytest.approx(difference, rel=0.5)  # rounding depends on the batch's shape
    assert difference > 1e-3


def test_predictions_that_differ_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = torch.nn.Module.float

    def other(self: torch.nn.Module) -> torch.nn.Module:
        single = copied(self)
        bias: Any = single.get_submodule("head").bias
        bias.data += 100 * torch.nn.functional.one_hot(torch.tensor(3), len(bias))  # 3 is predicted for every image
        return single

    monkeypatch.setattr(torch.nn.Module, "float", other)  # what makes the float32 model of a bfloat16 one
    ((_, differ, images, _),) = said(tmp_path, "--trainer.precision", "bf16-true")
    assert int(images) == 40
    assert 25 <= int(differ) <= 40  # about four of forty digits are threes


def test_float32_says_nothing(tmp_path: Path) -> None:
    assert said(tmp_path) == []


def test_a_finished_run_that_is_only_added_up_says_nothing(tmp_path: Path) -> None:
    assert len(said(tmp_path, "--trainer.precision", "bf16-mixed")) == 1
    assert said(tmp_path, "--trainer.precision", "bf16-mixed") == []


@contextmanager
def low_default(*_: Any) -> Iterator[None]:
    """What Lightning does around each step of bf16-true: tensors that are made without a format are bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_mean_and_std_of_images_are_float32_in_a_model_of_bfloat16() -> None:
    config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]  # [1, 3, 1, 256]
    with low_default():
        found = normalised(images, config, torch.float32).double()
    for channel, (mean, std) in enumerate(zip(config["mean"], config["std"], strict=True)):
        expected = (torch.arange(256, dtype=torch.float64) / 255 - mean) / std
        torch.testing.assert_close(found[0, channel, 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_default_format_of_bf16_true_reaches_no_number_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[2] / "configs" / "describe_heads.yaml"
    words = ("test", "--config", str(config), "--mask-spec", "layer:3", *QUICK)
    for name in ("usual", "low"):
        (tmp_path / name).mkdir()
    usual = command(tmp_path / "usual", *words)
    entered: list[object] = []

    def context(*own: object) -> AbstractContextManager[None]:
        entered.append(own)
        return low_default()

    monkeypatch.setattr(Precision, "forward_context", context)
    low = command(tmp_path / "low", *words)
    assert entered
    names = {file.name for file in usual.directory().iterdir() if file.suffix in (".csv", ".npz", ".safetensors")}
    assert {"masks.csv", "heads.csv", "spectrum.csv"} <= names
    for name in names:
        assert (low.directory() / name).read_bytes() == (usual.directory() / name).read_bytes(), name
