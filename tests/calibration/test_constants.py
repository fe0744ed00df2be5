"""Constants and predictions, held against least squares on the samples themselves."""

from pathlib import Path

import numpy as np
import pytest

from headprobe.calibration.constants import (
    Calibration,
    LayerConstants,
    predict_masked,
    read_calibration,
    save_calibration,
)
from headprobe.errors import UsageError
from tests.describe.driving import tiny_probe


def samples(seed: int, count: int = 400, heads: int = 3, dim: int = 4) -> np.ndarray:
    """Correlated samples `[count, heads, dim]` with means far from 0, in float32 as a model gives them."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, heads * dim)) @ generator.normal(size=(heads * dim, heads * dim))
    return (mixed + generator.normal(size=heads * dim) * 5).reshape(count, heads, dim).astype(np.float32)


def constants_of(found: np.ndarray) -> LayerConstants:
    flat = found.reshape(len(found), -1).astype(np.float64)
    centred = flat - flat.mean(0)
    return LayerConstants(len(flat), flat.mean(0).reshape(found.shape[1:]), centred.T @ centred / len(flat))


@pytest.mark.parametrize("keep", [[True, False, True], [False, True, False], [True, True, False]])
def test_the_prediction_is_that_of_least_squares_on_the_samples(keep: list[bool]) -> None:
    found = samples(1)
    kept, masked = found[:, keep].reshape(len(found), -1), found[:, [not one for one in keep]].reshape(len(found), -1)
    design = np.concatenate([kept, np.ones((len(kept), 1))], axis=1).astype(np.float64)
    solution = np.linalg.lstsq(design, masked.astype(np.float64), rcond=None)[0]  # [kept + 1, masked]
    prediction = predict_masked(constants_of(found), keep)
    np.testing.assert_allclose(prediction.matrix, solution[:-1].T, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(prediction.offset, solution[-1], rtol=1e-7, atol=1e-7)


def test_without_a_kept_head_the_prediction_is_the_mean() -> None:
    found = samples(2)
    prediction = predict_masked(constants_of(found), [False] * 3)
    assert prediction.matrix.shape == (12, 0)
    np.testing.assert_allclose(prediction.offset, found.reshape(len(found), -1).mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["twice the same head", "a constant head", "fewer samples than channels"])
def test_kept_channels_that_do_not_vary_on_their_own_predict_as_well_as_least_squares(kind: str) -> None:
    found = samples(3)
    if kind == "twice the same head":
        found[:, 1] = found[:, 0]
    elif kind == "a constant head":
        found[:, 1] = 7.25
    else:
        found = found[:5]
    keep = [True, True, False]
    prediction = predict_masked(constants_of(found), keep)
    kept = found[:, :2].reshape(len(found), -1).astype(np.float64)
    fitted = kept @ prediction.matrix.T + prediction.offset
    design = np.concatenate([kept, np.ones((len(kept), 1))], axis=1)
    best = design @ np.linalg.lstsq(design, found[:, 2].astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(fitted, best, atol=2e-4)
    assert np.abs(prediction.matrix).max() < 100  # no direction of rounding is blown up
    assert prediction.rank == min(4, len(found) - 1)


def test_a_constant_masked_head_is_predicted_by_its_constant() -> None:
    found = samples(4)
    found[:, 2] = 3.5
    prediction = predict_masked(constants_of(found), [True, True, False])
    np.testing.assert_allclose(prediction.matrix, 0, atol=1e-9)
    np.testing.assert_allclose(prediction.offset, 3.5)


def test_linear_is_refused_where_a_norm_over_all_heads_stands_before_the_projection() -> None:
    probe = tiny_probe("eva_inner_norm")
    probe.choose_masks("each:head", "zero,mean,position,optimal")
    with pytest.raises(UsageError, match="a norm over all heads, which is not linear: choose zero"):
        probe.choose_masks("each:head", "mean,linear")


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    full = constants_of(samples(5))
    means = LayerConstants(7, full.mean, position=np.ones((5, 3, 4)), optimal=np.full((3, 4), np.nan))
    save_calibration(Calibration([full, means], {"images": 12}), tmp_path)
    read = read_calibration(tmp_path)
    assert read.about == {"images": 12}
    np.testing.assert_array_equal(read.layers[0].covariance, full.covariance)
    np.testing.assert_array_equal(read.layers[1].position, means.position)
    np.testing.assert_array_equal(read.layers[1].optimal, means.optimal)
    assert (read.layers[0].samples, read.layers[1].samples, read.layers[1].covariance) == (400, 7, None)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="calibration") as error:
        read_calibration(path)
    assert "\n" not in str(error.value)


def test_a_model_s_weights_are_no_calibration(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"head.weight": np.ones((2, 3))}, tmp_path / "calibration.safetensors")
    with pytest.raises(UsageError, match="does not hold constants of a headprobe calibration"):
        read_calibration(tmp_path)
