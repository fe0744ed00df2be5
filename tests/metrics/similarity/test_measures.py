"""The oracles are the definitions on all samples at once, in float64 numpy and scipy, by other formulas than ours."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg

from headprobe.errors import UsageError
from headprobe.metrics.similarity.comparison import compare
from headprobe.metrics.similarity.head_moments import HeadMoments
from headprobe.metrics.similarity.measures import MEASURES, Measure, samples_in_words, similarities, title
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments

Array = NDArray[np.float64]


def moments_of(heads: Sequence[Array] | Array, tokens: int = 1, batch: int = 50) -> HeadMoments:
    """Moments of heads `[samples, dim]`, each a layer of its own, all compared."""
    options = MomentOptions(scope="all", sampling="class" if tokens == 1 else "tokens")
    metric = Moments([LayerHeads(1, head.shape[1], 1) for head in heads], options)
    outputs = [torch.from_numpy(head).reshape(-1, tokens, 1, head.shape[1]) for head in heads]
    for start in range(0, len(outputs[0]), batch):
        for layer, output in enumerate(outputs):
            metric.update(layer, output[start : start + batch])
    metric.close()
    return metric.compute()[0]


def values(heads: Sequence[Array] | Array, measure: Measure, variance: float = 0.99) -> Array:
    return similarities(moments_of(heads), variance, [measure]).values[measure]


def related(samples: int = 300, dims: Sequence[int] = (6, 6, 4), seed: int = 0) -> list[Array]:
    """Heads with causes in common, of unequal variances and far from zero mean."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(samples, 3))
    noise = [rng.normal(size=(samples, dim)) * np.logspace(0, -1.5, dim) for dim in dims]
    return [causes @ rng.normal(size=(3, part.shape[1])) + 2 * part + 7 for part in noise]


def variates(one: Array, other: Array, variance: float) -> tuple[Array, Array]:
    """Canonical correlations by the angles between the data's own left singular vectors, and the variates of `one`."""
    bases = []
    for head in (one, other):
        left, size, _ = np.linalg.svd(head - head.mean(axis=0), full_matrices=False)
        kept = np.searchsorted(np.cumsum(size**2) / np.sum(size**2), variance - 1e-15) + 1
        bases.append(left[:, : min(kept, np.sum(size > 1e-9 * size[0]))])
    left, correlations, _ = np.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    return correlations, bases[0] @ left


def svcca(one: Array, other: Array) -> float:
    return float(variates(one, other, 0.99)[0].mean())


def mean_cca(one: Array, other: Array) -> float:
    return float(np.cos(linalg.subspace_angles(one - one.mean(axis=0), other - other.mean(axis=0))).mean())


def pwcca(one: Array, other: Array) -> float:
    correlations, of_one = variates(one, other, 1.0)
    weights = np.abs(of_one.T @ (one - one.mean(axis=0))).sum(axis=1)
    return float(np.average(correlations, weights=weights))


def cka(one: Array, other: Array) -> float:
    centring = np.eye(len(one)) - 1 / len(one)
    kernels = [centring @ head @ head.T @ centring for head in (one, other)]
    hsic = [np.trace(kernels[i] @ kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1))]
    return float(hsic[0] / np.sqrt(hsic[1] * hsic[2]))


def unbiased_hsic(one: Array, other: Array) -> float:
    """Song et al., 2012, equation 5, on Gram matrices with zero diagonals."""
    n, grams = len(one), [head @ head.T for head in (one, other)]
    for gram in grams:
        np.fill_diagonal(gram, 0)
    k, m = grams
    product = k @ m
    total = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((np.trace(product) + total - 2 * product.sum() / (n - 2)) / (n * (n - 3)))


def cka_unbiased(one: Array, other: Array) -> float:
    return unbiased_hsic(one, other) / np.sqrt(unbiased_hsic(one, one) * unbiased_hsic(other, other))


def procrustes(one: Array, other: Array) -> float:
    """1 - d^2 / 2, d the distance that is left after the best rotation of heads of unit size."""
    width = max(one.shape[1], other.shape[1])
    units = []
    for head in (one, other):
        moved = head - head.mean(axis=0)
        units.append(np.pad(moved / np.linalg.norm(moved), ((0, 0), (0, width - head.shape[1]))))
    rotation, _ = linalg.orthogonal_procrustes(*units)
    return float(1 - np.linalg.norm(units[0] @ rotation - units[1]) ** 2 / 2)


