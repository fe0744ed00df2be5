"""The oracle is float64 numpy on all samples at once; every head output is drawn from a seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from headprobe.errors import RunError, UsageError
from headprobe.metrics.similarity.head_blocks import Sampling
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments

LAYERS = [LayerHeads(3, 4, 1), LayerHeads(2, 5, 1)]  # ragged, as in Swin
IMAGES, TOKENS = 11, 5


def draw(images: int = IMAGES, tokens: int = TOKENS, mean: float = 3.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(images, tokens, *layer[:2], generator=generator, dtype=torch.float64) for layer in LAYERS]
    return [layer + mean for layer in layers]


def stream(metric: Moments, outputs: Sequence[Tensor], batch: int, unit: int = 0, group: int = 0) -> Moments:
    for start in range(0, len(outputs[0]), batch):
        for layer, output in enumerate(outputs):
            metric.update(layer, output[start : start + batch], unit, group)
    metric.close(unit)
    return metric


def rows(output: Tensor) -> NDArray[np.float64]:
    """All samples, `[images * tokens, heads, head_dim]`, about their mean."""
    flat = output.double().numpy().reshape(-1, *output.shape[2:])
    return flat - flat.mean(axis=0)


def assert_same_moments(one: Moments, other: Moments, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(one.compute(), other.compute(), strict=True):
        assert mine.images == theirs.images
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=tolerance)
        for ours, others in ((mine.own, theirs.own), (mine.shifted, theirs.shifted)):
            assert ours is not None
            assert others is not None
            assert ours.samples == others.samples
            for array, expected in zip(ours[1:], others[1:], strict=True):
                np.testing.assert_allclose(array, expected, atol=tolerance * np.nanmax(np.abs(array)), rtol=0)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_moments_are_numpys_even_of_a_large_mean(mean: float, precision: Any) -> None:
    outputs = draw(mean=mean)
    metric = stream(Moments(LAYERS, MomentOptions(precision=precision)), outputs, batch=4)
    tolerance = {"float64": 1e-12, "float32": 1e-6}[precision]
    for output, found in zip(outputs, metric.compute(), strict=True):
        samples = rows(output)
        flat, squares = samples.reshape(len(samples), -1), np.square(samples).sum(axis=2)
        np.testing.assert_allclose(found.mean, output.flatten(2).mean(dim=(0, 1)), rtol=1e-12, atol=1e-7)
        np.testing.assert_allclose(found.norms, squares.sum(axis=0), rtol=10 * tolerance)
        np.testing.assert_allclose(found.own.products, flat.T @ flat, atol=tolerance * squares.sum(), rtol=0)
        np.testing.assert_allclose(found.own.norm_products, squares.T @ squares, rtol=10 * tolerance)


def later(products: NDArray[np.float64], dims: int) -> NDArray[np.float64]:
    """NaN where a row's head, of `dims` channels, stands beside an earlier one."""
    head = np.arange(len(products)) // dims
    return np.where(head[:, None] <= head, products, np.nan)


def test_shifted_moments_pair_each_image_with_the_next_and_the_last_with_the_first() -> None:
    outputs = draw()
    metric = stream(Moments(LAYERS, MomentOptions()), outputs, batch=4)
    for output, found in zip(outputs, metric.compute(), strict=True):
        samples = rows(output).reshape(IMAGES, TOKENS, -1)
        following = np.roll(samples, -1, axis=0)
        assert found.shifted is not None
        expected = np.einsum("itc,itd->cd", samples, following)
        expected = later(expected, output.shape[3])
        np.testing.assert_allclose(found.shifted.products, expected, atol=1e-12 * IMAGES * TOKENS)
        squares = np.square(rows(output)).sum(axis=2).reshape(IMAGES, TOKENS, -1)
        expected = np.einsum("itg,ith->gh", squares, np.roll(squares, -1, axis=0))
        np.testing.assert_allclose(found.shifted.norm_products, later(expected, 1), rtol=1e-12)


