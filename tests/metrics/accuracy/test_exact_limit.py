"""The exact limit of a drop: counted out, it lies above the true drop in 95 of 100 data sets, whatever else changes."""

import itertools
import math

import pytest
from scipy import stats

from headprobe.metrics.accuracy.exact_limit import exact_drop_limit_pp
from headprobe.metrics.accuracy.paired_tests import drop_interval_pp

IMAGES = 12


@pytest.fixture(scope="module")
def limits() -> dict[tuple[int, int], float]:
    """The limit of every outcome of a few images, by images that are lost and won."""
    pairs = itertools.product(range(IMAGES + 1), repeat=2)
    return {(lost, won): exact_drop_limit_pp(lost, won, IMAGES) for lost, won in pairs if lost + won <= IMAGES}


@pytest.mark.parametrize("loss", [0, 0.02, 0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("gain", [0, 0.02, 0.05, 0.1, 0.3])
def test_the_true_drop_lies_above_the_limit_in_5_of_100_data_sets_at_most(
    limits: dict[tuple[int, int], float], loss: float, gain: float
) -> None:
    rates = [loss, gain, 1 - loss - gain]
    missed = sum(
        stats.multinomial.pmf([lost, won, IMAGES - lost - won], IMAGES, rates)
        for (lost, won), limit in limits.items()
        if limit < 100 * (loss - gain) - 1e-6
    )
    assert missed <= 0.05


@pytest.mark.parametrize(("images", "gain"), [(299, 0.0), (299, 0.001), (400, 0.0), (600, 0.002)])
def test_a_set_that_loses_a_point_is_taken_for_less_in_5_of_100_data_sets_at_most(images: int, gain: float) -> None:
    taken, most = 0.0, 0  # losses that are few enough, more of them beside more gains
    for won in range(7 if gain else 1):
        while exact_drop_limit_pp(most, won, images) <= 1:
            most += 1
        rates = [0.01 + gain, gain, 0.99 - 2 * gain]
        taken += sum(stats.multinomial.pmf([lost, won, images - lost - won], images, rates) for lost in range(most))
    assert 0.01 < taken <= 0.05


def test_without_a_changed_answer_it_is_that_of_clopper_and_pearson() -> None:
    for images in (1, 30, 1000, 40_000):
        assert exact_drop_limit_pp(0, 0, images) == pytest.approx(100 * (1 - 0.05 ** (1 / images)), rel=1e-3)
    # with losses alone no smaller limit holds
    assert exact_drop_limit_pp(3, 0, 500) >= 100 * stats.beta.isf(0.05, 4, 497) - 1e-6


def test_more_losses_raise_it_and_more_gains_lower_it() -> None:
    by_losses = [exact_drop_limit_pp(lost, 2, 200) for lost in range(6)]
    by_gains = [exact_drop_limit_pp(4, won, 200) for won in range(6)]
    assert by_losses == sorted(set(by_losses))
    assert by_gains == sorted(set(by_gains), reverse=True)


@pytest.mark.parametrize(("lost", "won", "images"), [(60, 40, 2000), (500, 460, 20_000), (1, 30, 500)])
def test_with_many_changed_answers_it_is_near_the_score_limit(lost: int, won: int, images: int) -> None:
    score = drop_interval_pp(lost, won, images, 0.9)[1]
    spread = 100 * math.sqrt(lost + won) / images
    assert exact_drop_limit_pp(lost, won, images) == pytest.approx(float(score), abs=0.1 * spread)


def test_the_ends() -> None:
    assert math.isnan(exact_drop_limit_pp(0, 0, 0))
    assert exact_drop_limit_pp(5, 0, 5) == 100
    assert -100 < exact_drop_limit_pp(0, 5, 5) < 0
