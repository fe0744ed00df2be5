"""What fills masked slots, held against folded weights and plain hooks: oracles that know no `LayerSlots`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.backbone.masking.replacement import AffineMap, Constant, Linear, Position, Replacement, Resample
from headprobe.backbone.sandbox import example_images
from headprobe.errors import RunError
from headprobe.masks.spec import MaskSpec, expand_all
from tests.conftest import TINY, tiny

SPECS = ["head:0.0+head:1.1", "head:0.1", "layer:1", "each:head"]

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind} with padding": (kind, {"img_size": (56, 72)}) for kind in ("swin", "swin_v2", "swin_v2_cr")
}
"""14 x 18 patches in windows of 4 x 4, shifted in every second block: padding below and to the right."""


@pytest.fixture(params=[*sorted(TINY), *PADDED])
def tiny_kind(request: pytest.FixtureRequest) -> str:
    """Run a test on every kind of tiny model, and on windows with padding."""
    return str(request.param)


def setup(kind: str) -> tuple[Any, HeadLayout, Tensor]:
    known, changed = PADDED.get(kind, (kind, {}))
    model = tiny(known, **changed)
    layout = find_heads(model, (3, *model.patch_embed.img_size), kind)
    return model, layout, example_images(model, layout.input_size, 4)


def random_constants(layout: HeadLayout, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layer.heads, layer.head_dim, generator=generator) for layer in layout.layers]


def one_keep(layout: HeadLayout, seed: int) -> Tensor:
    """One mask of about half of the heads, `[layers, max heads]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(layout.layers), max(layout.heads_per_layer), generator=generator) < 0.5


def random_maps(layout: HeadLayout, keep: Tensor, seed: int = 6) -> list[AffineMap]:
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for number, layer in enumerate(layout.layers):
        kept = keep[number, : layer.heads].repeat_interleave(layer.head_dim)
        inside, outside = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        matrix = torch.randn(len(outside), len(inside), generator=generator) / max(1, len(inside)) ** 0.5
        maps.append(AffineMap(inside, outside, matrix, torch.randn(len(outside), generator=generator)))
    return maps


def ablated(model: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor, fill: Replacement) -> Tensor:
    with ablating(model, layout, masks_of_rows(keep[None]), lambda: [fill]) as count:
        logits: Tensor = model(images)
    count.check(layout)
    return logits


def fold(model: nn.Module, layout: HeadLayout, maps: list[AffineMap]) -> None:
    """Make the smaller model: masked columns of W_O go, what they are predicted by goes into the kept ones."""
    for layer, affine in zip(layout.layers, maps, strict=True):
        projection: Any = model.get_submodule(layer.projection)
        weight = projection.weight.data
        if projection.bias is None:
            projection.bias = nn.Parameter(weight.new_zeros(len(weight)))
        columns = weight[:, affine.masked].clone()  # W[:, S]
        weight[:, affine.kept] += columns @ affine.matrix
        projection.bias.data += columns @ affine.offset
        weight[:, affine.masked] = 0


def foldable(layout: HeadLayout) -> None:
    if any(layer.inner_norm for layer in layout.layers):
        pytest.skip("a norm over all heads stands before the projection: nothing folds exactly")
    if any(layer.channels.axis == 1 or layer.channels.interleaved for layer in layout.layers):
        pytest.skip("heads are not the projection's columns in order")


@torch.inference_mode()
def test_a_constant_in_masked_slots_equals_the_model_with_folded_weights(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    foldable(layout)
    keep, constants = one_keep(layout, 1), random_constants(layout)
    found = ablated(model, layout, images, keep, Constant("mean", constants))
    maps = random_maps(layout, keep)
    folded = [
        AffineMap(m.kept, m.masked, torch.zeros_like(m.matrix), c.flatten()[m.masked])
        for m, c in zip(maps, constants, strict=True)
    ]
    assert (found - model(images)).abs().max() > 1e-3
    fold(model, layout, folded)
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_an_affine_prediction_in_masked_slots_equals_the_model_with_folded_weights(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    foldable(layout)
    keep = one_keep(layout, 2)
    maps = random_maps(layout, keep)
    found = ablated(model, layout, images, keep, Linear(maps))
    assert (found - model(images)).abs().max() > 1e-3
    fold(model, layout, maps)
    torch.testing.assert_close(found, model(images), atol=2e-5, rtol=1e-5)


def fills(layout: HeadLayout, keeps: Tensor, first: int = 0) -> list[Replacement]:
    """One replacement per variant, of every kind in turn, beginning with the `first`."""
    positions = [
        torch.randn(layer.rows * layer.tokens, layer.heads, layer.head_dim, generator=torch.Generator().manual_seed(9))
        for layer in layout.layers
    ]
    made: list[Replacement] = []
    for number, keep in enumerate(keeps):
        maps = [one if len(one.masked) else None for one in random_maps(layout, keep)]
        kinds: list[Replacement] = [Constant("mean", random_constants(layout)), Position(positions)]
        if not any(layer.inner_norm for layer in layout.layers):
            kinds.append(Linear(maps))
        made.append(kinds[(first + number) % len(kinds)])
    return made


@pytest.mark.parametrize("first", [0, 1, 2])  # the first of a wave stands for the trunk, which keeps all heads
@pytest.mark.parametrize("budget", [5, 1000])
@torch.inference_mode()
def test_a_growing_pass_fills_every_kind_as_plain_passes_do(tiny_kind: str, budget: int, first: int) -> None:
    model, layout, images = setup(tiny_kind)
    variants = expand_all([MaskSpec(spec) for spec in SPECS], layout.heads_per_layer, tiny_kind)
    keeps = torch.stack([variant.mask.mask.keep() for variant in variants])
    replacements = fills(layout, keeps, first)
    joins, companies, calls = find_joins(model, layout, range(len(layout.layers)))
    shortcuts = find_shortcuts(model, layout, joins, companies, calls)
    growing = GrowingPass(model, layout, joins, keeps, shortcuts, replacements)
    with growing:
        found = growing.logits(images, growing.plan(4, budget))
    for number, (keep, fill) in enumerate(zip(keeps, replacements, strict=True)):
        plain = ablated(model, layout, images, keep, fill)
        torch.testing.assert_close(found[1 + number], plain, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_resampling_takes_the_donor_image_of_the_unmasked_model(tiny_kind: str) -> None:
    model, layout, images = setup(tiny_kind)
    variants = expand_all([MaskSpec(spec) for spec in SPECS], layout.heads_per_layer, tiny_kind)
    keeps = torch.stack([variant.mask.mask.keep() for variant in variants])
    resample = Resample()
    resample.donors = torch.tensor([2, 0, 3, 1])
    joins, companies, calls = find_joins(model, layout, range(len(layout.layers)))
    shortcuts = find_shortcuts(model, layout, joins, companies, calls)
    growing = GrowingPass(model, layout, joins, keeps, shortcuts, [resample] * len(keeps))
    with growing:
        found = growing.logits(images, growing.plan(4, 1000))

    for number, keep in enumerate(keeps):
        plain = by_hooks(model, layout, images, keep, [2, 0, 3, 1])
        torch.testing.assert_close(found[1 + number], plain, atol=2e-5, rtol=1e-5)


def by_hooks(model: nn.Module, layout: HeadLayout, images: Tensor, keep: Tensor, donors: list[int]) -> Tensor:
    """Two plain passes: one keeps every layer's slots of the donors, one writes them over the masked channels."""
    kept: dict[int, Tensor] = {}

    def take(number: int) -> Any:
        return lambda _, args: kept.__setitem__(number, args[0].clone())

    def write(number: int) -> Any:
        layer = layout.layers[number]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            mine = args[0].clone()
            for head in range(layer.heads):
                if not keep[number, head]:
                    channels = [c for c in range(layer.channels.channels) if _head_of(layer, c) == head]
                    if layer.channels.axis == 1:
                        mine[:, channels] = kept[number][:, channels]
                    else:
                        mine[..., channels] = kept[number][..., channels]
            return (mine, *args[1:])

        return hook

    for make, pictures in ((take, images[donors]), (write, images)):
        handles = [
            model.get_submodule(layer.point).register_forward_pre_hook(make(number))
            for number, layer in enumerate(layout.layers)
        ]
        logits: Tensor = model(pictures)
        for handle in handles:
            handle.remove()
    return logits


def _head_of(layer: Any, channel: int) -> int:
    return channel % layer.heads if layer.channels.interleaved else channel // layer.head_dim


def test_resampling_outside_of_a_growing_pass_is_an_error() -> None:
    model, layout, images = setup("vit")
    with pytest.raises(RunError, match="needs the other images"):
        ablated(model, layout, images, one_keep(layout, 3), Resample())
