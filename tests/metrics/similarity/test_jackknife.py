"""The oracle for a mean is scipy's t interval; coverage and false alarms are simulated on heads with known answers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg, stats

from headprobe.metrics.similarity.comparison import above_floor, jackknife
from headprobe.metrics.similarity.measures import MEASURES, Measure, similarities
from headprobe.metrics.similarity.moments import LayerHeads, MomentOptions, Moments

Array = NDArray[np.float64]
GROUPS, TOKENS, DIM = 16, 4, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grouped(outputs: Array) -> Moments:
    """Moments of outputs `[images, tokens, 2, dim]` in groups of images."""
    metric = Moments([LayerHeads(2, outputs.shape[3])], MomentOptions(groups=GROUPS))
    for group, part in enumerate(np.array_split(outputs, GROUPS)):
        metric.update(0, torch.from_numpy(part), unit=group, group=group)
        metric.close(group)
    return metric


def related(images: int, rng: np.random.Generator, mixing: Array) -> Array:
    """Two heads with causes in common; an image's tokens share half of them."""
    causes = rng.normal(size=(images, 1, 5)) + rng.normal(size=(images, TOKENS, 5))
    return np.stack([causes @ mix + rng.normal(size=(images, TOKENS, DIM)) for mix in mixing], axis=2)


def test_the_interval_of_a_mean_of_groups_is_students() -> None:
    groups = np.random.default_rng(0).normal(0.5, 0.1, size=7)
    left_out = [np.delete(groups, group).mean() for group in range(7)]
    spread = jackknife(groups.mean(), left_out)
    expected = stats.t.interval(0.95, 6, loc=groups.mean(), scale=stats.sem(groups))
    np.testing.assert_allclose([spread.low, spread.high], expected, rtol=1e-9)


def test_the_interval_reaches_farther_to_where_the_bias_points() -> None:
    groups = np.random.default_rng(0).normal(size=16)
    left_out = [np.var(np.delete(groups, group)) for group in range(16)]
    spread = jackknife(0.1 * np.var(groups), [0.1 * value for value in left_out])
    bias = 0.1 * (np.var(groups, ddof=1) - np.var(groups))  # what the jackknife takes off a variance, exactly
    reach = stats.t.isf(0.025, 15) * spread.error
    np.testing.assert_allclose(spread.high, 0.1 * np.var(groups) + 2 * bias + reach, rtol=1e-9)
    np.testing.assert_allclose(spread.low, 0.1 * np.var(groups) - reach, rtol=1e-9)


def test_an_interval_holds_its_estimate_and_ends_at_one() -> None:
    spread = jackknife(0.98, [0.9, 1.0, 0.97, 0.99])
    assert spread.low < 0.98 < spread.high == 1


@pytest.mark.parametrize("left_out", [[], [0.5], [0.5, np.nan]])
def test_too_few_groups_have_no_interval(left_out: list[float]) -> None:
    assert np.isnan(jackknife(0.5, left_out)).all()


@pytest.mark.parametrize("images", [160, 800])
def test_intervals_over_groups_of_images_cover_at_their_rate(images: int) -> None:
    rng, repeats = np.random.default_rng(images), 200
    mixing = np.random.default_rng(5).normal(size=(2, 5, DIM))
    huge = Moments([LayerHeads(2, DIM)])
    for _ in range(10):
        huge.update(0, torch.from_numpy(related(20_000, rng, mixing)))
    huge.close()
    truth = similarities(huge.compute()[0]).values
    covered = dict.fromkeys(MEASURES, 0)
    for _ in range(repeats):
        metric = grouped(related(images, rng, mixing))
        found = similarities(metric.compute()[0]).values
        others = [similarities(moments).values for moments in metric.left_out(0)]
        for measure in MEASURES:
            spread = jackknife(found[measure], [other[measure] for other in others])
            covered[measure] += int(spread.low[0, 1] <= truth[measure][0, 1] <= spread.high[0, 1])
    lowest = stats.binom.ppf(0.001, repeats, 0.95)  # what a true 95% falls below once in a thousand
    assert min(covered.values()) >= lowest, covered


