"""Taps on every attention class; the oracle for weights is what softmax gives with timm's fused attention off."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.capture.layer_facts import CONTRIBUTION, LayerFacts, layer_facts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.heads.sites import class_path
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic, Role, Subject
from headprobe.describe.observing import Observing
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.metrics.attention.statistics import RATIOS, STATISTICS
from tests.families import REPRESENTATIVES, build

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)

CHANNELS_FIRST = (
    "MultiQueryAttention2d",
    "BottleneckAttn",
    "HaloAttn",
    "LambdaLayer",
    "ConvAttention",
    "efficientformer_v2.Attention2d",
    "Attention2dDownsample",
    "LiteMLA",
    "CascadedGroupAttention",
    "maxxvit.Attention2d",
    "visformer.Attention",
    "levit.Attention",
    "levit.AttentionDownsample",
)
"""Classes that concatenate heads in axis 1 where that is a map of four axes."""

WITHOUT_MAPS = (
    "TalkingHeadAttn",
    "DiffAttention",
    "DiffParallelScalingBlock",
    "ChannelAttention",
    "ChannelAttentionV2",
    "XCA",
    "CrossCovarianceAttn",
    "LambdaLayer",
    "FactorAttnConvRelPosEnc",
    "LiteMLA",
    "efficientformer_v2.Attention2d",
)
"""Classes without weights between tokens that are positive and sum to 1: mixed, differences, channels, linear."""

MERGED = ("vision_transformer_sam.Attention", "BottleneckAttn", "HaloAttn")
"""Classes whose weights are `[rows * heads, ...]`."""


def is_of(module: nn.Module, classes: tuple[str, ...]) -> bool:
    return class_path(module).endswith(tuple(f".{name}" for name in classes))


def setup(key: str) -> tuple[Any, HeadLayout, list[Any], Tensor]:
    model, size = build(key), REPRESENTATIVES[key].input_size
    layout = find_heads(model, size, key)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(9))
    return model, layout, [model.get_submodule(layer.name) for layer in layout.layers], images


def tapped(model: Any, layout: HeadLayout, images: Tensor) -> tuple[list[LayerRecord], Tensor]:
    records: list[LayerRecord] = []
    with tapping(model, layout, [Tap(records.append)]):
        return records, model(images)


def by_head(concatenated: Tensor, module: nn.Module, heads: int) -> Tensor:
    """Heads as they are concatenated `[rows, tokens, heads, head dim]`, by the table in the module's own source."""
    if concatenated.dim() == 4 and is_of(module, CHANNELS_FIRST):
        return concatenated.flatten(2).unflatten(1, (heads, -1)).permute(0, 3, 1, 2)
    tokens = concatenated.reshape(len(concatenated), -1, concatenated.shape[-1])
    if is_of(module, ("ParallelScalingBlock", "DiffParallelScalingBlock")):
        tokens = tokens[..., :48]  # the width of these representatives; channels of an mlp may follow
    if class_path(module) == "timm.models.nest.Attention":
        return tokens.unflatten(-1, (-1, heads)).transpose(-1, -2)
    return tokens.unflatten(-1, (heads, -1))


