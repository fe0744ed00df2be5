"""Which set is removed: the fixed sequence errs in at most 5 of 100 data sets; limits are those of the score test."""

import csv
import io
import math

import numpy as np
import pytest
from scipy import optimize, stats

from headprobe.errors import UsageError
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.pruning.choose import (
    curve_text,
    fixed_sequence,
    images_needed,
    limit_pp,
    refuse_few,
    refuse_unordered,
    smallest_fast,
    why_none,
)

Z = 1.6448536269514722  # of 95%, one-sided


def score(drop: float, lost: int, won: int, images: int) -> float:
    """z of the score test of a drop: the variance at the rates that maximise the likelihood under it, by a search."""

    def minus_likelihood(rate: float) -> float:
        chances = (rate + drop, rate, 1 - 2 * rate - drop)
        counts = (lost, won, images - lost - won)
        return -sum(number * math.log(max(chance, 1e-300)) for number, chance in zip(counts, chances, strict=True))

    most = (1 - drop) / 2
    rate = optimize.minimize_scalar(minus_likelihood, bounds=(max(0.0, -drop), most), options={"xatol": 1e-13}).x
    variance = (2 * rate + drop - drop**2) / images
    return ((lost - won) / images - drop) / math.sqrt(variance)


@pytest.mark.parametrize(("lost", "won", "images"), [(9, 4, 500), (3, 3, 300), (40, 10, 1000), (1, 12, 400)])
def test_the_limit_is_where_a_one_sided_test_at_5_percent_no_longer_rejects(lost: int, won: int, images: int) -> None:
    found = limit_pp(lost, won, images) / 100
    assert score(found, lost, won, images) == pytest.approx(-Z, abs=1e-4)
    assert found > (lost - won) / images


@pytest.mark.parametrize(("most", "needed"), [(1.0, 268), (0.5, 539), (2.0, 133), (5.0, 52)])
def test_so_many_images_are_needed_even_if_nothing_flips(most: float, needed: int) -> None:
    # without a flip the limit is z^2 / (n + z^2), Wilson's for 0 of n
    assert needed == math.ceil(Z**2 * (100 / most - 1))
    assert images_needed(most) == needed
    assert limit_pp(0, 0, needed) <= most < limit_pp(0, 0, needed - 1)
    refuse_few(needed, most)
    with pytest.raises(UsageError, match=rf"{needed - 1} judged images cannot show .* give at least {needed}"):
        refuse_few(needed - 1, most)


def test_nothing_behind_the_first_failure_counts() -> None:
    counts = [(1, 1000, 2, 2), (2, 1000, 6, 4), (3, 1000, 30, 2), (4, 1000, 0, 0)]
    tested, chosen = fixed_sequence(counts, 1.5)
    assert chosen == 1
    assert [one.tested for one in tested] == [True, True, True, False]
    assert [one.limit_pp <= 1.5 for one in tested] == [True, True, False, True]


def test_a_set_that_loses_more_is_accepted_in_at_most_5_of_100_data_sets() -> None:
    generator, accepted, trials, images = np.random.default_rng(3), 0, 2000, 600
    for _ in range(trials):
        # nested sets that truly lose 0.5 points, then exactly what is allowed or more
        counts = []
        for heads, loses in enumerate((0.005, 0.02, 0.021, 0.03), start=1):
            lost, won, _ = generator.multinomial(images, [loses + 0.01, 0.01, 1 - loses - 0.02])
            counts.append((heads, images, int(lost), int(won)))
        chosen = fixed_sequence(counts, 2.0)[1]
        accepted += chosen is not None and chosen >= 1
    # 5% and what chance adds in so many trials
    assert accepted <= stats.binom.ppf(0.999, trials, 0.05)
    assert accepted > 0


@pytest.mark.parametrize(("images", "most"), [(268, 0.069), (400, 0.05), (600, 0.05)])
@pytest.mark.parametrize("wins", [0.0, 0.001])
def test_the_exact_chance_to_accept_a_set_that_loses_what_is_allowed(images: int, most: float, wins: float) -> None:
    # every outcome of a set that truly loses 1 point, with its probability
    chance, rates = 0.0, [0.01 + wins, wins, 0.99 - 2 * wins]
    for lost in range(12):
        for won in range(6 if wins else 1):
            if limit_pp(lost, won, images) <= 1.0:
                chance += stats.multinomial.pmf([lost, won, images - lost - won], images, rates)
    assert 0.01 < chance <= most


def test_a_failed_first_set_says_how_many_images_would_do() -> None:
    first = fixed_sequence([(1, 300, 4, 2)], 1.0)[0][0]
    needed = images_needed(1.0, 4, 2, 300)
    assert needed is not None
    assert needed > 300
    text = why_none(first, 1.0)
    assert f"about {needed:,} images would show it; nothing was written" in text
    assert "even the first set, of 1 head, may lose" in text
    share = needed / 300
    assert limit_pp(round(4 * share), round(2 * share), needed) == pytest.approx(1.0, abs=0.01)
    worse = fixed_sequence([(1, 300, 9, 2)], 1.0)[0][0]
    assert "its drop is +2.33 points, so no number of images would show it" in why_none(worse, 1.0)


def test_the_curve_is_a_table_of_every_set() -> None:
    tested, chosen = fixed_sequence([(2, 1000, 2, 2), (4, 1000, 30, 2), (6, 1000, 40, 2)], 1.5)
    rows = list(csv.DictReader(io.StringIO(curve_text(tested, chosen))))
    assert [row["heads"] for row in rows] == ["2", "4", "6"]
    assert [(row["tested"], row["chosen"]) for row in rows] == [("1", "1"), ("1", "0"), ("0", "0")]
    assert float(rows[1]["drop_pp"]) == pytest.approx(2.8)
    assert [float(row["limit_pp"]) for row in rows] == [one.limit_pp for one in tested]


def test_sets_must_be_nested() -> None:
    refuse_unordered(expand_all([MaskSpec("grow:random:0")], [4, 4], ""))
    with pytest.raises(UsageError, match="choose among nested sets: give one grow:calibration:SCORE"):
        refuse_unordered(expand_all([MaskSpec("each:layer")], [4, 4], ""))


@pytest.mark.parametrize("wanted", [1.05, 1.2, 1.55, 1.9])
def test_the_smallest_fast_set_is_found_by_halving(wanted: float) -> None:
    speeds = [1 + 0.05 * place for place in range(19)]
    chosen, measured = smallest_fast(len(speeds), wanted, speeds.__getitem__)
    assert chosen == next(place for place, speed in enumerate(speeds) if speed >= wanted)
    assert all(measured[place] == speeds[place] for place in measured)
    assert chosen - 1 in measured
    assert len(measured) <= 6


def test_a_model_that_is_never_fast_enough_is_said() -> None:
    assert smallest_fast(5, 3.0, lambda place: 1 + 0.1 * place) == (None, {4: 1.4})
