"""The facts of each layer that the metrics need, and that every kind of model gives numbers with them."""

from typing import Any

import numpy as np
import pytest
import timm
import torch

from headprobe.backbone.capture.layer_facts import CONTRIBUTION, LayerFacts, layer_facts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.sandbox import example_images
from headprobe.describe.attention import describe_attention
from headprobe.describe.spectrum import describe_spectrum
from headprobe.metrics.attention.offsets import OffsetMaps
from headprobe.metrics.attention.statistics import AttentionStatistics
from headprobe.metrics.spectrum.spectra import Spectra
from tests.conftest import perturbed, tiny


def facts_of(model: Any, size: tuple[int, int]) -> tuple[HeadLayout, tuple[LayerFacts, ...]]:
    layout = find_heads(model, (3, *size), "model")
    return layout, layer_facts(model, layout)


class Description:
    """All statistics of a model on some images."""

    def __init__(self, model: Any, images: int = 3, mask: tuple[int, int] | None = None, bf16: bool = False) -> None:
        self.layout, self.facts = facts_of(model, model.patch_embed.img_size)
        grids, heads = [fact.outputs for fact in self.facts], self.layout.heads_per_layer
        self.attention = AttentionStatistics(grids, heads, [fact.undefined for fact in self.facts])
        self.offsets, self.spectra = OffsetMaps(grids, heads), Spectra(grids, heads)
        self.records: list[LayerRecord] = []
        keep = torch.ones(1, len(grids), max(heads), dtype=torch.bool)
        if mask is not None:
            keep[0, mask[0], mask[1]] = False
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        masked, tapped = (
            ablating(model, self.layout, masks_of_rows(keep)),
            tapping(model, self.layout, [Tap(self.observe)]),
        )
        with torch.inference_mode(), autocast, masked, tapped:
            model(example_images(model, self.layout.input_size, images))

    def observe(self, record: LayerRecord) -> None:
        facts = self.facts[record.layer]
        self.records.append(record)
        reduction = describe_attention(record, facts, aligned=True)
        self.attention.update(record.layer, record.images, reduction.values)
        self.offsets.update(record.layer, record.images, reduction.aligned)
        if spectra := describe_spectrum(record, facts):
            self.spectra.update(record.layer, spectra)


def test_every_kind_of_model_has_every_statistic_or_a_reason(tiny_kind: str) -> None:
    described = Description(tiny(tiny_kind))
    table = described.attention.compute()
    for layer, reasons in enumerate(described.attention.reasons):
        for name, values in table.mean.items():
            assert (name in reasons) == bool(np.isnan(values[table.layer == layer]).all()), (layer, name)
            assert (name in reasons) or bool(np.isfinite(values[table.layer == layer]).all())
    spectrum = described.spectra.compute()
    for layer, fact in enumerate(described.facts):
        own = spectrum.layer == layer
        contributions = own & (spectrum.series == "contribution")
        undefined = contributions if CONTRIBUTION in fact.undefined else np.zeros_like(own)
        assert np.isnan(spectrum.delta_log_amplitude[undefined]).all()
        assert np.isfinite(spectrum.delta_log_amplitude[own & ~undefined]).all()
    for fact, found in zip(described.facts, described.offsets.compute(), strict=True):
        assert (found is None) == fact.outputs.pooled
        if found is not None:
            np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "class_token", "prefix", "patch"),
    [
        ("vit", True, 1, 16),
        ("vit_registers", True, 5, 14),
        ("distilled", True, 2, 16),
        ("dinov3", True, 5, 16),
        ("siglip", False, 0, 16),
    ],
)
def test_grids_tell_class_tokens_registers_and_patches(kind: str, class_token: bool, prefix: int, patch: int) -> None:
    grid = facts_of(tiny(kind), tiny(kind).patch_embed.img_size)[1][0].outputs
    assert (grid.class_token, grid.prefix, grid.patch) == (class_token, prefix, (patch, patch))


def test_registers_of_a_model_without_class_token_are_not_taken_for_one() -> None:
    model = timm.create_model(
        "vit_small_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=2, class_token=False, reg_tokens=4,
        global_pool="avg",
    )  # fmt: skip
    grid = facts_of(model, (64, 64))[1][0].outputs
    assert (grid.prefix, grid.class_token, grid.registers) == (4, False, 4)


