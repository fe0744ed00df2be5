"""The oracle is Park & Kim's procedure in float64 numpy: full fft2, log, fftshift, mean, half diagonal minus DC."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.metrics.spectrum.profiles import profiles_of
from headprobe.metrics.spectrum.spectra import Spectra, head_profiles, on_image
from headprobe.metrics.token_grid import TokenGrid

SIZES = [(4, 4), (5, 5), (14, 14), (7, 7), (4, 6), (6, 5), (3, 8), (1, 1), (1, 4)]


def paper(maps: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Profiles of maps `[channels, rows, columns]`, the value at frequency 0 included."""
    rows, columns = maps.shape[1:]
    amplitude = np.log(np.abs(np.fft.fft2(maps)) + 1e-6)
    shifted = np.fft.fftshift(amplitude, axes=(1, 2)).mean(axis=0)
    middle, steps = (rows // 2, columns // 2), min(rows - rows // 2, columns - columns // 2)
    diagonal = np.array([shifted[middle[0] + i, middle[1] + i] for i in range(steps)])
    rings: dict[int, list[float]] = {}
    for i in range(rows):
        for j in range(columns):
            radius = math.hypot(2 * (i - middle[0]) / rows, 2 * (j - middle[1]) / columns)
            if radius <= 1 + 1e-9:
                ring = math.floor(radius * min(rows, columns) / 2 + 0.5)
                rings.setdefault(max(ring, 1) if radius else 0, []).append(shifted[i, j])
    return {"diagonal": diagonal, "radial": np.array([np.mean(rings[ring]) for ring in sorted(rings)])}


def split(values: Tensor, size: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    ends = np.cumsum([0, *(len(profile.frequency) for profile in profiles_of(size))])
    names = (profile.name for profile in profiles_of(size))
    return {name: values.numpy()[ends[i] : ends[i + 1]] for i, name in enumerate(names)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("channels", [3, 6, 8])
def test_profiles_of_heads_are_the_papers(size: tuple[int, int], prefix: int, channels: int) -> None:
    grid = TokenGrid(prefix + math.prod(size), prefix, prefix > 0, size)
    heads = draw(2, grid.tokens, 3, channels)
    found = head_profiles(heads, grid)[0]
    for image in range(2):
        for head in range(3):
            maps = heads[image, prefix:, head].T.reshape(channels, *size).double().numpy()
            for name, profile in split(found[image, head], size).items():
                np.testing.assert_allclose(profile, paper(maps)[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_contributions_are_transformed_after_the_output_projection() -> None:
    grid = TokenGrid(17, 1, True, (4, 4))
    heads, weight = draw(2, 17, 3, 5), draw(3, 12, 5, seed=1)
    found = head_profiles(heads, grid, weight)[-1]
    added = torch.einsum("hdc,bthc->bthd", weight.double(), heads.double())
    for image in range(2):
        for head in range(3):
            maps = added[image, 1:, head].T.reshape(12, 4, 4).numpy()
            for name, profile in split(found[image, head], (4, 4)).items():
                np.testing.assert_allclose(profile, paper(maps)[name], rtol=1e-5, atol=1e-5)


def test_streams_are_transformed_as_they_are_beside_heads_of_other_channels() -> None:
    grid, stream = TokenGrid(20, 5, True, (3, 5)), draw(2, 20, 7)
    found = head_profiles(draw(2, 20, 2, 3, seed=1), grid, None, [2 * stream, stream])[2]
    assert found.shape[:2] == (2, 1)
    maps = stream[1, 5:].T.reshape(7, 3, 5).double().numpy()
    for name, profile in split(found[1, 0], (3, 5)).items():
        np.testing.assert_allclose(profile, paper(maps)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [(8, 8), (4, 8), (6, 5)])
def test_windows_are_put_back_on_the_image_as_timm_does(size: tuple[int, int], shift: tuple[int, int]) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    grid = TokenGrid(16, grid=size, window=(4, 4), shift=shift)
    block: Any = SwinTransformerBlock(6, size, 2, window_size=4, shift_size=shift, always_partition=True)
    seen: list[Tensor] = []
    block.attn.forward = lambda tokens, mask=None: seen.append(tokens) or tokens  # type: ignore[func-returns-value]
    image = draw(2, *size, 6)
    block._attn(image)
    assert torch.equal(on_image(seen[0], grid), image.flatten(1, 2))


def test_frequencies_are_true_ones() -> None:
    frequencies = {size: [profile.frequency for profile in profiles_of(size)] for size in ((14, 14), (7, 7), (4, 6))}
    for size in ((14, 14), (7, 7)):
        assert round(float(frequencies[size][0][-1]), 3) == 0.857
    np.testing.assert_allclose(frequencies[14, 14][0], np.arange(7) / 7, atol=1e-12)
    np.testing.assert_allclose(frequencies[4, 6][0], [0, math.sqrt((1 / 4 + 1 / 9) / 2)], atol=1e-12)
    assert all(frequency.max() <= 1 for pair in frequencies.values() for frequency in pair)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_wave_shows_at_its_own_frequency(step: int) -> None:
    grid = TokenGrid(196, grid=(14, 14))
    down, across = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    wave = torch.cos(2 * math.pi * step * down / 14) + 0 * across
    found = split(head_profiles(wave.reshape(1, 196, 1, 1), grid)[0][0, 0], (14, 14))["radial"]
    frequency = profiles_of((14, 14))[1].frequency
    assert abs(frequency[1 + found[1:].argmax()] - step / 7) < 0.04


# -- sums ----------------------------------------------------------------------------------------------------------

GRIDS = [TokenGrid(17, 1, True, (4, 4)), TokenGrid(16, grid=(8, 8), window=(4, 4), shift=(2, 2))]


def make() -> Spectra:
    return Spectra([*GRIDS, TokenGrid(16, pooled=True)], [3, 2, 2])


def filled(images: slice, silent: bool = False) -> Spectra:
    metric = make()
    for layer, grid in enumerate(GRIDS):
        heads = draw(5 * grid.windows, grid.tokens, 3 - layer, 8).unflatten(0, (5, -1))[images].flatten(0, 1)
        if silent:
            heads[..., 0, :] = 0
        stream = draw(5, grid.prefix + grid.patches, 12)[images]
        profiles = head_profiles(heads, grid, streams=[stream])
        metric.update(layer, dict(zip(("head", "stream_before"), profiles, strict=True)))
    return metric


def test_halves_merge_to_the_whole() -> None:
    merged = filled(slice(0, 2))
    merged.merge(filled(slice(2, 5)))
    whole: dict[str, Any] = filled(slice(0, 5)).to_arrays()
    arrays: dict[str, Any] = merged.to_arrays()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-12)


def test_the_delta_is_taken_from_frequency_0_and_averaged_over_images_with_its_error() -> None:
    found = filled(slice(0, 5)).compute()
    values = head_profiles(draw(5, 17, 3, 8), GRIDS[0])[0].double().numpy()
    diagonal = values[:, 1, :2] - values[:, 1, :1]
    chosen = (found.layer == 0) & (found.series == "head") & (found.head == 1) & (found.profile == "diagonal")
    np.testing.assert_allclose(found.delta_log_amplitude[chosen], diagonal.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.error[chosen], diagonal.std(0, ddof=1) / math.sqrt(5), atol=1e-9)
    np.testing.assert_allclose(found.log_amplitude[chosen], values[:, 1, :2].mean(0), rtol=1e-9)
    assert found.frequency[chosen].tolist() == [0, 0.5]
    assert (found.delta_log_amplitude[(found.frequency == 0) & (found.images > 0)] == 0).all()


def test_a_series_that_was_never_observed_and_a_silent_head_have_no_spectrum() -> None:
    found = filled(slice(0, 5), silent=True).compute()
    masked = (found.series == "head") & (found.head == 0)
    assert np.isnan(found.delta_log_amplitude[masked]).all()
    assert np.isfinite(found.delta_log_amplitude[(found.series == "head") & (found.head == 1)]).all()
    assert np.isnan(found.delta_log_amplitude[found.series == "contribution"]).all()
    assert set(found.layer.tolist()) == {0, 1}


def test_arrays_give_the_metric_back_to_the_last_bit() -> None:
    metric = filled(slice(0, 3))
    again = make().from_arrays(metric.to_arrays())
    assert all(again.to_arrays()[name].tobytes() == array.tobytes() for name, array in metric.to_arrays().items())


def test_a_layer_without_a_grid_and_a_wrong_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="layer 2 must have a spectrum"):
        make().update(2, {"head": torch.zeros(1, 2, 5)})
    with pytest.raises(UsageError, match=r"must be \[images, 3, 5\], got \[1, 2, 5\]"):
        make().update(0, {"head": torch.zeros(1, 2, 5)})


def test_bf16_maps_are_transformed_in_float32() -> None:
    heads = draw(2, 17, 3, 8).to(torch.bfloat16)
    assert torch.equal(head_profiles(heads, GRIDS[0])[0], head_profiles(heads.float(), GRIDS[0])[0])