ORACLES: dict[Measure, Callable[[Array, Array], float]] = {
    "svcca": svcca,
    "cca": mean_cca,
    "pwcca": pwcca,
    "cka": cka,
    "cka_unbiased": cka_unbiased,
    "procrustes": procrustes,
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("samples", [12, 300])
def test_each_measure_is_its_definition_on_stored_activations(measure: Measure, samples: int) -> None:
    heads = related(samples)
    expected = [[ORACLES[measure](one, other) for other in heads] for one in heads]
    np.testing.assert_allclose(values(heads, measure), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_noise_floor_is_the_measure_with_the_next_images_outputs(measure: Measure) -> None:
    heads = related(300)
    found = similarities(moments_of(heads), measures=[measure], noise_floor=True).values[measure]
    for row in range(3):
        for column in range(row, 3):
            later = np.roll(heads[column], -1, axis=0)
            np.testing.assert_allclose(found[row, column], ORACLES[measure](heads[row], later), rtol=1e-9, atol=1e-12)
            if measure == "pwcca" and row < column:
                np.testing.assert_allclose(found[column, row], pwcca(later, heads[row]), rtol=1e-9)
            elif measure != "pwcca":
                assert found[column, row] == found[row, column]


def test_the_noise_floor_of_tokens_shifts_whole_images() -> None:
    heads = related(300)
    found = similarities(moments_of(heads, tokens=5), noise_floor=True).values
    for measure in MEASURES:
        expected = ORACLES[measure](heads[0], np.roll(heads[1], -5, axis=0))
        np.testing.assert_allclose(found[measure][0, 1], expected, rtol=1e-8)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_head_is_like_itself(measure: Measure) -> None:
    np.testing.assert_allclose(values(related(), measure).diagonal(), 1, rtol=1e-9)


@pytest.mark.parametrize("measure", [measure for measure in MEASURES if measure != "pwcca"])
def test_all_but_pwcca_are_symmetric(measure: Measure) -> None:
    found = values(related(), measure)
    np.testing.assert_array_equal(found, found.T)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), mean=st.floats(-100, 100))