@pytest.mark.parametrize("sampling", ["class", "mean"])
def test_with_one_sample_per_image_the_noise_floor_is_float64(sampling: Sampling) -> None:
    outputs = draw()
    metric = stream(Moments(LAYERS, MomentOptions(sampling=sampling)), outputs, batch=3)
    for output, found in zip(outputs, metric.compute(), strict=True):
        chosen = output[:, 0] if sampling == "class" else output.mean(dim=1)
        samples = chosen.flatten(1).numpy() - chosen.flatten(1).numpy().mean(axis=0)
        assert found.shifted is not None
        expected = later(samples.T @ np.roll(samples, -1, axis=0), output.shape[3])
        np.testing.assert_allclose(found.shifted.products, expected, atol=1e-12)


def test_pairs_never_cross_a_unit() -> None:
    outputs = draw()
    parts = [[layer[:6] for layer in outputs], [layer[6:] for layer in outputs]]
    together = Moments(LAYERS)
    for unit, part in enumerate(parts):
        stream(together, part, 4, unit)
    apart = stream(Moments(LAYERS), parts[0], 6)
    apart.merge(stream(Moments(LAYERS), parts[1], 5))
    assert_same_moments(together, apart)


def test_units_may_interleave() -> None:
    first, second = draw(seed=1), draw(seed=2)
    metric, expected = Moments(LAYERS), Moments(LAYERS)
    for start in range(0, IMAGES, 3):
        for unit, outputs in enumerate((first, second)):
            for layer, output in enumerate(outputs):
                metric.update(layer, output[start : start + 3], unit)
    metric.close(0)
    metric.close(1)
    stream(stream(expected, first, IMAGES, 0), second, IMAGES, 1)
    assert_same_moments(metric, expected)


def test_an_image_alone_in_its_unit_has_no_next_one() -> None:
    found = stream(Moments(LAYERS), draw(images=1), 1).compute()[0]
    assert found.shifted is not None
    assert (found.own.samples, found.shifted.samples) == (TOKENS, 0)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, IMAGES), scope=st.sampled_from(["within", "all"]), mean=st.sampled_from([0.0, 1e4]))
def test_results_do_not_depend_on_the_batch_size(batch: int, scope: Any, mean: float) -> None:
    options = MomentOptions(scope=scope, sampling="class")
    outputs = draw(mean=mean)
    assert_same_moments(
        stream(Moments(LAYERS, options), outputs, batch), stream(Moments(LAYERS, options), outputs, IMAGES)
    )


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, IMAGES), batch=st.integers(1, 4), drift=st.sampled_from([0.0, 1e3]))
def test_two_halves_merge_to_the_whole(cut: int, batch: int, drift: float) -> None:
    outputs = [layer + drift * (torch.arange(IMAGES) >= cut)[:, None, None, None] for layer in draw()]
    options = MomentOptions(noise_floor=False)
    halves = [stream(Moments(LAYERS, options), [o[s] for o in outputs], batch) for s in (slice(cut), slice(cut, None))]
    merged, other = (half.empty().from_arrays(half.to_arrays()) for half in halves)
    merged.merge(other)
    whole = stream(Moments(LAYERS, options), outputs, IMAGES)
    for mine, theirs in zip(merged.compute(), whole.compute(), strict=True):
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-12)
        for array, expected in zip(mine.own[1:], theirs.own[1:], strict=True):
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-12 * np.abs(np.asarray(expected)).max())


def test_arrays_and_back_are_equal_to_the_last_bit() -> None:
    metric = stream(Moments(LAYERS, MomentOptions(scope="pairs", sampling="mean"), [(1, 0)]), draw(), 4)
    arrays = metric.to_arrays()
    again = metric.empty().from_arrays(arrays).to_arrays()
    assert arrays.keys() == again.keys()
    assert all(arrays[name].tobytes() == again[name].tobytes() for name in arrays)


