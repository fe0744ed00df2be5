"""What fills masked slots is a seam: any replacement passes waves, windows and shortcuts as it passes plain hooks."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headprobe
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadChannels, HeadLayout
from headprobe.backbone.masking.replacement import WITH_ZERO, LayerSlots, Replacement, replace_heads
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec, Variant, expand_all
from tests.conftest import tiny
from tests.families import build

KINDS = ["vit", "distilled", "siglip", "beit", "swin", "swin_v2", "swin_v2_cr"]


class Constant(Replacement):
    """Fills the slot of head h of layer l with a vector, the same for all tokens and images.

    Args:
        vectors: For every layer `[heads, head_dim]`.
    """

    name = "constant"

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self.vectors = vectors

    def fill(self, slots: LayerSlots) -> Tensor:
        shape = [1] * slots.heads_out.dim()
        shape[slots.channels.axis] = -1
        vector = self.vectors[slots.layer].flatten().view(shape).to(slots.heads_out.dtype)
        return torch.where(slots.masked, vector, slots.heads_out)


def vectors_of(layout: HeadLayout, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layer.heads, layer.head_dim, generator=generator) for layer in layout.layers]


def by_hooks(
    model: nn.Module, layout: HeadLayout, images: Tensor, masked: frozenset[tuple[int, int]], vectors: Sequence[Tensor]
) -> Tensor:
    """The logits of one plain forward pass in which a hook writes each masked head's vector over its channels."""

    def hook_of(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            heads_out, dim = args[0].clone(), layout.layers[number].head_dim
            for layer, head in masked:
                if layer == number:
                    heads_out[..., head * dim : (head + 1) * dim] = vectors[number][head]
            return (heads_out, *args[1:])

        return hook

    handles = [
        model.get_submodule(layer.point).register_forward_pre_hook(hook_of(number))
        for number, layer in enumerate(layout.layers)
    ]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("budget", [4, 1000])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_constants_of_any_head_pass_through_waves_windows_and_shortcuts_as_through_plain_hooks(
    kind: str, budget: int
) -> None:
    model = tiny(kind)
    size = tuple(model.pretrained_cfg["input_size"])
    size = (3, 64, 64) if kind != "vit" else size
    layout = find_heads(model, size, kind)
    joins, companies, calls = find_joins(model, layout)
    shortcuts = find_shortcuts(model, layout, joins, companies, calls)
    assert shortcuts.cores  # else the test would say nothing of them
    one, other = Constant(vectors_of(layout, 1)), Constant(vectors_of(layout, 2))
    specs = [MaskSpec("each:head"), MaskSpec("layer:1"), MaskSpec("all")]
    masks = [variant.mask.mask for variant in expand_all(specs, layout.heads_per_layer, kind)]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))

    # Three kinds of ablation of every mask, side by side in the same passes.
    kinds: list[Replacement] = [one, WITH_ZERO, other]
    keep = torch.stack([mask.keep() for mask in masks for _ in kinds])
    zeros = [torch.zeros_like(vector) for vector in one.vectors]
    expected = [
        by_hooks(model, layout, images, mask.masked, vectors)
        for mask in masks
        for vectors in (one.vectors, zeros, other.vectors)
    ]
    for allowed in (NO_SHORTCUTS, shortcuts):
        with GrowingPass(model, layout, joins, keep, allowed, kinds * len(masks)) as growing:
            plan = growing.plan(len(images), budget)
            parts = [growing.logits(part, plan) for part in images.split(plan.images)]
        found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found[0], model(images), atol=1e-5, rtol=1e-5)
        for number, logits in enumerate(expected):
            torch.testing.assert_close(found[1 + number], logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # the constants matter


def test_kept_heads_and_rows_of_other_kinds_keep_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    heads_out = torch.randn(6, 5, 8, generator=generator)  # three groups of two windows
    keep = torch.tensor([[True, True], [False, True], [True, False]])
    constant = Constant([torch.full((2, 4), 7.0)])
    found = replace_heads(LayerSlots(0, heads_out, keep, HeadChannels(2, 4)), [WITH_ZERO, constant, WITH_ZERO])
    expected = heads_out.clone()
    expected[2:4, :, :4] = 7
    expected[4:6, :, 4:] = 0
    assert torch.equal(found, expected)


def test_interleaved_channels_channels_first_and_channels_of_no_head_are_left_to_the_slots() -> None:
    heads_out = torch.arange(2 * 7 * 3, dtype=torch.float32).view(2, 7, 3)  # [rows, channels, tokens]
    keep = torch.tensor([[False, True, True], [True, True, False]])
    slots = LayerSlots(0, heads_out, keep, HeadChannels(3, 2, axis=1, interleaved=True))
    found = replace_heads(slots, [WITH_ZERO])
    expected = heads_out.clone()
    expected[0, [0, 3]] = 0
    expected[1, [2, 5]] = 0
    assert torch.equal(found, expected)


def test_groups_without_a_replacement_each_are_an_error() -> None:
    slots = LayerSlots(0, torch.zeros(6, 5, 8), torch.ones(3, 2, dtype=torch.bool), HeadChannels(2, 4))
    with pytest.raises(RunError, match="3 groups of rows need a replacement each, got 2"):
        replace_heads(slots, [WITH_ZERO, Constant([])])


@dataclass  # equal to its like, and without a hash
class Value(Replacement):
    """Fills every masked slot with one number."""

    value: float
    name = "value"

    def fill(self, slots: LayerSlots) -> Tensor:
        return slots.heads_out.masked_fill(slots.masked, self.value)


def test_equal_replacements_that_are_not_the_same_object_fill_their_rows_too() -> None:
    slots = LayerSlots(0, torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool), HeadChannels(2, 2))
    out = replace_heads(slots, [Value(1.0), Value(2.0), Value(1.0)])  # [rows, tokens, channels]
    assert out.unique(dim=1).squeeze(1).tolist() == [[1.0] * 4, [2.0] * 4, [1.0] * 4]


