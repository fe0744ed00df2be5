"""A run in another number format says what that changes, and changes nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from headprobe.data.datamodule import ImageNetDataModule
from headprobe.module import HeadProbe
from tests.cli_runs import QUICK, command

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
