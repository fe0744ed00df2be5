"""The constants of a calibration, held against hooks that keep every slot of every image."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headprobe.calibration.slots import SlotStatistic
from headprobe.module import HeadProbe
from tests.describe import oracles
from tests.describe.driving import describe, noise, tiny_probe

KINDS = ["vit", "distilled", "beit", "eva_inner_norm", "siglip"]
WINDOWED = ["swin", "swin_v2", "swin_v2_cr"]
PADDED = {"img_size": (56, 72)}  # 14 x 18 and 7 x 9 patches in windows of 4 x 4


def calibrated(probe: HeadProbe, images: Tensor, kinds: list[str], **options: Any) -> list[Any]:
    statistic = SlotStatistic(kinds)
    describe(probe, [statistic], images, **options)
    return statistic.constants()


def kept_slots(probe: HeadProbe, images: Tensor) -> list[np.ndarray]:
    """Every layer's slots `[images, positions, heads, head_dim]` of a plain forward pass, float64."""
    layout = probe.layout
    found: dict[int, Tensor] = {}
    handles = []
    for number, layer in enumerate(layout.layers):

        def keep(_: object, args: tuple[Tensor, ...], number: int = number) -> None:
            found[number] = args[0].detach().double()

        handles.append(probe.backbone.get_submodule(layer.point).register_forward_pre_hook(keep))
    with torch.inference_mode():
        probe.backbone(probe.normalised(images))
    for handle in handles:
        handle.remove()
    return [
        found[number].reshape(len(images), -1, layer.heads, layer.head_dim).numpy()
        for number, layer in enumerate(layout.layers)
    ]


@pytest.mark.parametrize("fitted", [["mean"], ["linear", "mean"], ["position"]])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_covariance_and_positions_are_those_of_all_slots(kind: str, fitted: list[str]) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 11)
    found = calibrated(probe, images, fitted, units=[4, 7], batch=3)
    for layer, slots in zip(found, kept_slots(probe, images), strict=True):
        flat = slots.reshape(-1, slots.shape[2] * slots.shape[3])
        scale = np.abs(flat).max()
        assert layer.samples == len(flat)
        np.testing.assert_allclose(layer.mean.reshape(-1), flat.mean(0), atol=1e-6 * scale)
        if "linear" in fitted:
            centred = flat - flat.mean(0)
            np.testing.assert_allclose(layer.covariance, centred.T @ centred / len(flat), atol=2e-6 * scale**2)
        else:
            assert layer.covariance is None
        if "position" in fitted:
            np.testing.assert_allclose(layer.position, slots.mean(0), atol=1e-6 * scale)


@pytest.mark.parametrize("options", [{}, PADDED], ids=["", "padded"])
@pytest.mark.parametrize("kind", WINDOWED)
def test_padding_of_windows_counts_in_no_mean_but_has_positions(kind: str, options: dict[str, Any]) -> None:
    probe = tiny_probe(kind, **options)
    images = noise(probe, 6)
    found = calibrated(probe, images, ["position", "linear"])
    for number, (layer, slots) in enumerate(zip(found, kept_slots(probe, images), strict=True)):
        of_layer = probe.layout.layers[number]
        np.testing.assert_allclose(layer.position, slots.mean(0), atol=1e-5)
        patches = of_layer.grid[0] * of_layer.grid[1] if of_layer.grid else slots.shape[1]
        assert layer.samples == len(images) * patches
        if patches == slots.shape[1]:
            np.testing.assert_allclose(layer.mean, slots.mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "swin_v2"])
def test_mean_and_covariance_of_padded_windows_are_those_of_the_image_s_own_tokens(kind: str) -> None:
    probe = tiny_probe(kind, **PADDED)
    images = noise(probe, 5)
    normalised = probe.normalised(images).double().numpy()
    found = calibrated(probe, images, ["linear"], batch=2)
    for layer, truth in zip(found, oracles.forward(probe.backbone, normalised), strict=True):
        flat = truth.z.reshape(-1, truth.z.shape[2] * truth.z.shape[3])  # [images * patches, channels]
        assert layer.samples == len(flat)
        np.testing.assert_allclose(layer.mean.reshape(-1), flat.mean(0), atol=2e-6 * np.abs(flat).max())
        expected = np.cov(flat, rowvar=False, bias=True)
        np.testing.assert_allclose(layer.covariance, expected, atol=5e-6 * np.abs(flat).max() ** 2)


def test_constants_do_not_depend_on_batches_or_rows() -> None:
    images = noise(tiny_probe("swin"), 9)
    one = calibrated(tiny_probe("swin"), images, ["linear", "position"], batch=9)
    other = calibrated(tiny_probe("swin"), images, ["linear", "position"], units=[2, 7], batch=2)
    for mine, theirs in zip(one, other, strict=True):
        scale = np.abs(mine.mean).max()
        np.testing.assert_allclose(mine.mean, theirs.mean, atol=1e-6 * scale)
        np.testing.assert_allclose(mine.covariance, theirs.covariance, atol=2e-6 * np.abs(mine.covariance).max())
        np.testing.assert_allclose(mine.position, theirs.position, atol=2e-6 * np.abs(mine.position).max())
