"""What a calibration may cost: one forward pass an image, no gradients, and few large sums, whatever the units."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headprobe
from headprobe.calibration.slots import SlotStatistic
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments
from headprobe.module import HeadProbe
from tests.describe.driving import feed, noise, prepare, tiny_probe


class Watch:
    """Notes every forward pass of a model while a step calibrates: its images, and whether gradients are kept."""

    def __init__(self, probe: HeadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[int] = []
        self.keeps_gradients = False
        self.steps = 0
        self._inside = False
        step = probe.validation_step

        def watched(batch: Any, batch_idx: int) -> Any:
            self._inside, self.steps = True, self.steps + 1
            found = step(batch, batch_idx)
            self._inside = False
            return found

        monkeypatch.setattr(probe, "validation_step", watched)
        probe.backbone.register_forward_hook(self._note)

    def _note(self, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if self._inside:
            self.images.append(len(args[0]))
            self.keeps_gradients |= torch.is_grad_enabled() or out.requires_grad


@pytest.mark.parametrize("ablation", ["mean", "mean,linear,position"])
def test_every_image_that_calibrates_runs_through_the_model_once_and_keeps_no_gradients(
    ablation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    probe = headprobe.HeadProbe()
    probe.choose_masks("layer:3", ablation)
    watch = Watch(probe, monkeypatch)
    data = headprobe.ImageNetDataModule(max_images=60, num_workers=0, batch_size=8, calibration="half")
    trainer = headprobe.ProbeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(probe, datamodule=data)
    assert probe.calibration is not None
    assert sum(watch.images) == probe.calibration.about["images"]
    assert len(watch.images) == watch.steps
    assert not watch.keeps_gradients


def test_sums_are_held_once() -> None:
    moments = Moments([LayerHeads(4, 32)], MomentOptions(noise_floor=False))
    held = sum(getattr(moments, name).nbytes for name in moments.layout)
    assert held < len(pickle.dumps(moments)) < 1.2 * held


def test_the_sums_of_finished_units_are_merged_so_that_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    units = 37
    probe = tiny_probe("vit")
    prepare(probe, [SlotStatistic(["linear"])], units=units)
    assert probe.unit_sums is not None
    most, close = 0, probe.unit_sums.close

    def closing(*args: Any) -> None:
        nonlocal most
        close(*args)
        most = max(most, len(probe.unit_sums.nodes))  # type: ignore[union-attr]

    monkeypatch.setattr(probe.unit_sums, "close", closing)
    feed(probe, noise(probe, units), [1] * units)
    assert 1 < most <= units.bit_length()
