"""A model ablated by a calibration's constants is a smaller model: the one with the constants in its weights.

The oracle folds by numpy and by the formulas of docs/ablation.md; it knows neither replacements nor predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.sandbox import example_images
from headprobe.calibration.constants import Calibration, LayerConstants
from headprobe.calibration.fills import replacements_of
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.metrics.arrays import FloatArray
from tests.conftest import tiny

PADDED = {"img_size": (56, 72)}  # 14 x 18 and 7 x 9 patches in windows of 4 x 4

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "registers, layer scale": ("vit_registers", {}),
    "beit, layer scale": ("beit", {}),
    "eva": ("eva", {}),
    "eva of dinov3, layer scale": ("dinov3", {}),
    "swin, shifted": ("swin", {}),
    "swin v2, shifted": ("swin_v2", {}),
    "swin, shifted and padded": ("swin", PADDED),
    "swin v2, shifted and padded": ("swin_v2", PADDED),
}

SPECS = ["head:0.1", "layer:1", "head:0.0+head:1.1", "index:0"]


def drawn_constants(layout: HeadLayout) -> list[LayerConstants]:
    """Constants of no data; the three kinds differ, and kept heads of a layer predict the others."""
    generator = np.random.default_rng(7)
    found = []
    for layer in layout.layers:
        width = layer.heads * layer.head_dim
        mixed = generator.normal(size=(2 * width, width)) @ generator.normal(size=(width, width)) / width**0.5
        mean, optimal = generator.normal(size=(2, layer.heads, layer.head_dim))
        found.append(LayerConstants(2 * width, mean, mixed.T @ mixed / (2 * width), optimal=optimal))
    return found


def fold(model: Any, layout: HeadLayout, keep: np.ndarray, constants: Sequence[LayerConstants], kind: str) -> None:
    """Drop the masked columns of each W_O; what stands for them goes into the kept columns and the bias."""
    for number, (layer, known) in enumerate(zip(layout.layers, constants, strict=True)):
        masked = np.repeat(~keep[number, : layer.heads], layer.head_dim)  # [channels]
        stand_in: FloatArray = (known.optimal if kind == "optimal" else known.mean).reshape(-1)  # type: ignore[union-attr]  # drawn above
        slope, added = np.zeros((masked.sum(), (~masked).sum())), stand_in[masked]
        if kind == "linear" and known.covariance is not None and slope.size:
            across = known.covariance[np.ix_(~masked, ~masked)]
            slope = np.linalg.solve(across, known.covariance[np.ix_(~masked, masked)]).T
            added = added - slope @ stand_in[~masked]

        projection = model.get_submodule(layer.projection)
        weight = projection.weight.detach().double().numpy()
        bias = 0.0 if projection.bias is None else projection.bias.detach().double().numpy()
        folded = np.zeros_like(weight)
        folded[:, ~masked] = weight[:, ~masked] + weight[:, masked] @ slope
        projection.weight = torch.nn.Parameter(torch.from_numpy(folded).float())
        projection.bias = torch.nn.Parameter(torch.from_numpy(bias + weight[:, masked] @ added).float())


@pytest.mark.parametrize("kind", ["mean", "optimal", "linear"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_model_ablated_by_constants_is_the_one_with_folded_weights(name: str, spec: str, kind: str) -> None:
    known, changed = MODELS[name]
    model = tiny(known, **changed)
    layout = find_heads(model, (3, *model.patch_embed.img_size), name)
    images = example_images(model, layout.input_size, 3)
    constants = drawn_constants(layout)
    variant = expand_all([MaskSpec(spec)], layout.heads_per_layer, name, Ablations(kind))[0]
    keep = variant.mask.mask.keep()

    fills = replacements_of([variant], layout, Calibration(constants))
    with ablating(model, layout, masks_of_rows(keep[None]), lambda: fills) as count:
        found = model(images)
    count.check(layout)
    assert (found - model(images)).abs().max() > 1e-3
    fold(model, layout, keep.numpy(), constants, kind)
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "shared"), [("zero", 1), ("mean", 1), ("linear", 2), ("resample:2", 2)])
def test_variants_share_a_replacement_where_it_is_the_same_whatever_their_names(kind: str, shared: int) -> None:
    name = next(iter(MODELS))
    model = tiny(MODELS[name][0], **MODELS[name][1])
    layout = find_heads(model, (3, *model.patch_embed.img_size), name)
    specs = [MaskSpec("layer:1"), MaskSpec("layer:0"), MaskSpec("layer:1+head:1.0")]
    variants = expand_all(specs, layout.heads_per_layer, name, Ablations(kind))
    assert len({variant.mask.mask.digest for variant in variants}) == 2
    fills = replacements_of(variants, layout, Calibration(drawn_constants(layout)))
    assert len({*map(id, fills)}) == shared
    for one, fill in zip(variants, fills, strict=True):
        for other, of_other in zip(variants, fills, strict=True):
            same = one.mask.mask.digest == other.mask.mask.digest and one.draw == other.draw
            assert not same or fill is of_other


@pytest.mark.parametrize("name", [name for name in MODELS if "layer scale" in name])
def test_the_models_called_so_have_a_layer_scale(name: str) -> None:
    model = tiny(MODELS[name][0])
    scales = [value for path, value in model.named_parameters() if path.endswith((".gamma_1", ".ls1.gamma"))]
    assert len(scales) == len(model.blocks)
    assert all((value - value.mean()).abs().max() > 0.01 for value in scales)


@pytest.mark.parametrize("name", [name for name in MODELS if "shifted" in name])
def test_the_windows_called_so_are_shifted_and_padded(name: str) -> None:
    known, changed = MODELS[name]
    blocks = [block for stage in tiny(known, **changed).layers for block in stage.blocks]
    assert [any(block.shift_size) for block in blocks] == [False, True, False, True]
    uneven = [any(side % window for side, window in zip(block.input_resolution, block.window_size, strict=True))
              for block in blocks]  # fmt: skip
    assert uneven == [bool(changed)] * 4
