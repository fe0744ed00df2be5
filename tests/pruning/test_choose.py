"""Which set is removed: the fixed sequence errs in at most 5 of 100 data sets, and says how many images would do."""

import csv
import functools
import io
import math

import numpy as np
import pytest
from scipy import stats

from headprobe.errors import UsageError
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.metrics.accuracy.exact_limit import exact_drop_limit_pp
from headprobe.pruning.choose import (
    curve_text,
    fixed_sequence,
    images_needed,
    refuse_few,
    refuse_unordered,
    smallest_fast,
    why_none,
)


@pytest.mark.parametrize(("most", "needed"), [(1.0, 299), (0.5, 598), (2.0, 149), (5.0, 59)])
def test_so_many_images_are_needed_even_if_nothing_flips(most: float, needed: int) -> None:
    # a set that loses exactly so much changes nothing in 5 of 100 data sets of so many images, or fewer
    assert needed == math.ceil(math.log(0.05) / math.log(1 - most / 100))
    assert images_needed(most) == needed
    refuse_few(needed, most)
    with pytest.raises(UsageError, match=rf"{needed - 1} judged images cannot show .* give at least {needed}"):
        refuse_few(needed - 1, most)


def test_nothing_behind_the_first_failure_counts() -> None:
    counts = [(1, 1000, 2, 2), (2, 1000, 6, 4), (3, 1000, 30, 2), (4, 1000, 0, 0)]
    tested, chosen = fixed_sequence(counts, 1.5)
    assert chosen == 1
    assert [one.tested for one in tested] == [True, True, True, False]
    assert [one.limit_pp <= 1.5 for one in tested] == [True, True, False, True]


def test_a_set_that_loses_more_is_accepted_in_at_most_5_of_100_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headprobe.pruning.choose.exact_drop_limit_pp", functools.cache(exact_drop_limit_pp))
    generator, accepted, trials, images = np.random.default_rng(3), 0, 2000, 100
    for _ in range(trials):
        # nested sets that truly lose half a point, then exactly what is allowed or more
        counts = []
        for heads, loses in enumerate((0.005, 0.06, 0.062, 0.07), start=1):
            lost, won, _ = generator.multinomial(images, [loses + 0.004, 0.004, 1 - loses - 0.008])
            counts.append((heads, images, int(lost), int(won)))
        chosen = fixed_sequence(counts, 6.0)[1]
        accepted += chosen is not None and chosen >= 1
    # 5% and what chance adds in so many trials
    assert 0 < accepted <= stats.binom.ppf(0.999, trials, 0.05)


def test_a_failed_first_set_says_how_many_images_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headprobe.pruning.choose.exact_drop_limit_pp", functools.cache(exact_drop_limit_pp))
    first = fixed_sequence([(1, 300, 4, 2)], 1.0)[0][0]
    needed = images_needed(1.0, 4, 2, 300)
    assert needed is not None
    assert needed > 300
    text = why_none(first, 1.0)
    assert f"about {needed:,} images would show it; nothing was written" in text
    assert "even the first set, of 1 head, may lose" in text
    more, fewer = (
        exact_drop_limit_pp(round(4 * images / 300), round(2 * images / 300), images) for images in (needed, needed - 1)
    )
    assert more <= 1 < fewer
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
