"""Masks that begin alike share rows until they part; the oracles are plain forward passes and sets of prefixes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.growing import growing_pass
from headprobe.backbone.growing.beginnings import Beginnings, Join, beginning_layers
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.row_plan import Arguments, Batched, grown
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Shortcuts
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.masking.ablation import ablating
from headprobe.backbone.masking.replacement import WITH_ZERO, AffineMap, Constant, Linear, Replacement
from headprobe.backbone.sandbox import example_images
from tests.backbone.growing.shortcut_cases import (
    DEPTH,
    HEADS,
    Found,
    found_in,
    growing_logits,
    masks,
    noise,
    plain_logits,
    setup,
    small,
)
from tests.conftest import tiny

LAYERS = 5
SHARED = Shortcuts(beginnings=True)

# -- where rows begin --------------------------------------------------------------------------------------------------

masks_of_five_layers = st.lists(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=12
)


def joins_of(places: Sequence[int], proven: Sequence[bool] | None = None) -> list[Join]:
    tried = [True] * len(places) if proven is None else proven
    return [Join(str(place), place, (), of_layer) for place, of_layer in zip(places, tried, strict=True)]


def beginnings_of(keep: Tensor, joins: Sequence[Join], shared: bool = True) -> Beginnings:
    return Beginnings(keep, [WITH_ZERO] * len(keep), joins, shared, once=True)


@given(masks_of_five_layers)
def test_as_many_rows_run_through_a_layer_as_there_are_different_beginnings_up_to_it(heads: Any) -> None:
    keep = torch.tensor(heads)
    beginnings = beginnings_of(keep, joins_of(range(LAYERS)))
    begin = beginnings.of_wave(beginnings.order)
    for layer in range(LAYERS):
        different = {tuple(map(tuple, mask[: layer + 1])) for mask in keep.tolist()}
        different.add(((True, True),) * (layer + 1))  # the trunk
        assert 1 + sum(one.layer <= layer for one in begin.values()) == len(different)


@given(masks_of_five_layers, st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), st.data())
def test_rows_are_copies_of_rows_that_are_there_and_masked_alike(heads: Any, proven: list[bool], data: Any) -> None:
    """Joins of some layers were not tried, and layers 1 and 2, or 3 and 4, may join at one module around both."""
    keep = torch.tensor(heads)
    places = [0, *data.draw(st.sampled_from([(1, 2, 3, 4), (1, 1, 3, 4), (1, 2, 3, 3), (1, 1, 3, 3)]))]
    firsts = {next(at for at, layer in enumerate(mask) if not all(layer)) for mask in heads if not all(map(all, mask))}
    joins = joins_of(places, [tried or at in firsts for at, tried in enumerate(proven)])
    beginnings = beginnings_of(keep, joins)
    begin = beginnings.of_wave(beginnings.order)
    there: dict[int | None, int] = {None: -1}  # when the rows joined
    for variant, (layer, copied) in begin.items():
        place = joins[layer].place
        assert joins[layer].proven
        assert there[copied] < place
        assert place >= max(there.values())  # in the order of joining
        inside = [at for at in range(LAYERS) if places[at] < place]  # layers that have run by then
        before = torch.ones(LAYERS, 2, dtype=torch.bool) if copied is None else keep[copied]
        assert torch.equal(keep[variant][inside], before[inside])
        there[variant] = place
    assert sorted(begin) == sorted(beginnings.order)


def test_masks_under_different_fills_share_rows_only_where_neither_masks_anything() -> None:
    keep = masks([(1, 0), (2, 1)], [(1, 0), (2, 2)], [(1, 0), (2, 0)])
    mean = Constant("mean", [torch.zeros(HEADS, 4)] * DEPTH)
    beginnings = Beginnings(keep, [WITH_ZERO, WITH_ZERO, mean], joins_of(range(DEPTH)), shared=True, once=True)
    assert {variant: tuple(one) for variant, one in beginnings.of_wave([0, 1, 2]).items()} == {
        0: (1, None),
        1: (2, 0),
        2: (1, None),
    }


def test_rows_may_begin_at_first_layers_and_where_neighbours_part() -> None:
    keep = masks([(0, 0), (1, 0)], [(0, 0), (2, 0)], [])
    assert beginning_layers(keep, [WITH_ZERO] * 3) == {0, 1}
    assert beginning_layers(masks([]), [WITH_ZERO]) == set()


def test_without_the_permission_all_begin_as_copies_of_the_trunk() -> None:
    keep = masks([(0, 0), (1, 0)], [(0, 0), (2, 0)], [(2, 1)])
    beginnings = beginnings_of(keep, joins_of(range(DEPTH)), shared=False)
    assert list(beginnings.of_wave([0, 1, 2]).values()) == [(0, None), (0, None), (2, None)]


# -- logits ------------------------------------------------------------------------------------------------------------


def tree(layers: int, heads: Sequence[int], seed: int = 1) -> Tensor:
    """Masks `[masks, layers, max heads]` of heads removed in three orders, of which two begin alike."""
    generator = torch.Generator().manual_seed(seed)
    every = [(layer, head) for layer, count in enumerate(heads) for head in range(count)]
    orders = [[every[at] for at in torch.randperm(len(every), generator=generator)] for _ in range(2)]
    orders[1] = orders[0][:2] + [one for one in orders[1] if one not in orders[0][:2]]
    late_first = sorted(orders[0], key=lambda one: -one[0])
    keep = torch.ones(0, layers, max(heads), dtype=torch.bool)
    for order in (*orders, late_first):
        for count in range(1, len(every), max(1, len(every) // 5)):
            mask = torch.ones(1, layers, max(heads), dtype=torch.bool)
            for layer, head in order[:count]:
                mask[0, layer, head] = False
            keep = torch.cat([keep, mask])
    return keep


@torch.inference_mode()
@pytest.mark.parametrize("budget", [6, 16, 10_000])
def test_masks_of_orders_equal_plain_passes_in_any_waves(tiny_kind: str, budget: int) -> None:
    model: Any = tiny(tiny_kind)
    layout = find_heads(model, (3, *model.patch_embed.img_size), tiny_kind)
    images = example_images(model, layout.input_size, 2)
    keep = tree(len(layout.layers), layout.heads_per_layer)
    joins, companies, calls = find_joins(model, layout)
    found = layout, joins, find_shortcuts(model, layout, joins, companies, calls), tuple(companies)
    assert found[2].beginnings
    logits = growing_logits(model, found, keep, images, found[2], budget)
    torch.testing.assert_close(logits, plain_logits(model, layout, keep, images), atol=2e-5, rtol=2e-5)


class Odd(Replacement):
    """Fills with 2 in odd layers, and with 3 in even ones."""

    name = "odd"

    def fill(self, slots: Any) -> Tensor:
        return slots.with_masked(slots.heads_out.new_full((), 2.0 if slots.layer % 2 else 3.0))


def of_layer(mask: Tensor, layer: int) -> Tensor:
    return mask[layer][None]


def linear(found: Found, keep: Tensor, known: dict[Any, AffineMap]) -> Linear:
    maps: list[AffineMap | None] = []
    for number, layer in enumerate(found[0].layers):
        kept = keep[number].repeat_interleave(layer.head_dim)
        key = number, tuple(keep[number].tolist())
        if key not in known and not kept.all():
            generator = torch.Generator().manual_seed(number)
            inputs, outputs = kept.nonzero().flatten(), (~kept).nonzero().flatten()
            matrix = torch.randn(len(outputs), len(inputs), generator=generator) / 10
            known[key] = AffineMap(inputs, outputs, matrix, torch.randn(len(outputs), generator=generator))
        maps.append(known.get(key))
    return Linear(maps)


@torch.inference_mode()
@pytest.mark.parametrize("shortcuts", [NO_SHORTCUTS, SHARED, None])
@pytest.mark.parametrize("budget", [14, 10_000])
def test_masks_of_orders_under_several_fills_equal_plain_passes(shortcuts: Shortcuts | None, budget: int) -> None:
    model, found = setup()
    layout, joins, all_of_them, _ = found
    keep = tree(DEPTH, (HEADS,) * DEPTH).repeat(4, 1, 1)
    part = len(keep) // 4
    mean = Constant("mean", [torch.full((HEADS, layer.head_dim), 0.3) for layer in layout.layers])
    known: dict[Any, AffineMap] = {}
    fills = [*[WITH_ZERO] * part, *[mean] * part, *[Odd()] * part]
    fills += [linear(found, mask, known) for mask in keep[:part]]
    allowed = all_of_them if shortcuts is None else shortcuts
    with GrowingPass(model, layout, joins, keep, allowed, fills) as growing:
        plan = growing.plan(2, budget)
        logits = torch.cat([growing.logits(images, plan) for images in noise(2).split(plan.images)], dim=1)
    for variant, (mask, fill) in enumerate(zip(keep, fills, strict=True)):
        with ablating(model, layout, partial(of_layer, mask), partial(list, [fill])):
            expected = model(noise(2))
        torch.testing.assert_close(logits[1 + variant], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_rows_that_have_not_parted_run_through_a_block_once() -> None:
    """Four masks in two pairs: 1 + 1 rows of an image in block 0, 1 + 2 in block 1, 1 + 4 in block 2."""
    model, (layout, joins, shortcuts, _) = setup()
    keep = masks([(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 1)], [(0, 0), (1, 1), (2, 0)], [(0, 0), (1, 1), (2, 2)])
    rows: list[int] = []
    handles = [block.mlp.register_forward_hook(lambda _, __, out: rows.append(len(out))) for block in model.blocks]
    with GrowingPass(model, layout, joins, keep, shortcuts) as growing:
        plan = growing.plan(2, 100)
        growing.logits(noise(2), plan)
        assert growing.layers_run(plan.waves[0]) == 2 + 3 + 5
    assert rows == [2 * 2, 2 * 3, 2 * 5]
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def test_a_tap_of_a_mask_sees_the_rows_that_stand_for_it() -> None:
    model, (layout, joins, shortcuts, _) = setup()
    keep = masks([(0, 0)], [(0, 0), (2, 1)])
    seen: list[Any] = []
    with GrowingPass(model, layout, joins, keep, shortcuts) as growing:
        growing.logits(noise(2), growing.plan(2, 100), [Tap(seen.append, growing.rows_of(1))])
    expected: list[Any] = []
    with (
        ablating(model, layout, lambda layer: keep[1:, layer], lambda: [WITH_ZERO]),
        tapping(model, layout, [Tap(expected.append)]),
    ):
        model(noise(2))
    for mine, plain in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine.heads_out, plain.heads_out, atol=1e-5, rtol=1e-5)


# -- the trial ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_where_copies_of_copies_go_wrong_all_rows_begin_as_the_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_trunk(args: Any, kwargs: Any, batched: Batched, images: int, copied: Sequence[int]) -> Arguments:
        return grown(args, kwargs, batched, images, [0] * len(copied))

    monkeypatch.setattr(growing_pass, "grown", of_trunk)
    model = small()
    found = found_in(model)
    assert found[2] == replace(setup()[1][2], beginnings=False)
    keep = tree(DEPTH, (HEADS,) * DEPTH)
    logits = growing_logits(model, found, keep, noise(2), found[2])
    torch.testing.assert_close(logits, plain_logits(model, found[0], keep, noise(2)), atol=1e-5, rtol=1e-5)