@pytest.mark.parametrize("key", REPRESENTATIVES)
@torch.inference_mode()
def test_every_layer_is_recorded_once_and_no_bit_of_the_logits_changes(key: str) -> None:
    model, layout, modules, images = setup(key)
    plain = model(images)
    points: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):

            def keep(_: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
                points[number] = args[0].clone()

            stack.callback(model.get_submodule(layer.point).register_forward_pre_hook(keep).remove)
        records, logits = tapped(model, layout, images)
    assert torch.equal(logits, plain)
    assert [one.layer for one in records] == list(range(len(layout.layers)))
    for one, module, heads in zip(records, modules, REPRESENTATIVES[key].heads, strict=True):
        assert one.images == len(images)
        assert torch.equal(one.heads_out, by_head(points[one.layer], module, heads))
        assert one.heads_out.shape[0] == one.windows * len(images)
        assert one.projected.shape == one.heads_out.shape


class Softmaxes(TorchFunctionMode):
    """Keeps what softmax gives while a module is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[int] = []
        self.found: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAXES and self.open:
            self.found.setdefault(self.open[-1], []).append(result)
        return result


@contextmanager
def unfused(modules: list[Any]) -> Iterator[dict[int, list[Tensor]]]:
    """Switch fused attention off and collect what softmax, or the dropout after it, gives in each module."""
    softmaxes, mixtures = Softmaxes(), {}
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            if hasattr(module, "fused_attn"):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False

            def enter(_: nn.Module, __: Any, number: int = number) -> None:
                softmaxes.open.append(number)

            def leave(*_: Any) -> None:
                softmaxes.open.pop()

            def mixed(_: nn.Module, __: Any, out: Tensor, number: int = number) -> None:
                mixtures[number] = [out]

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            if is_of(module, ("GPSA",)):  # two softmaxes and a mixture of them
                stack.callback(module.attn_drop.register_forward_hook(mixed).remove)
        stack.enter_context(softmaxes)
        yield softmaxes.found
        softmaxes.found |= mixtures


def rows_of_weights(found: list[Tensor], module: nn.Module, heads: int) -> Tensor:
    """Weights as `[rows, heads, queries, keys]`, windows of an image adjoining."""
    if is_of(module, ("CascadedGroupAttention",)):
        return torch.stack(found, dim=1)
    (weights,) = found
    if is_of(module, MERGED):
        weights = weights.unflatten(0, (-1, heads))
    if is_of(module, ("LocallyGroupedAttn",)):
        return weights.flatten(0, 1)  # [images, windows, heads, ...]
    if weights.dim() == 5:  # [images, heads, windows, ...]
        return weights.transpose(1, 2).flatten(0, 1)
    return weights


def whole(one: LayerRecord) -> Tensor:
    assert one.attention is not None
    parts = [(part.rows, part.queries, part.weights) for part in one.weights(5000)]
    out = torch.full(one.attention.shape, torch.nan, dtype=parts[0][2].dtype)
    for rows, queries, weights in parts:
        out[rows, :, queries] = weights
    return out


@pytest.mark.parametrize("key", REPRESENTATIVES)
@torch.inference_mode()
def test_weights_are_timms_own_or_every_statistic_of_them_has_a_reason_to_be_missing(key: str) -> None:
    model, layout, modules, images = setup(key)
    facts = layer_facts(model, layout)
    model, images = model.double(), images.double()  # where nothing is left to rounding
    records, _ = tapped(model, layout, images)
    with unfused(modules) as found:
        model(images)
    for one, module, fact in zip(records, modules, facts, strict=True):
        heads = REPRESENTATIVES[key].heads[one.layer]
        assert (one.attention is None) == is_of(module, WITHOUT_MAPS)
        if one.attention is None:
            missing = {*STATISTICS, *RATIOS} - {"output_norm_ratio"}
            assert missing <= {name for name, reason in fact.undefined.items() if reason}
            continue
        weights = whole(one)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0)
        expected = rows_of_weights(found[one.layer], module, heads)
        torch.testing.assert_close(weights, expected, atol=1e-7, rtol=0)


GRID_WITHOUT_WEIGHTS = (
    "vit_differential",
    "vit_differential_parallel",
    "cait",
    "efficientformer_v2",
    "efficientvit_mit",
    "efficientvit_mit_large",
    "lambda_resnet",
    "lambda_resnet_table",
)
"""Representatives with layers whose patches have known places, but that have no weights between them."""


@pytest.mark.parametrize("key", REPRESENTATIVES)
@torch.no_grad()
def test_a_stream_that_is_recorded_grows_by_what_the_layer_gives(key: str) -> None:
    model, layout, modules, images = setup(key)
    given: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda _, __, out: given.append(out))
            stack.callback(hook.remove)
        records, _ = tapped(model, layout, images)
    for record, output in zip(records, given, strict=True):
        layer = layout.layers[record.layer]
        if record.stream_before is None or record.stream_after is None or record.norm_follows or layer.window:
            continue
        block: Any = model.get_submodule(layer.name.rpartition(".")[0])
        scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls")]
        scale = next((one for one in (*scales, getattr(block, "gamma_1", None)) if one is not None), 1)
        added = record.stream_after - record.stream_before
        close = 1e-4 * float(added.abs().max())
        torch.testing.assert_close(added, scale * output, atol=close, rtol=0)


def drive(key: str, statistics: list[HeadStatistic], masked: bool = False) -> tuple[HeadLayout, tuple[LayerFacts, ...]]:
    """Describe four images; with a mask, the model without the last layer's first head too."""
    model, layout, _, images = setup(key)
    images = torch.cat([images, images.flip(0) + 0.5])
    facts = layer_facts(model, layout)
    keep = torch.ones(int(masked), len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    keep[:, -1, 0] = False
    with GrowingPass(model, layout, find_joins(model, layout).joins if masked else (), keep) as growing:
        subject = Subject(layout, facts, units=1, mask="last:0" if masked else None)
        for statistic in statistics:
            statistic.begin(subject)
        sums = {statistic.name: statistic.open(0) for statistic in statistics}
        observing = Observing(statistics, growing, variant=0 if masked else None)
        taps = observing.taps(sums, 0, torch.arange(len(images)))
        growing.logits(images, growing.plan(len(images), 8), taps)
    for statistic in statistics:
        statistic.finish(statistic.close(0, sums[statistic.name]))
    assert observing.began
    return layout, facts


@pytest.mark.parametrize("key", REPRESENTATIVES)
@torch.inference_mode()
def test_values_are_missing_exactly_where_a_reason_is_given(key: str) -> None:
    attention = AttentionSums(offset_maps=key not in GRID_WITHOUT_WEIGHTS)
    similarity, spectrum = SimilaritySums(groups=0, measures=["cka"]), SpectrumSums()
    layout, facts = drive(key, [attention, similarity, spectrum])
    check_attention(attention)
    check_similarity(similarity, layout)
    check_spectrum(spectrum, facts)


@pytest.mark.parametrize("key", ["vit_parallel", "swin", "nest", "xcit", "levit", "hiera", "efficientvit_msra"])
@torch.inference_mode()
def test_the_masked_model_is_described_beside_the_baseline(key: str) -> None:
    attention, spectrum = AttentionSums(), SpectrumSums()
    layout, _ = drive(key, [attention, SimilaritySums(groups=0, measures=["cka"]), spectrum], masked=True)
    check_attention(attention)
    tables, before = attention.tables(), sum(layout.heads_per_layer[:-1])
    for name in STATISTICS:
        change = tables[Role.CHANGE].mean[name][:before]
        np.testing.assert_array_equal(change[~np.isnan(change)], 0)  # before the masked head nothing can differ
    assert set(spectrum.tables()) == set(Role)


@pytest.mark.parametrize("key", GRID_WITHOUT_WEIGHTS)
@torch.inference_mode()
def test_layers_without_weights_have_no_offset_map(key: str) -> None:
    attention = AttentionSums()
    _, facts = drive(key, [attention])
    maps = attention.maps()[Role.BASELINE]
    without = ["attention_distance_px" in fact.undefined for fact in facts]
    assert any(without)
    assert all(one is None for one, missing in zip(maps, without, strict=True) if missing)


def check_attention(attention: AttentionSums) -> None:
    reasons, table = attention.reasons(), attention.tables()[Role.BASELINE]
    for name in (*STATISTICS, *RATIOS):
        missing = np.array([name in reasons[layer] for layer in table.layer])
        np.testing.assert_array_equal(np.isnan(table.mean[name]), missing, err_msg=name)
    assert all(reason for layer in reasons for reason in layer.values())


def check_similarity(similarity: SimilaritySums, layout: HeadLayout) -> None:
    arrays = similarity.matrices()
    layer = np.repeat(np.arange(len(layout.layers)), layout.heads_per_layer)
    constant = arrays["rank"] == 0  # heads whose output is the same in all images resemble nothing
    assert constant.sum() < len(constant) / 10
    other = (layer[:, None] != layer[None]) | constant[:, None] | constant[None]
    np.testing.assert_array_equal(np.isnan(arrays["cka"].astype(float)), other)


def check_spectrum(spectrum: SpectrumSums, facts: tuple[LayerFacts, ...]) -> None:
    table = spectrum.tables()[Role.BASELINE]
    for layer, fact in enumerate(facts):
        own = table.layer == layer
        assert own.any() == fact.outputs.on_map
        for series, missing in {"head": False, "contribution": CONTRIBUTION in fact.undefined}.items():
            values = table.log_amplitude[own & (table.series == series)]
            assert np.isnan(values).all() if missing else np.isfinite(values).all(), (layer, series)
