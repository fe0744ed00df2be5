"""Shortcuts leave out what they say and nothing else; the oracle of logits is a plain forward pass for each mask."""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Shortcuts
from tests.backbone.growing.shortcut_cases import (
    DEPTH,
    HEADS,
    SINGLE,
    TOKENS,
    growing_logits,
    masks,
    noise,
    plain_logits,
    random_masks,
    setup,
    small,
)

# -- what is left out --------------------------------------------------------------------------------------------------


class Observation:
    """Shapes `[rows, tokens]` that modules are given, counted by hooks of this file."""

    def __init__(self, model: Any) -> None:
        self.by_module: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.stack = ExitStack()
        for name, module in model.named_modules():
            if name.endswith(("norm1", "qkv", "proj", "norm2", "fc1", "fc2")) and name.startswith("blocks"):
                self.stack.callback(module.register_forward_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            self.by_module[name].append((args[0].shape[0], args[0].shape[1]))

        return lambda module, args, __: hook(module, args)


def seen_in(keep: Tensor, images: int, shortcuts: Shortcuts, plan: RowPlan | None = None, tapped: bool = False) -> Any:
    model, (layout, joins, _, _) = setup()
    records: list[LayerRecord] = []
    seen = Observation(model)
    with seen.stack, torch.inference_mode(), GrowingPass(model, layout, joins, keep, shortcuts) as growing:
        rows = growing.plan(images, 10_000) if plan is None else plan
        growing.logits(noise(images), rows, [Tap(records.append)] if tapped else [])
    return seen.by_module


def test_joining_rows_run_through_no_norm_and_no_attention_and_the_end_has_one_token() -> None:
    """Two images; two masks join at layer 0, none at layer 1, one at layer 2 and one masks heads of 0 and 2."""
    keep = masks([(0, 0)], [(0, 1)], [(2, 2)], [(0, 2), (2, 0)])
    seen = seen_in(keep, 2, setup()[1][2])
    trunk, joined, end = 2, 2 * 4, 2 * 5
    expected = {
        "blocks.0.norm1": (trunk, TOKENS),
        "blocks.0.attn.qkv": (trunk, TOKENS),
        "blocks.0.attn.proj": (joined, TOKENS),
        "blocks.0.norm2": (joined, TOKENS),
        "blocks.0.mlp.fc1": (joined, TOKENS),
        "blocks.1.norm1": (joined, TOKENS),
        "blocks.1.attn.qkv": (joined, TOKENS),
        "blocks.1.attn.proj": (joined, TOKENS),
        "blocks.1.norm2": (joined, TOKENS),
        "blocks.2.norm1": (joined, TOKENS),
        "blocks.2.attn.qkv": (joined, TOKENS),
        "blocks.2.attn.proj": (end, 1),
        "blocks.2.norm2": (end, 1),
        "blocks.2.mlp.fc1": (end, 1),
        "blocks.2.mlp.fc2": (end, 1),
    }
    assert {name: seen[name] for name in expected} == {name: [shape] for name, shape in expected.items()}


def test_without_shortcuts_all_rows_and_tokens_run_through_everything() -> None:
    keep = masks([(0, 0)], [(0, 1)], [(2, 2)])
    seen = seen_in(keep, 2, NO_SHORTCUTS)
    for layer, rows in enumerate((6, 6, 8)):
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1"):
            assert seen[f"blocks.{layer}.{name}"] == [(rows, TOKENS)]


def attention_flops(queries: bool) -> int:
    model, (layout, joins, shortcuts, _) = setup()
    assert shortcuts.pooled is not None
    allowed = replace(shortcuts, pooled=replace(shortcuts.pooled, queries=queries))
    layer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def products(query: list[int], key: list[int], *_: Any, **__: Any) -> int:
        return query[0] * query[1] * query[2] * key[2]

    counter = FlopCounterMode(display=False, custom_mapping={layer: products})
    with torch.inference_mode(), GrowingPass(model, layout, joins, masks([(2, 0)]), allowed) as growing, counter:
        growing.logits(noise(2), growing.plan(2, 100))
    return int(counter.get_flop_counts()["Global"][layer])


def test_only_the_pooled_queries_are_looked_up_in_the_last_attention() -> None:
    """Two images of the trunk alone in all three layers: rows x heads x queries x keys."""
    assert attention_flops(queries=False) == 3 * 2 * HEADS * TOKENS * TOKENS
    assert attention_flops(queries=True) == 2 * HEADS * (2 * TOKENS + 1) * TOKENS


def test_in_a_tapped_wave_nothing_is_left_out_but_in_waves_without_taps() -> None:
    keep = masks([(0, 0)], [(0, 1)], [(1, 0)], [(2, 0)])
    plan = RowPlan(batch_size=2, images=2, waves=((0, 1), (2, 3)), idle=(), budget=6)
    shortcuts = setup()[1][2]
    seen = seen_in(keep, 2, shortcuts, plan, tapped=True)
    assert seen["blocks.0.norm1"] == [(6, TOKENS), (2, TOKENS)]
    assert seen["blocks.1.norm1"] == [(6, TOKENS), (2, TOKENS)]
    assert seen["blocks.1.attn.proj"] == [(6, TOKENS), (4, TOKENS)]
    assert seen["blocks.2.attn.qkv"] == [(6, TOKENS), (4, TOKENS)]
    assert seen["blocks.2.norm2"] == [(6, TOKENS), (6, 1)]
    untapped = seen_in(keep, 2, shortcuts, plan)
    assert untapped["blocks.0.norm1"] == [(2, TOKENS), (2, TOKENS)]
    assert untapped["blocks.2.norm2"] == [(6, 1), (6, 1)]


@torch.inference_mode()
def test_taps_get_the_same_records_of_the_trunk_as_of_the_plain_model() -> None:
    model, (layout, joins, shortcuts, _) = setup()
    plain: list[LayerRecord] = []
    with tapping(model, layout, [Tap(plain.append)]):
        model(noise(2))
    records: list[LayerRecord] = []
    with GrowingPass(model, layout, joins, SINGLE, shortcuts) as growing:
        growing.logits(noise(2), growing.plan(2, 100), [Tap(records.append, growing.rows_of())])
    assert len(records) == len(plain) == DEPTH
    for mine, expected in zip(records, plain, strict=True):
        torch.testing.assert_close(mine.heads_out, expected.heads_out, atol=1e-5, rtol=1e-5)
        assert mine.stream_after is not None
        torch.testing.assert_close(mine.stream_after, expected.stream_after, atol=1e-5, rtol=1e-5)


# -- equal logits ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("budget", [1, 2, 5, 10_000])
def test_waves_budgets_and_single_images_change_no_logit(images: int, budget: int) -> None:
    model, found = setup()
    keep = torch.cat([random_masks(), SINGLE])
    expected = plain_logits(model, found[0], keep, noise(images))
    logits = growing_logits(model, found, keep, noise(images), found[2], budget)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits[2], logits[0])  # the mask without heads


