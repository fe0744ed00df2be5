"""Any mixture of ablations, masks and row budgets gives the logits of one plain pass per variant."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.calibration.constants import Calibration
from headprobe.calibration.fills import stand_in
from headprobe.module import HeadProbe

KINDS = ["zero", "mean", "position", "linear", "optimal"]
SPECS = [
    "each:head",
    "each:layer",
    "each:index",
    "random:3,9,15:0-5",
    "grow:random:0",
    "keep:random:4:0-3",
    "layer:0-1+each:head",
]


def random_calibration(probe: HeadProbe, rng: np.random.Generator) -> Calibration:
    """Constants of which no two are alike, so that a slot that is filled wrongly shows."""
    layers = []
    for layer in stand_in(probe.layout).layers:
        assert layer.position is not None
        factor = rng.normal(size=(layer.mean.size, layer.mean.size))
        mean, optimal = rng.normal(size=(2, *layer.mean.shape))
        position, covariance = rng.normal(size=layer.position.shape), factor @ factor.T / layer.mean.size
        found = replace(layer, samples=1000, mean=mean, covariance=covariance, position=position, optimal=optimal)
        layers.append(found)
    return Calibration(layers)


@pytest.mark.parametrize("first", KINDS)  # of a wave, whose trunk keeps all heads
@pytest.mark.parametrize("name", ["digits_vit", "digits_swin"])
@torch.inference_mode()
def test_a_mixture_of_ablations_in_waves_equals_plain_passes(name: str, first: str) -> None:
    rng = np.random.default_rng(KINDS.index(first))
    probe = HeadProbe(name).eval()
    kinds = [first, *rng.permutation([kind for kind in KINDS if kind != first])[: rng.integers(1, 5)].tolist()]
    probe.choose_masks(["one-per-layer:0-1", *rng.choice(SPECS, size=2, replace=False).tolist()], kinds)
    probe.calibration = random_calibration(probe, rng)
    probe.row_budget = int(rng.choice([5, 11, 48, 200]))
    probe.plan_passes(32)
    assert probe.passes is not None

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, *probe.data_config["input_size"]), dtype=torch.uint8, generator=generator)
    found, inputs = probe.masked_logits(images), probe.normalised(images)
    torch.testing.assert_close(found[0], probe.backbone(inputs), atol=1e-4, rtol=1e-5)
    for number, fill in enumerate(probe.passes.growing.replacements):
        keep = masks_of_rows(probe.head_mask[number][None])
        with ablating(probe.backbone, probe.layout, keep, lambda fill=fill: [fill]):  # type: ignore[misc]
            plain = probe.backbone(inputs)
        torch.testing.assert_close(found[1 + number], plain, atol=1e-4, rtol=1e-5)