def test_arrays_of_another_shape_are_refused() -> None:
    arrays = Moments(LAYERS).to_arrays()
    with pytest.raises(ValueError, match=r"'shift' must be float64 \[22\], got float64 \[21\]"):
        Moments(LAYERS).from_arrays({**arrays, "shift": arrays["shift"][1:]})


@pytest.mark.parametrize(
    ("layers", "options", "culprit"),
    [
        (LAYERS[::-1], {}, "'layers' must be"),
        (LAYERS, {"sampling": "mean"}, "'sampling' must be tokens, got mean$"),
        (LAYERS, {"noise_floor": False}, "'noise_floor' must be True, got False$"),
        (LAYERS, {"groups": 2}, "'groups' must be 1, got 2$"),
    ],
)
def test_arrays_of_other_layers_or_options_are_refused(
    layers: list[LayerHeads], options: dict[str, Any], culprit: str
) -> None:
    arrays = Moments(layers, MomentOptions(**options)).to_arrays()
    with pytest.raises(ValueError, match=culprit):
        Moments(LAYERS).from_arrays(arrays)


def test_all_heads_of_the_model_hold_the_layers_blocks_and_those_between() -> None:
    outputs = draw()
    whole = stream(Moments(LAYERS, MomentOptions(scope="all")), outputs, 4).compute()[0]
    flat = np.concatenate([rows(output).reshape(IMAGES * TOKENS, -1) for output in outputs], axis=1)
    np.testing.assert_allclose(whole.own.products, flat.T @ flat, atol=1e-11)
    assert whole.layer.tolist() == [0, 0, 0, 1, 1]
    assert whole.head.tolist() == [0, 1, 2, 0, 1]
    assert whole.dims == (4, 4, 4, 5, 5)


def test_pairs_of_layers_are_blocks_of_the_full_matrix() -> None:
    layers = [LayerHeads(2, 3)] * 3
    outputs = [torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    full = stream(Moments(layers, MomentOptions(scope="all")), outputs, 2).compute()[0].own.products
    pair = Moments(layers, MomentOptions(scope="pairs"), [(2, 0)])
    assert pair.needed == {0, 2}
    found = stream(pair, outputs, 2).compute()[0].own.products
    chosen = np.r_[0:6, 12:18]
    np.testing.assert_allclose(found, full[np.ix_(chosen, chosen)], atol=1e-5)


def test_patches_leave_out_the_prefix_tokens() -> None:
    outputs = draw()
    patches = stream(Moments(LAYERS, MomentOptions(sampling="patches")), outputs, 4)
    bare = [LayerHeads(*layer[:2]) for layer in LAYERS]
    assert_same_moments(patches, stream(Moments(bare), [output[:, 1:] for output in outputs], 4))


def test_layers_of_different_token_counts_are_refused_unless_by_their_means() -> None:
    outputs = [draw()[0], draw(tokens=2)[1]]
    with pytest.raises(UsageError, match=r"by the sampling 'mean', got .*\{0: \(11, 5\), 1: \(11, 2\)\}"):
        stream(Moments(LAYERS, MomentOptions(scope="all")), outputs, IMAGES)
    found = stream(Moments(LAYERS, MomentOptions(scope="all", sampling="mean")), outputs, 4).compute()[0]
    assert found.own.samples == IMAGES


def test_each_group_left_out_is_the_rest_alone() -> None:
    parts = [draw(images=4, seed=seed) for seed in range(3)]
    metric = Moments(LAYERS, MomentOptions(groups=5))
    for group, part in enumerate(parts):
        stream(metric, part, 3, unit=group, group=group)
    for number in range(len(LAYERS)):
        left_out = list(metric.left_out(number))
        assert len(left_out) == 3  # the two groups without images do not count
        for group, found in enumerate(left_out):
            rest = Moments(LAYERS, MomentOptions(noise_floor=False))
            for other in {0, 1, 2} - {group}:
                stream(rest, parts[other], 4)
            expected = rest.compute()[number]
            assert found.images == expected.images == 8
            np.testing.assert_allclose(found.own.products, expected.own.products, atol=1e-11)


def test_a_units_metric_can_be_merged_into_a_group() -> None:
    parts = [draw(images=4, seed=seed) for seed in range(2)]
    direct, merged = Moments(LAYERS, MomentOptions(groups=2)), Moments(LAYERS, MomentOptions(groups=2))
    for group, part in enumerate(parts):
        stream(direct, part, 4, unit=group, group=group)
        merged.merge(stream(Moments(LAYERS), part, 4), group)
    assert merged.images.tolist() == [4, 4]
    assert_same_moments(direct, merged)
    for one, other in zip(direct.left_out(0), merged.left_out(0), strict=True):
        np.testing.assert_allclose(one.own.products, other.own.products, atol=1e-11)


def test_float32_products_err_by_a_millionth() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, 64)  # as steep as in a trained DeiT
    mixing = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    outputs = torch.randn(60, 197, 2, 64, generator=generator) * spectrum @ mixing + 2
    found = []
    for precision in ("float32", "float64"):
        metric = Moments([LayerHeads(2, 64)], MomentOptions(precision=precision))
        found.append(stream(metric, [outputs], 32).compute()[0].own.products)
    deviation = np.sqrt(found[1].diagonal())
    assert np.max(np.abs(found[0] - found[1]) / np.outer(deviation, deviation)) < 1e-6


