from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import masked_logits
from headprobe.backbone.masking.replacement import WITH_ZERO, Constant
from headprobe.backbone.preparation import normalised
from headprobe.backbone.sandbox import example_images
from headprobe.errors import RunError, UsageError
from tests.conftest import tiny


def setup(kind: str, images: int = 3) -> tuple[nn.Module, HeadLayout, Tensor]:
    model: Any = tiny(kind)
    layout = find_heads(model, (3, *model.patch_embed.img_size), kind)
    return model, layout, example_images(model, layout.input_size, images)


def single_head_masks(layout: HeadLayout) -> Tensor:
    heads = [(layer, head) for layer, count in enumerate(layout.heads_per_layer) for head in range(count)]
    keep = torch.ones(len(heads), len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    for mask, (layer, head) in enumerate(heads):
        keep[mask, layer, head] = False
    return keep


def random_masks(layout: HeadLayout, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(count, len(layout.layers), max(layout.heads_per_layer), generator=generator) < 0.8
    for layer, heads in enumerate(layout.heads_per_layer):
        keep[:, layer, heads:] = True
    keep[1] = True  # a mask without heads
    return keep


@torch.inference_mode()
def test_all_masks_at_once_equal_one_plain_forward_pass_each(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    keep = torch.cat([single_head_masks(layout), random_masks(layout, 5)])
    with GrowingPass(model, layout, find_joins(model, layout).joins, keep) as growing:
        found = growing.logits(images, growing.plan(3, 10_000))
    expected = torch.stack([model(images), *(masked_logits(model, layout, images, mask) for mask in keep)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("budget", [3, 8, 10_000])
def test_equal_masks_under_one_replacement_run_once_and_have_equal_logits(budget: int) -> None:
    model, layout, images = setup("vit")
    few = single_head_masks(layout)[:3]
    keep = torch.cat([few, torch.ones_like(few[:1]), few[:2], few[:2], torch.ones_like(few[:1])])
    mean = Constant("mean", [torch.full((layer.heads, layer.head_dim), 0.5) for layer in layout.layers])
    other = Constant("mean", mean.constants)  # another object: another replacement
    fills = [*[WITH_ZERO] * 6, mean, other, WITH_ZERO]
    with GrowingPass(model, layout, find_joins(model, layout).joins, keep, replacements=fills) as growing:
        assert growing.beginnings.same == [0, 1, 2, 3, 0, 1, 6, 7, 3]
        plan = growing.plan(3, budget)
        found = growing.logits(images, plan)
    assert sorted(variant for wave in plan.waves for variant in wave) == [0, 1, 2, 6, 7]
    assert sorted(plan.idle) == [3, 4, 5, 8]
    assert torch.equal(found[5], found[1])
    assert torch.equal(found[6], found[2])
    assert torch.equal(found[9], found[0])
    expected = torch.stack([masked_logits(model, layout, images, mask) for mask in keep[:6]])
    torch.testing.assert_close(found[1:7], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[7], found[1], atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("budget", [1, 2, 5, 12, 10_000])
def test_waves_change_nothing(budget: int) -> None:
    model, layout, images = setup("swin")
    keep = random_masks(layout, 9)
    with GrowingPass(model, layout, find_joins(model, layout).joins, keep) as growing:
        plan = growing.plan(3, budget)
        found = torch.cat([growing.logits(part, plan) for part in images.split(plan.images)], dim=1)
    expected = torch.stack([model(images), *(masked_logits(model, layout, images, mask) for mask in keep)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_without_masks_the_logits_are_the_plain_models_bit_for_bit(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    keep = torch.ones(0, len(layout.layers), max(layout.heads_per_layer), dtype=torch.bool)
    with GrowingPass(model, layout, find_joins(model, layout).joins, keep) as growing:
        assert torch.equal(growing.logits(images, growing.plan(3, 64))[0], model(images))


@torch.inference_mode()
def test_a_mask_without_heads_gets_the_baselines_logits_bit_for_bit() -> None:
    model, layout, images = setup("vit")
    with GrowingPass(model, layout, find_joins(model, layout).joins, random_masks(layout, 4)) as growing:
        logits = growing.logits(images, growing.plan(3, 64))
    assert torch.equal(logits[2], logits[0])


@torch.inference_mode()
def test_no_module_runs_more_than_once_and_rows_grow_with_depth() -> None:
    model, layout, images = setup("vit")
    rows: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    with GrowingPass(model, layout, find_joins(model, layout).joins, single_head_masks(layout)) as growing:
        rows.clear()
        growing.logits(images, growing.plan(3, 10_000))
    assert rows == [3 * (1 + 2 * (layer + 1)) for layer in range(6)]


class CountOperators(TorchDispatchMode):
    """Counts what runs, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


HOST_WAITS = ("aten.lift_fresh.default", "aten.index.Tensor", "aten.item.default")
"""Numbers of the host become a tensor, places that a tensor holds are taken, a number of a tensor is read."""


@torch.inference_mode()
def test_the_host_of_a_gpu_waits_for_nothing_in_a_pass_whose_masks_it_knows() -> None:
    model, layout, _ = setup("vit")
    config = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    images = torch.zeros(3, *layout.input_size, dtype=torch.uint8)
    with GrowingPass(model, layout, find_joins(model, layout).joins, single_head_masks(layout)) as growing:
        growing.logits(normalised(images, config, torch.float32), growing.plan(3, 100))
        with CountOperators() as count:
            growing.logits(normalised(images, config, torch.float32), growing.plan(3, 100))
        with CountOperators() as waits:  # what each layer did before: the names are right
            assert growing.keep[[0], 0].any().item()
    assert {*HOST_WAITS} <= waits.names.keys()
    assert count.names["aten.gelu.default"] == len(layout.layers)
    assert not count.names.keys() & {*HOST_WAITS}


@torch.inference_mode()
def test_siglip_masks_of_the_pooling_head_join_at_the_pooling_head() -> None:
    model, layout, _ = setup("siglip")
    assert [join.module for join in find_joins(model, layout).joins] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "attn_pool",
    ]


@torch.inference_mode()
def test_trials_of_joins_run_one_image_alone_and_two_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, _ = setup("vit")
    layers = len(layout.layers)
    sizes: list[int] = []
    forward = type(model).forward

    def note(self: Any, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", note)
    rows: list[int] = []
    growing = GrowingPass._forward

    def count(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        logits = growing(self, images, wave, whole)
        rows.append(logits.shape[0] * logits.shape[1])
        return logits

    monkeypatch.setattr(GrowingPass, "_forward", count)
    found = find_joins(model, layout)
    assert rows == [*[2] * layers, 2 * (1 + 2 * layers), 7]  # copies of a mask have rows of their own in trials
    # plain, beside another image, twice, one alone; a plain pass and a trial for each layer; all layers; the crowd
    assert sorted(sizes) == sorted([2, 2, 4, 1, *[1] * 2 * layers, 2, 1])
    (company,) = found.companies
    assert company.logits.shape[:2] == (1 + 2 * layers, 2)


class Shortcut(nn.Module):
    """A path around each pair of blocks: rows that join inside it would not fit what goes around."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@torch.inference_mode()
def test_where_a_path_leads_around_a_block_the_join_moves_outward() -> None:
    model: Any = tiny("vit")
    model.blocks[2] = Shortcut(model.blocks[2])
    layout = find_heads(model, (3, 160, 160), "shortcut")
    joins = find_joins(model, layout).joins
    assert [join.module for join in joins][1:4] == ["blocks.1", "blocks.2", "blocks.3"]
    images = example_images(model, layout.input_size, 2)
    keep = single_head_masks(layout)
    with GrowingPass(model, layout, joins, keep) as growing:
        found = growing.logits(images, growing.plan(2, 100))
    expected = torch.stack([masked_logits(model, layout, images, mask) for mask in keep])
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=1e-5)


class BatchMean(nn.Module):
    """A model whose images influence each other: no row can be trusted beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("vit")
        self.num_prefix_tokens = 1

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits - logits.mean(dim=0)


def test_a_model_whose_rows_influence_each_other_is_refused() -> None:
    model = BatchMean()
    layout = find_heads(model, (3, 160, 160), "batch_mean")
    with pytest.raises(UsageError, match="rows of one batch influence each other"):
        find_joins(model, layout)


@torch.inference_mode()
def test_after_an_exception_no_hook_is_left() -> None:
    model, layout, images = setup("swin")
    plain = model(images)
    joins = find_joins(model, layout).joins
    with pytest.raises(RuntimeError), GrowingPass(model, layout, joins, random_masks(layout, 3)) as growing:
        growing.logits(images[:, :1], growing.plan(3, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(images), plain)


@torch.inference_mode()
def test_masks_that_join_after_their_layer_are_an_error_and_never_scored() -> None:
    model, layout, images = setup("vit")
    joins = tuple(reversed(find_joins(model, layout).joins))
    with (
        GrowingPass(model, layout, joins, single_head_masks(layout)) as growing,
        pytest.raises(RunError, match="too late"),
    ):
        growing.logits(images, growing.plan(3, 64))


@torch.inference_mode()
def test_masks_that_never_join_are_an_error_and_never_scored() -> None:
    model, layout, images = setup("vit")
    keep = single_head_masks(layout)[:1]
    nowhere = [replace(join, module="head_drop") for join in find_joins(model, layout).joins]
    with GrowingPass(model, layout, nowhere, keep) as growing, pytest.raises(RunError):
        growing.logits(images, growing.plan(3, 64))