@pytest.mark.parametrize(
    "wrong", [None, torch.zeros(3, 2, 5), torch.zeros(2, 2, 4), torch.zeros(3, 2, 4, dtype=torch.float64)]
)
def test_what_does_not_fit_the_slots_is_one_message_with_ablation_and_layer(wrong: Any) -> None:
    class Wrong(Replacement):
        name = "wrong"

        def fill(self, slots: LayerSlots) -> Tensor:
            return wrong

    slots = LayerSlots(7, torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool), HeadChannels(2, 2))
    with pytest.raises(RunError, match=r"the ablation 'wrong' must return .* of layer 7, torch.float32 \[3, 2, 4\]"):
        replace_heads(slots, [Wrong()])


def test_a_growing_pass_takes_one_replacement_for_each_variant() -> None:
    model = tiny("vit")
    layout = find_heads(model, (3, 32, 32), "tiny")
    keep = torch.stack([mask.mask.mask.keep() for mask in expand_all([MaskSpec("each:layer")], (2, 2, 2), "tiny")])
    with pytest.raises(UsageError, match="3 variants need a replacement each, got 2"):
        GrowingPass(model, layout, find_joins(model, layout).joins, keep, replacements=[WITH_ZERO, WITH_ZERO])


def test_heads_masked_at_the_operator_take_zero_only() -> None:
    model = build("mvit")
    layout = find_heads(model, (3, 64, 64), "mvit", "attention")
    keep = torch.zeros(1, len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    with pytest.raises(UsageError, match=r"only ever set to zero; choose --model\.semantics slot .* got constant"):
        GrowingPass(model, layout, (), keep, NO_SHORTCUTS, [Constant([])])


@pytest.mark.parametrize("kind", ["mean", "position", "linear", "resample", "optimal"])
def test_heads_masked_at_the_operator_are_refused_before_any_image_is_opened(kind: str) -> None:
    probe = headprobe.HeadProbe(
        "mvitv2_tiny", pretrained=False, num_classes=5, options={"img_size": 64}, semantics="attention"
    )
    probe.choose_masks("layer:2", "zero")
    with pytest.raises(UsageError, match=rf"only ever set to zero; choose --model\.semantics slot .* got {kind}"):
        probe.choose_masks("layer:2", ["zero", kind])


@pytest.mark.parametrize(("ablation", "got"), [(["meen"], "'meen'"), ("meen", "'meen'"), ([], "an empty list")])
def test_an_unknown_ablation_or_none_is_refused_before_anything_runs(ablation: Any, got: str) -> None:
    with pytest.raises(UsageError, match=rf"an ablation must be one of zero, mean, .*, got {got}$"):
        headprobe.HeadProbe().choose_masks("layer:3", ablation=ablation)


def test_variants_are_every_mask_under_every_ablation() -> None:
    variants = expand_all([MaskSpec("each:layer")], (2, 2), "tiny", Ablations("zero,mean"))
    assert [(one.mask.name, one.ablation, one.draw) for one in variants] == [
        ("layer:0", "zero", 0),
        ("layer:0", "mean", 0),
        ("layer:1", "zero", 0),
        ("layer:1", "mean", 0),
    ]
    assert [one.name for one in variants] == ["layer:0", "layer:0 mean", "layer:1", "layer:1 mean"]
    assert Variant(variants[0].mask, "resample", 3).name == "layer:0 resample draw 3"


def test_slots_are_filled_in_exactly_two_places() -> None:
    package = Path(headprobe.__file__).parent
    calls = [
        str(file.relative_to(package))
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "replace_heads"
    ]
    assert calls == ["backbone/growing/shortcuts.py", "backbone/masking/ablation.py"]
