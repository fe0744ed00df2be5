"""Masks of every attention class against heads zeroed at the attention operator itself, found from timm's sources.

The table below and the mode that zeroes are this file's own: they use nothing of headprobe's sites or operators.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout, Semantics
from headprobe.backbone.heads.sites import class_path
from headprobe.backbone.masking.ablation import masked_logits
from tests.families import REPRESENTATIVES, build

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)

Where = Literal["axis 1", "axis 2", "rows"]
"""Where heads are in what attention gives: after the rows, after images and windows, or inside the rows."""


@dataclass(frozen=True)
class Operation:
    """How a class computes attention: by which call, and where the heads are in what it gives."""

    fused: bool = True
    where: Where = "axis 1"
    products: tuple[int, ...] = (-1,)
    """Which of its matrix products, counted from the end."""


PRODUCT = Operation(fused=False)

OPERATIONS: dict[str, Operation] = {
    "timm.models.cait.TalkingHeadAttn": PRODUCT,
    "timm.models.convit.GPSA": PRODUCT,
    "timm.models.convit.MHSA": PRODUCT,
    "timm.models.crossvit.CrossAttention": PRODUCT,
    "timm.models.davit.ChannelAttention": PRODUCT,
    "timm.models.davit.ChannelAttentionV2": PRODUCT,
    "timm.models.edgenext.CrossCovarianceAttn": PRODUCT,
    "timm.models.efficientformer.Attention": PRODUCT,
    "timm.models.efficientvit_mit.LiteMLA": PRODUCT,
    "timm.models.gcvit.WindowAttentionGlobal": PRODUCT,
    "timm.models.levit.Attention": PRODUCT,
    "timm.models.levit.AttentionDownsample": PRODUCT,
    "timm.models.swin_transformer.WindowAttention": PRODUCT,
    "timm.models.swin_transformer_v2.WindowAttention": PRODUCT,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": PRODUCT,
    "timm.models.tnt.Attention": PRODUCT,
    "timm.models.visformer.Attention": PRODUCT,
    "timm.models.volo.ClassAttention": PRODUCT,
    "timm.models.volo.OutlookAttention": PRODUCT,
    "timm.models.xcit.XCA": PRODUCT,
    "timm.layers.bottleneck_attn.BottleneckAttn": Operation(fused=False, where="rows"),
    "timm.layers.halo_attn.HaloAttn": Operation(fused=False, where="rows"),
    "timm.models.vision_transformer_sam.Attention": Operation(where="rows"),
    "timm.models.twins.LocallyGroupedAttn": Operation(where="axis 2"),
}
"""Classes that do not call the fused operator, or whose heads are not in axis 1 of what it gives."""

SLOTS = {
    "timm.models.mvitv2.MultiScaleAttention",
    "timm.models.coat.FactorAttnConvRelPosEnc",
    "timm.models.efficientformer_v2.Attention2d",
    "timm.models.efficientformer_v2.Attention2dDownsample",
    "timm.models.efficientvit_msra.CascadedGroupAttention",
}
"""Classes whose slots hold more than what their heads attended to, or feed other heads."""

AMBIGUOUS = [key for key, one in REPRESENTATIVES.items() if SLOTS & set(one.classes)]
PLAIN = [key for key in REPRESENTATIVES if key not in AMBIGUOUS]


LITE_MLA = {"timm.models.efficientvit_mit.LiteMLA"}


def operation_of(module: nn.Module, key: str) -> Operation:
    if class_path(module) == "timm.layers.lambda_layer.LambdaLayer":  # content and, one or two products later, position
        return Operation(fused=False, products=(-1, -3) if key.endswith("table") else (-1, -2))
    return OPERATIONS.get(class_path(module), Operation())


Change = Callable[[nn.Module, str, int, Tensor], Tensor]
"""Is given a running attention module, what was called in it, how often before, and the result, which it may change."""


@dataclass
class Calls(TorchFunctionMode):
    """Shows the calls made inside attention modules to `change`."""

    change: Change
    counts: dict[nn.Module, dict[str, int]] = field(default_factory=dict)
    open: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fused = "fused" if func is F.scaled_dot_product_attention else ""
        name = fused or ("product" if func in MATMULS else "softmax" if func in SOFTMAXES else "")
        if not name or not self.open:
            return result
        counts = self.counts.setdefault(self.open[-1], {"fused": 0, "product": 0, "softmax": 0})
        counts[name] += 1
        return self.change(self.open[-1], name, counts[name] - 1, result)


@contextmanager
def watched(modules: Sequence[nn.Module], change: Change) -> Iterator[Calls]:
    calls = Calls(change)
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(lambda m, _: calls.open.append(m)).remove)
            stack.callback(module.register_forward_hook(lambda *_: [calls.open.pop(), None][1]).remove)
        stack.enter_context(calls)
        yield calls


def setup(
    key: str, images: int = 3, semantics: Semantics = "slot"
) -> tuple[Any, HeadLayout, list[nn.Module], Tensor, Tensor]:
    """Return the model, its layout, its attention modules, images, and a mask for each image."""
    model, size = build(key), REPRESENTATIVES[key].input_size
    layout = find_heads(model, size, key, semantics)
    modules = [model.get_submodule(layer.name) for layer in layout.layers]
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(images, *size, generator=generator)
    keep = torch.rand(images, len(layout.layers), max(layout.heads_per_layer), generator=generator) < 0.6
    assert len({tuple(one.flatten().tolist()) for one in keep}) == images
    return model, layout, modules, drawn, keep


def of_rows(keep: Tensor, rows: int) -> Tensor:
    """Masks of images as masks of the rows of a layer, images' windows adjoining."""
    return keep.repeat_interleave(rows // len(keep), dim=0)


def zeroed(result: Tensor, keep: Tensor, where: Where) -> Tensor:
    """Zero heads in what attention gave."""
    heads = keep.shape[1]
    if where == "rows":
        kept = of_rows(keep, len(result) // heads).flatten()
        return torch.where(kept.view(-1, *[1] * (result.dim() - 1)), result, 0.0)
    kept = of_rows(keep, len(result))
    shape = [len(result), heads] if where == "axis 1" else [len(result), 1, heads]
    return torch.where(kept.view(*shape, *[1] * (result.dim() - len(shape))), result, 0.0)


def operator_zeroed(
    model: Any, modules: list[nn.Module], heads: Sequence[int], images: Tensor, keep: Tensor, key: str
) -> Tensor:
    """Logits with every layer's heads zeroed where its attention gives them."""
    operations = {module: operation_of(module, key) for module in modules}
    with watched(modules, lambda module, name, place, result: result) as calls:
        model(images)
    counts = calls.counts
    for module, operation in operations.items():
        assert (counts[module]["fused"] > 0) == operation.fused, class_path(module)

    def change(module: nn.Module, name: str, place: int, result: Tensor) -> Tensor:
        operation, number = operations[module], modules.index(module)
        if operation.fused:
            wanted = name == "fused"
        else:
            wanted = name == "product" and place - counts[module]["product"] in operation.products
        return zeroed(result, keep[:, number, : heads[number]], operation.where) if wanted else result

    with watched(modules, change):
        return model(images)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * scale


def differs(found: Tensor, plain: Tensor) -> None:
    """Every image's logits, or the comparison would say nothing."""
    assert bool(((found - plain).abs().amax(dim=1) > 1e-4 * plain.abs().max()).all())


@pytest.mark.any_timm
@pytest.mark.parametrize("key", PLAIN)
@torch.inference_mode()
def test_masks_of_images_equal_heads_zeroed_at_the_operator(key: str) -> None:
    model, layout, modules, images, keep = setup(key)
    expected = operator_zeroed(model, modules, REPRESENTATIVES[key].heads, images, keep, key)
    differs(expected, model(images))
    close(masked_logits(model, layout, images, keep), expected)


# -- heads whose slot holds more than what they attended to ----------------------------------------------------------


@contextmanager
def zeroed_columns(module: Any, keep: Tensor) -> Iterator[None]:
    """Take heads' columns out of a module's output projection."""
    weight = next(part.weight for part in module.proj.modules() if isinstance(part, nn.Linear | nn.Conv2d))
    before, size = weight.detach().clone(), weight.shape[1] // len(keep)
    for head in (~keep).nonzero().flatten().tolist():
        weight.data[:, head * size : (head + 1) * size] = 0
    try:
        yield
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("key", AMBIGUOUS)
@torch.inference_mode()
def test_masks_of_slots_equal_zeroed_columns_of_the_projection(key: str) -> None:
    model, layout, modules, images, keep = setup(key)
    found = masked_logits(model, layout, images, keep)
    differs(found, model(images))
    for row in range(len(images)):
        with ExitStack() as stack:
            for module, heads, kept in zip(modules, REPRESENTATIVES[key].heads, keep[row], strict=True):
                stack.enter_context(zeroed_columns(module, kept[:heads]))
            close(found[row : row + 1], model(images)[row : row + 1])


def attended_zeroed(model: Any, modules: list[nn.Module], heads: Sequence[int], images: Tensor, keep: Tensor) -> Tensor:
    """Logits without what heads attended to; what else their slots hold stays."""
    of_layer = {module: keep[:, n, : heads[n]] for n, module in enumerate(modules)}

    def change(module: nn.Module, name: str, place: int, result: Tensor) -> Tensor:
        if name != "softmax":
            return result
        if class_path(module).endswith(("FactorAttnConvRelPosEnc", "Attention2dDownsample")):
            return zeroed(result, of_layer[module], "axis 1")
        if class_path(module).endswith("CascadedGroupAttention"):  # one softmax for each head
            kept = of_rows(of_layer[module][:, place], len(result))
            return torch.where(kept.view(-1, *[1] * (result.dim() - 1)), result, 0.0)
        return result

    with ExitStack() as stack:
        for module in modules:
            for handle in _attended_hooks(module, of_layer[module]):
                stack.callback(handle.remove)
        stack.enter_context(watched(modules, change))
        return model(images)


def _attended_hooks(module: Any, keep: Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    if class_path(module).endswith("efficientformer_v2.Attention2d"):
        return [module.talking_head2.register_forward_hook(lambda m, args, out: zeroed(out, keep, "axis 1"))]
    if not class_path(module).endswith("MultiScaleAttention"):
        return []
    queries: list[Tensor] = []

    def at_projection(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        query = queries.pop().transpose(1, 2)  # [images, tokens, heads, head dim], which the slots hold too
        slots = args[0].unflatten(-1, query.shape[2:])
        return torch.where(keep[:, None, :, None], slots, query).flatten(-2)

    return [
        module.norm_q.register_forward_hook(lambda m, args, out: queries.append(out)),
        module.proj.register_forward_pre_hook(at_projection),
    ]


@pytest.mark.any_timm
@pytest.mark.parametrize("key", AMBIGUOUS)
@torch.inference_mode()
def test_masks_of_attention_alone_leave_what_else_slots_hold(key: str) -> None:
    model, layout, modules, images, keep = setup(key, semantics="attention")
    expected = attended_zeroed(model, modules, REPRESENTATIVES[key].heads, images, keep)
    differs(expected, model(images))
    found = masked_logits(model, layout, images, keep)
    close(found, expected)
    slots = masked_logits(model, find_heads(model, REPRESENTATIVES[key].input_size, key), images, keep)
    differs(slots, found)


# -- the growing pass ------------------------------------------------------------------------------------------------


def single_heads(layout: HeadLayout) -> Tensor:
    """Masks of one head each: of the first head of every layer, then of the last of those that have several.

    Of more than eight layers the last head of every third.
    """
    heads = [(layer, 0) for layer in range(len(layout.layers))]
    last = [(layer, count - 1) for layer, count in enumerate(layout.heads_per_layer) if count > 1]
    heads += last[:: step_of(layout)]
    keep = torch.ones(len(heads), len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    for mask, (layer, head) in enumerate(heads):
        keep[mask, layer, head] = False
    return keep


def in_order(layout: HeadLayout) -> Tensor:
    """Masks that begin alike: of the first layer and a middle one, these and the last, the first layer and the last."""
    last = len(layout.layers) - 1
    keep = torch.ones(3, last + 1, max(layout.heads_per_layer), dtype=torch.bool)
    for mask, layers in enumerate([(0, last // 2), (0, last // 2, last), (0, last)]):
        keep[mask, list(layers), 0] = False
    return keep


def step_of(layout: HeadLayout) -> int:
    return 1 if len(layout.layers) <= 8 else 3


def compare_growing(key: str, semantics: Semantics = "slot", together: bool = True, alone: bool = True) -> None:
    """Hold the growing pass, with and without shortcuts, to a plain pass for each mask: all in one, and some alone.

    Joins and shortcuts are found as in a run; then all is done in float64, where nothing is left to rounding.
    """
    model, layout, _, images, _ = setup(key, images=2, semantics=semantics)
    joins, companies, calls = find_joins(model, layout)
    keep = torch.cat([single_heads(layout), in_order(layout)])
    shortcuts = find_shortcuts(model, layout, joins, companies, calls)
    assert shortcuts.beginnings
    model, images = model.double(), images.double()
    expected = [masked_logits(model, layout, images, kept) for kept in keep]
    tolerance = 1e-5 if LITE_MLA & set(REPRESENTATIVES[key].classes) else 1e-9  # it multiplies in float32 at all times
    first, step = len(layout.layers), step_of(layout)
    for masks, waves in (
        (keep, [tuple(range(len(keep)))] * together),
        (keep[:first], [(mask,) for mask in range(0, first, step)] * alone),
    ):
        for allowed in dict.fromkeys([NO_SHORTCUTS, shortcuts]):
            with GrowingPass(model, layout, joins, masks, allowed, once=False) as growing:
                for wave in waves:
                    ordered = tuple(growing.beginnings.of_wave(wave))
                    found = growing.logits(images, RowPlan(len(images), len(images), (ordered,), (), len(images)))
                    for mask in wave:
                        close(found[1 + mask], expected[mask], tolerance)


@pytest.mark.parametrize("key", REPRESENTATIVES)
@torch.inference_mode()
def test_the_growing_pass_equals_a_plain_pass_for_single_heads_of_every_layer(key: str) -> None:
    compare_growing(key)


@torch.inference_mode()
def test_a_mask_alone_in_the_growing_pass_of_gcvit_equals_its_plain_pass() -> None:
    compare_growing("gcvit", together=False)


@pytest.mark.parametrize("key", ["mvit", "coat", "efficientformer_v2", "efficientvit_msra"])
@torch.inference_mode()
def test_the_growing_pass_equals_plain_passes_also_where_attention_alone_is_masked(key: str) -> None:
    compare_growing(key, "attention", alone=False)