def test_intervals_cover_although_unrelated_directions_inflate_the_estimates() -> None:
    rng, repeats, dim, images = np.random.default_rng(0), 100, 12, 640
    mixing = np.random.default_rng(5).normal(size=(2, 4, dim))

    def draw(count: int) -> Array:
        causes = rng.normal(size=(count, 1, 4))
        return np.stack([causes @ mix + 2 * rng.normal(size=(count, 1, dim)) for mix in mixing], axis=2)

    measures: list[Measure] = ["svcca", "cka", "cka_unbiased", "procrustes"]  # PWCCA has no limit: see its definition
    shared = mixing[0].T @ mixing[1]
    own = [mix.T @ mix + 4 * np.eye(dim) for mix in mixing]
    truth = {
        "svcca": np.linalg.svd(np.linalg.inv(linalg.sqrtm(own[0])) @ shared @ np.linalg.inv(linalg.sqrtm(own[1])))[
            1
        ].mean(),
        "cka": np.square(shared).sum() / (np.linalg.norm(own[0]) * np.linalg.norm(own[1])),
        "procrustes": np.linalg.svd(shared)[1].sum() / np.sqrt(np.trace(own[0]) * np.trace(own[1])),
    }
    truth["cka_unbiased"] = truth["cka"]
    covered = dict.fromkeys(measures, 0)
    for _ in range(repeats):
        metric = grouped(draw(images))
        found = similarities(metric.compute()[0], 1, measures).values
        others = [similarities(moments, 1, measures).values for moments in metric.left_out(0)]
        for measure in measures:
            spread = jackknife(found[measure], [other[measure] for other in others])
            covered[measure] += int(spread.low[0, 1] <= truth[measure] <= spread.high[0, 1])
    assert min(covered.values()) >= stats.binom.ppf(0.001, repeats, 0.95), covered


@pytest.mark.parametrize("tokens", [1, 3])
def test_unrelated_heads_are_seldom_called_above_the_floor_and_exceed_it_half_of_the_time(tokens: int) -> None:
    rng, repeats, called, exceeded = np.random.default_rng(tokens), 200, 0, 0
    for _ in range(repeats):
        image, place = rng.normal(size=(96, 1, 2, 4)), rng.normal(size=(1, tokens, 2, 4))
        metric = grouped(image + place + rng.normal(size=(96, tokens, 2, 4)))
        moments = metric.compute()[0]
        found = similarities(moments, measures=["svcca"]).values["svcca"][0, 1]
        floor = similarities(moments, measures=["svcca"], noise_floor=True).values["svcca"][0, 1]
        others = [similarities(other, measures=["svcca"]).values["svcca"][0, 1] for other in metric.left_out(0)]
        called += int(above_floor(found, floor, jackknife(found, others).error, GROUPS))
        exceeded += int(found > floor)
    assert called <= stats.binom.ppf(0.999, repeats, 0.05)
    assert abs(exceeded / repeats - 0.5) < 0.12


def test_related_heads_are_called_above_the_floor() -> None:
    rng = np.random.default_rng(0)
    metric = grouped(related(200, rng, np.random.default_rng(5).normal(size=(2, 5, DIM))))
    moments = metric.compute()[0]
    found, floor = (similarities(moments, noise_floor=which).values for which in (False, True))
    others = [similarities(other).values for other in metric.left_out(0)]
    for measure in MEASURES:
        error = jackknife(found[measure], [other[measure] for other in others]).error
        assert above_floor(found[measure], floor[measure], error, GROUPS)[0, 1]


def test_a_head_without_similarity_is_not_above_its_floor() -> None:
    assert above_floor([np.nan, 0.9], [0.1, np.nan], [0.1, 0.1], GROUPS).tolist() == [False, False]