def test_no_measure_sees_rotation_scale_or_mean(seed: int, scale: float, mean: float) -> None:
    one, other, _ = related(seed=seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))
    before = similarities(moments_of([one, other])).values
    after = similarities(moments_of([one * scale + mean, other @ rotation - mean])).values
    for measure in MEASURES:  # PWCCA only by its row's head, whose channels weigh
        np.testing.assert_allclose(after[measure][0, 1], before[measure][0, 1], rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_all_variance_canonical_correlations_see_no_invertible_map(seed: int) -> None:
    one, other, _ = related(seed=seed)
    mapping = np.random.default_rng(seed).normal(size=(6, 6)) + 3 * np.eye(6)
    found = similarities(moments_of([one, other, other @ mapping]), variance=1).values
    for measure in ("svcca", "cca", "pwcca"):
        np.testing.assert_allclose(found[measure][1, 2], 1, rtol=1e-7)
        np.testing.assert_allclose(found[measure][0, 2], found[measure][0, 1], rtol=1e-6)


def test_pwcca_weighs_by_the_channels_of_its_row() -> None:
    one, other, _ = related()
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    found, turned = values([one, other], "pwcca"), values([one @ rotation, other], "pwcca")
    assert abs(turned[0, 1] - found[0, 1]) > 1e-4
    np.testing.assert_allclose(turned[1, 0], found[1, 0], rtol=1e-9)


def turned_pwcca(one: Array, other: Array, angle: float) -> float:
    """PWCCA with the first two variates of `one`, of equal correlation, turned by an angle."""
    correlations, of_one = variates(one, other, 1.0)
    first, second = of_one[:, 0].copy(), of_one[:, 1].copy()
    of_one[:, 0] = np.cos(angle) * first - np.sin(angle) * second
    of_one[:, 1] = np.sin(angle) * first + np.cos(angle) * second
    weights = np.abs(of_one.T @ (one - one.mean(axis=0))).sum(axis=1)
    return float(np.average(correlations, weights=weights))


@pytest.mark.parametrize("samples", [9, 10, 11])
def test_pwcca_of_too_few_samples_is_empty_as_it_is_not_unique(samples: int) -> None:
    one, other, third = related(samples)  # 6, 6 and 4 dims
    assert variates(one, other, 1.0)[0][1] == pytest.approx(1, abs=1e-12)
    assert abs(turned_pwcca(one, other, 0.7) - turned_pwcca(one, other, 0)) > 1e-4
    found = similarities(moments_of([one, other, third])).values
    assert np.isnan(found["pwcca"][[0, 1], [1, 0]]).all()
    np.testing.assert_allclose(found["pwcca"].diagonal(), 1, atol=1e-6)
    assert np.isnan(found["pwcca"][0, 2]) == (samples < 10)  # 10 dims together among 9 samples about their mean: one
    assert all(np.isfinite(found[measure]).all() for measure in MEASURES if measure != "pwcca")


@pytest.mark.parametrize("samples", [12, 13, 300])
def test_pwcca_is_given_where_at_most_one_direction_is_common_by_the_number_of_samples(samples: int) -> None:
    one, other, _ = related(samples)
    np.testing.assert_allclose(values([one, other], "pwcca")[0, 1], pwcca(one, other), rtol=1e-8)


def test_pwcca_of_heads_that_share_two_directions_is_empty_however_many_samples() -> None:
    one, other, _ = related(2000)
    other = np.concatenate([one[:, :2], other[:, 2:]], axis=1)
    found = similarities(moments_of([one, other]))
    assert np.isnan(found.values["pwcca"][0, 1])
    assert np.isfinite(found.values["cca"]).all()


@pytest.mark.parametrize(("samples", "level"), [(128, 0.643), (640, 0.272), (5000, 0.096)])
def test_cca_of_independent_gaussians_is_the_known_level_and_so_is_its_floor(samples: int, level: float) -> None:
    rng = np.random.default_rng(samples)
    moments = moments_of([rng.normal(size=(samples, 64)) for _ in range(3)], batch=1000)
    for noise_floor in (False, True):
        found = similarities(moments, measures=["cca"], noise_floor=noise_floor).values["cca"]
        assert found[np.triu_indices(3, 1)].mean() == pytest.approx(level, abs=0.008)


def test_unbiased_cka_of_independent_heads_is_around_zero_where_cka_is_not() -> None:
    rng = np.random.default_rng(0)
    found = [similarities(moments_of(rng.normal(size=(2, 40, 20)))).values for _ in range(100)]
    unbiased = np.array([value["cka_unbiased"][0, 1] for value in found])
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 10
    assert unbiased.min() < 0
    assert np.mean([value["cka"][0, 1] for value in found]) > 0.3


def test_the_floor_of_tokens_knows_that_tokens_of_an_image_are_alike() -> None:
    rng, tokens, found, floors = np.random.default_rng(0), 8, [], []
    for _ in range(100):
        image = rng.normal(size=(2, 60, 1, 4))
        heads = (3 * image + rng.normal(size=(2, 60, tokens, 4))).reshape(2, -1, 4)
        moments = moments_of(heads, tokens)
        found.append(similarities(moments, measures=["svcca"]).values["svcca"][0, 1])
        floors.append(similarities(moments, measures=["svcca"], noise_floor=True).values["svcca"][0, 1])
    gaussian = np.mean([values(rng.normal(size=(2, 480, 4)), "svcca")[0, 1] for _ in range(20)])
    assert np.mean(found) == pytest.approx(np.mean(floors), rel=0.05)
    assert np.mean(found) > 2 * gaussian
    assert 0.35 < np.mean(np.array(found) > floors) < 0.65  # an unrelated pair exceeds its floor half of the time


def test_kept_dims_hold_the_variance_asked_for() -> None:
    rng = np.random.default_rng(0)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(200, 4)))
    orthogonal -= orthogonal.mean(axis=0)
    orthogonal, _ = np.linalg.qr(orthogonal)
    head = orthogonal * np.sqrt([90, 8, 1.5, 0.5])
    moments = moments_of([head, head])
    kept = {variance: similarities(moments, variance, []).kept.tolist() for variance in (0.5, 0.9 + 1e-9, 0.99, 1)}
    assert kept == {0.5: [1, 1], 0.9 + 1e-9: [2, 2], 0.99: [3, 3], 1: [4, 4]}