@torch.inference_mode()
def test_channels_last_images_give_the_same_logits() -> None:
    model, found = setup()
    images = noise(2).to(memory_format=torch.channels_last)
    expected = plain_logits(model, found[0], SINGLE, noise(2))
    torch.testing.assert_close(growing_logits(model, found, SINGLE, images, found[2]), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_shortcuts_change_no_more_than_rounding(autocast: bool) -> None:
    model, found = setup()
    exact = plain_logits(model, found[0], SINGLE, noise(2))
    half, images = (model, noise(2)) if autocast else (small().bfloat16(), noise(2).bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        without = growing_logits(half, found, SINGLE, images, NO_SHORTCUTS).float()
        shortened = growing_logits(half, found, SINGLE, images, found[2]).float()
    scale = exact.abs().max()
    assert (shortened - without).abs().max() <= 0.02 * scale
    assert (shortened - exact).abs().max() <= 1.5 * (without - exact).abs().max() + 0.005 * scale


def test_outside_inference_mode_nothing_is_overwritten_and_gradients_are_those_of_plain_passes() -> None:
    model, found = small(), setup()[1]
    images, before = noise(2).requires_grad_(), {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = torch.randn(1 + len(SINGLE), 2, 10, generator=torch.Generator().manual_seed(1))
    gradients: list[list[Tensor]] = []
    for logits in (
        growing_logits(model, found, SINGLE, images, found[2]),
        plain_logits(model, found[0], SINGLE, images),
    ):
        model.zero_grad()
        images.grad = None
        (logits * weights).sum().backward()  # raises where a tensor that it needs was overwritten
        assert images.grad is not None
        gradients.append([images.grad, *(p.grad.clone() for p in model.parameters())])
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4 * float(plain.abs().max()) + 1e-7, rtol=1e-4)
    assert torch.equal(images.detach(), noise(2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.inference_mode()
def test_after_an_exception_the_next_pass_is_right() -> None:
    model, found = setup()
    layout, joins, shortcuts, _ = found
    expected = plain_logits(model, layout, SINGLE, noise(2))
    growing = GrowingPass(model, layout, joins, SINGLE, shortcuts)
    plan = growing.plan(2, 1000)
    for module in (model.blocks[0].attn.qkv, model.blocks[2].attn.qkv):  # rows are left out, tokens too
        broken = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), growing:
            growing.logits(noise(2), plan)
        broken.remove()
    with growing:
        torch.testing.assert_close(growing.logits(noise(2), plan), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(noise(2)), expected[0], atol=1e-5, rtol=1e-5)