def test_patches_of_later_stages_are_larger() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2, 2, 2), embed_dim=24, num_heads=(1, 2, 4, 8))
    facts = facts_of(model, (224, 224))[1]
    assert [fact.outputs.patch[0] for fact in facts] == [4, 4, 8, 8, 16, 16, 32, 32]


def test_stages_that_merge_an_odd_number_of_patches_keep_their_stride() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(60, 44), window_size=4, depths=(2, 2), embed_dim=24, num_heads=(1, 2)
    )
    facts = facts_of(model, (60, 44))[1]
    assert [fact.outputs.grid for fact in facts] == [(15, 11)] * 2 + [(8, 6)] * 2
    assert [fact.outputs.patch for fact in facts] == [(4, 4)] * 2 + [(8, 8)] * 2
    described = Description(perturbed(model))
    assert all(
        np.isfinite(value).all() for name, value in described.attention.compute().mean.items() if "mass" not in name
    )


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_non_square_images_work(name: str) -> None:
    side = 14 if "14" in name else 16
    model = timm.create_model(name, img_size=(3 * side, 5 * side), embed_dim=48, num_heads=3, depth=2)
    described = Description(perturbed(model))
    assert described.facts[0].outputs.grid == (3, 5)
    assert np.isfinite(described.attention.compute().mean["attention_distance_px"]).all()


def test_layer_scale_is_part_of_what_a_head_contributes() -> None:
    model = tiny("dinov3")
    _, facts = facts_of(model, model.patch_embed.img_size)
    block = model.blocks[0]
    projection = facts[0].projection
    assert projection is not None
    weight = block.attn.proj.weight * (block.ls1.gamma if hasattr(block, "ls1") else block.gamma_1)[:, None]
    torch.testing.assert_close(projection.weight.transpose(0, 1).flatten(1), weight.detach())


def test_the_norm_ratio_is_that_of_contribution_and_stream(tiny_kind: str) -> None:
    described = Description(tiny(tiny_kind))
    table = described.attention.compute()
    for record, facts in zip(described.records, described.facts, strict=True):
        if "output_norm_ratio" in described.attention.reasons[record.layer]:
            continue
        assert facts.projection is not None
        assert record.stream_before is not None
        grid = facts.outputs
        added = torch.einsum("hdc,bthc->bthd", facts.projection.weight.double(), record.projected.double())
        norms = added.norm(dim=-1)  # [rows, tokens, heads]
        stream = record.stream_before.double().norm(dim=-1)[:, grid.prefix :]
        places = torch.from_numpy(grid.places)[:, grid.prefix :]
        by_place = torch.zeros(3, grid.patches, norms.shape[-1], dtype=torch.float64)
        by_place[:, places.flatten()] = norms[:, grid.prefix :].unflatten(0, (3, -1)).flatten(1, 2)
        expected = (by_place / stream[..., None]).mean(dim=(0, 1))
        found = table.mean["output_norm_ratio"][table.layer == record.layer]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_a_masked_head_adds_nothing_and_has_no_spectrum() -> None:
    described = Description(tiny("vit"), mask=(1, 0))
    table, spectrum = described.attention.compute(), described.spectra.compute()
    masked = (table.layer == 1) & (table.head == 0)
    assert table.mean["output_norm_ratio"][masked] == 0
    assert (table.mean["output_norm_ratio"][~masked] > 0).all()
    silent = (spectrum.layer == 1) & (spectrum.head == 0)
    assert np.isnan(spectrum.delta_log_amplitude[silent]).all()
    assert np.isfinite(spectrum.delta_log_amplitude[~silent]).all()


@pytest.mark.parametrize("kind", ["vit", "swin", "swin_v2"])
def test_bf16_autocast_describes_nearly_the_same_heads(kind: str) -> None:
    exact, coarse = Description(tiny(kind)), Description(tiny(kind), bf16=True)
    theirs = exact.attention.compute().mean
    for name, values in coarse.attention.compute().mean.items():
        np.testing.assert_allclose(values, theirs[name], rtol=0.2, atol=0.05, err_msg=name)


def test_one_image_is_enough() -> None:
    described = Description(tiny("swin"), images=1)
    assert np.isfinite(described.attention.compute().mean["entropy_nats"]).all()