def test_a_constant_or_broken_head_has_no_similarity_and_spoils_no_other() -> None:
    one, other, _ = related()
    broken = one.copy()
    broken[3, 2] = np.nan
    found = similarities(moments_of([one, np.full_like(one, 0.1), other, broken]))
    alone = similarities(moments_of([one, other])).values
    assert found.rank.tolist() == [6, 0, 6, 0]
    for measure, matrix in found.values.items():
        assert np.isnan(matrix[[1, 3]]).all()
        assert np.isnan(matrix[:, [1, 3]]).all()
        np.testing.assert_allclose(matrix[np.ix_([0, 2], [0, 2])], alone[measure], rtol=1e-9)


def test_a_rank_deficient_head_keeps_fewer_dims_and_its_canonical_correlations() -> None:
    one, other, _ = related()
    flat = other[:, :3] @ np.random.default_rng(0).normal(size=(3, 6))
    found = similarities(moments_of([one, flat]), variance=1)
    assert found.rank.tolist() == [6, 3]
    assert found.values["cca"][0, 1] == pytest.approx(mean_cca(one, other[:, :3]), rel=1e-8)
    assert found.values["svcca"][0, 1] == found.values["cca"][0, 1]


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 5])
def test_fewer_samples_than_dims_never_crash(samples: int) -> None:
    found = similarities(moments_of(np.random.default_rng(0).normal(size=(2, samples, 8))))
    assert found.rank.tolist() == [max(samples - 1, 0)] * 2
    for measure, matrix in found.values.items():
        assert np.isfinite(matrix).all() == (samples > (3 if measure == "cka_unbiased" else 1))


def test_one_head_alone_is_compared_with_itself() -> None:
    for measure, matrix in similarities(moments_of(related()[:1])).values.items():
        np.testing.assert_allclose(matrix, [[1.0]], rtol=1e-9, err_msg=measure)


def test_one_sample_and_one_image_are_no_plurals() -> None:
    assert samples_in_words(np.array([1, -1]), 1, "class") == "1 sample (class tokens of 1 image)"
    assert samples_in_words(np.array([8, 1]), 1, "tokens") == "1 to 8 samples (all tokens of 1 image)"
    assert samples_in_words(np.array([2000]), 40, "tokens") == "2,000 samples (all tokens of 40 images)"


def test_only_one_sample_per_image_is_called_unbiased() -> None:
    titles = {sampling: title("cka_unbiased", sampling) for sampling in ("tokens", "patches", "class", "mean")}
    assert titles == {
        "tokens": "CKA debiased over tokens",
        "patches": "CKA debiased over tokens",
        "class": "unbiased CKA",
        "mean": "unbiased CKA",
    }


@pytest.mark.parametrize("variance", [0.0, 1.01, float("nan")])
def test_a_variance_outside_its_range_is_refused(variance: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1, got"):
        similarities(moments_of(related()), variance)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(UsageError, match=r"measures must be among svcca, .*, got 'rsa'"):
        similarities(moments_of(related()), measures=["rsa"])  # type: ignore[list-item]


def test_a_noise_floor_that_was_not_summed_is_refused() -> None:
    metric = Moments([LayerHeads(2, 3)], MomentOptions(noise_floor=False))
    with pytest.raises(UsageError, match="noise_floor=True"):
        similarities(metric.compute()[0], noise_floor=True)


def test_a_comparison_holds_floor_and_spread_where_they_were_summed() -> None:
    outputs = torch.randn(40, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    full, bare = Moments([LayerHeads(2, 4)], MomentOptions(groups=4)), Moments([LayerHeads(2, 4)])
    for group in range(4):
        full.update(0, outputs[10 * group : 10 * group + 10], unit=group, group=group)
        full.close(group)
    bare.update(0, outputs)
    bare.close()
    (everything,), (no_groups,) = compare(full), compare(bare)
    assert everything.groups == 4
    assert everything.floor.keys() == everything.spread.keys() == set(MEASURES)
    assert everything.spread["svcca"].error[0, 1] > 0
    np.testing.assert_allclose(everything.spread["svcca"].error[0, 0], 0, atol=1e-9)
    assert (no_groups.groups, no_groups.spread) == (0, {})
    np.testing.assert_allclose(no_groups.found.values["cka"], everything.found.values["cka"], rtol=1e-9)