def test_autocast_and_casts_of_the_module_leave_the_sums_in_float64() -> None:
    outputs = draw()
    metric = Moments(LAYERS)
    nn.ModuleList([metric]).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream(metric, outputs, 4)
    assert_same_moments(metric, stream(Moments(LAYERS), outputs, 4), 1e-15)


def test_states_of_inference_mode_can_be_changed_outside_it() -> None:
    outputs = draw()
    metric = Moments(LAYERS)
    with torch.inference_mode():
        metric.reset()
        stream(metric, outputs, 4)
    stream(metric, outputs, 4)
    expected = stream(stream(Moments(LAYERS), outputs, 4), outputs, 4)
    assert_same_moments(metric, expected)


def test_bfloat16_outputs_are_summed_exactly_and_their_resolution_is_kept() -> None:
    outputs = [output.bfloat16() for output in draw()]
    metric = stream(Moments(LAYERS), outputs, 4)
    np.testing.assert_allclose(metric.compute()[0].own.norm_products, _norm_products(outputs[0]), rtol=1e-11)
    assert metric.compute()[0].resolution == 2**-7


def _norm_products(output: Tensor) -> NDArray[np.float64]:
    squares = np.square(rows(output)).sum(axis=2)
    return np.asarray(squares.T @ squares)


def test_a_broken_head_does_not_spread() -> None:
    outputs, broken = draw(), draw()
    broken[0][2, 1, 0, 0] = torch.nan
    broken[0][3, 1, 1, 0] = torch.inf
    found = stream(Moments(LAYERS), broken, 4).compute()[0]
    whole = stream(Moments(LAYERS), outputs, 4).compute()[0]
    np.testing.assert_allclose(found.own.products[8:, 8:], whole.own.products[8:, 8:], atol=1e-11)
    assert np.isnan(found.norms[:2]).all()


def test_memory_is_fixed_in_the_number_of_images() -> None:
    few, many = (stream(Moments(LAYERS), draw(images=images), 4) for images in (4, 400))
    sizes = [{name: array.shape for name, array in metric.to_arrays().items()} for metric in (few, many)]
    assert sizes[0] == sizes[1]


def test_open_units_are_refused_and_a_reset_forgets_them() -> None:
    metric = Moments(LAYERS)
    for layer, output in enumerate(draw()):
        metric.update(layer, output, unit=7)
    for call in (metric.compute, metric.to_arrays, lambda: metric.merge(Moments(LAYERS))):
        with pytest.raises(RunError, match=r"close them first, got \[7\]"):
            call()
    metric.reset()
    assert metric.compute()[0].images == 0


def test_without_a_noise_floor_sums_are_incomplete_only_while_a_layer_is_missing() -> None:
    first, second = draw()
    metric = Moments(LAYERS, MomentOptions(noise_floor=False))
    metric.update(0, first)
    with pytest.raises(RunError, match=r"close them first, got \[0\]"):
        metric.to_arrays()
    metric.update(1, second)
    assert metric.compute()[0].images == IMAGES


def test_a_layer_that_comes_twice_is_refused() -> None:
    metric = Moments(LAYERS)
    metric.update(0, draw()[0])
    with pytest.raises(RunError, match=r"layers \[1\] are missing, got layer 0 again"):
        metric.update(0, draw()[0])


def test_a_unit_that_breaks_off_is_refused() -> None:
    metric = Moments(LAYERS)
    metric.update(0, draw()[0])
    with pytest.raises(RunError, match=r"got all but layers \[1\]"):
        metric.close()


def test_other_options_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="only equal layers, blocks and options"):
        Moments(LAYERS).merge(Moments(LAYERS, MomentOptions(sampling="mean")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "some"}, "scope must be one of within, all, pairs, got 'some'"),
        ({"sampling": "cls"}, "sampling must be one of tokens, patches, class, mean, got 'cls'"),
        ({"groups": 17}, r"1 \(no jackknife\) to 16, got 17"),
        ({"groups": 4, "scope": "all"}, "only for the scope 'within', use groups=1, got groups=4"),
        ({"scope": "pairs"}, "pairs of layers go with the scope 'pairs'"),
    ],
)
def test_options_outside_their_choices_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Moments(LAYERS, MomentOptions(**options))


def test_a_pair_of_one_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"two different layers in 0 to 1, got \(1, 2\)"):
        Moments(LAYERS, MomentOptions(scope="pairs"), [(1, 2)])


def test_class_tokens_of_a_model_without_one_are_refused() -> None:
    with pytest.raises(UsageError, match=r"layers \[0\] have no class token"):
        Moments([LayerHeads(3, 4)], MomentOptions(sampling="class"))


@pytest.mark.parametrize(
    ("layer", "outputs", "group", "message"),
    [
        (2, torch.zeros(1, 1, 3, 4), 0, "layer must be in 0 to 1, got 2"),
        (0, torch.zeros(1, 1, 3, 4), 1, "group must be in 0 to 0, got 1"),
        (0, torch.zeros(1, 1, 4, 3), 0, r"\[images, tokens, 3, 4\], got torch.float32 \[1, 1, 4, 3\]"),
        (0, torch.zeros(1, 1, 3, 4, dtype=torch.int64), 0, "must be floating point"),
        (0, torch.zeros(1, 0, 3, 4), 0, "no tokens sample"),
    ],
)
def test_outputs_that_are_not_the_layers_are_refused(layer: int, outputs: Tensor, group: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Moments(LAYERS).update(layer, outputs, group=group)


def test_images_of_different_token_counts_have_no_noise_floor() -> None:
    layers = [LayerHeads(3, 4)]
    metric = Moments(layers)
    metric.update(0, torch.ones(2, 5, 3, 4))
    with pytest.raises(UsageError, match=r"switch it off, .*got 6 tokens after 5"):
        metric.update(0, torch.ones(2, 6, 3, 4))


def test_no_images_are_no_moments() -> None:
    metric = Moments(LAYERS)
    for layer, output in enumerate(draw()):
        metric.update(layer, output[:0])
    metric.close()
    assert metric.compute()[0].own.samples == 0
