"""Who gives heads to whom under the ablation `resample`."""

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.backbone.masking.donors import DonorGroups, donor_groups
from headprobe.errors import RunError

UNIT = 3


def sizes(rows: int) -> list[int]:
    """The sizes of a unit's groups by the rule in words: fours, a remainder, and never a single row."""
    fours, left = divmod(rows, 4)
    if left == 1:
        return [4] * (fours - 1) + [5]
    return [4] * fours + [left] * (left > 0)


def cut(rows: list[int], bad: dict[int, str], batch_size: int) -> list[DonorGroups]:
    """The batches of a unit, the last one with a row that would stand alone."""
    starts = list(range(0, len(rows), batch_size))
    if len(rows) % batch_size == 1 and len(rows) > 1:
        starts.pop()
    found = []
    for start, stop in pairwise([*starts, len(rows)]):
        good = [row for row in rows[start:stop] if row not in bad]
        spoilt = {row: bad[row] for row in rows[start:stop] if row in bad}
        found.append(donor_groups(UNIT, good, spoilt, last=stop == len(rows), wanted=rows))
    return found


def donors_by_row(batches: list[DonorGroups], seed: int = 0, draw: int = 0) -> dict[int, int]:
    found: dict[int, int] = {}
    for groups in batches:
        rows = [row for group in groups.rows for row in group]
        for row, place in zip(rows, groups.donors(seed, draw).tolist(), strict=True):
            found[row] = rows[place]
    return found


rows_of_unit = st.lists(st.integers(0, 300), min_size=2, max_size=70, unique=True).map(sorted)
seeds = st.integers(0, 2**40)


@given(rows=rows_of_unit, seed=seeds, draw=st.integers(0, 999))
def test_donors_are_one_cycle_through_every_group_of_neighbours(rows: list[int], seed: int, draw: int) -> None:
    donor = donors_by_row(cut(rows, {}, 4), seed, draw)
    assert sorted(donor) == sorted(donor.values()) == rows
    first = 0
    for size in sizes(len(rows)):
        group = rows[first : first + size]
        seen, row = [], group[0]
        for _ in group:
            assert donor[row] != row
            seen.append(row)
            row = donor[row]
        assert row == group[0]
        assert sorted(seen) == group
        first += size


@given(rows=rows_of_unit, seed=seeds, batches=st.integers(1, 20))
def test_donors_do_not_depend_on_the_batch_size(rows: list[int], seed: int, batches: int) -> None:
    assert donors_by_row(cut(rows, {}, 4 * batches), seed) == donors_by_row(cut(rows, {}, 4), seed)


@given(rows=rows_of_unit, most=st.integers(1, 40))
def test_a_forward_pass_holds_whole_groups_and_its_own_donors(rows: list[int], most: int) -> None:
    groups = donor_groups(UNIT, rows, wanted=rows)
    donors, done, limits = groups.donors(0, 0).tolist(), 0, {sum(sizes(len(rows))[:n]) for n in range(len(rows) + 1)}
    while done < len(rows):
        now = groups.of_pass(done, most)
        assert now.start == done < now.stop
        assert now.stop in limits
        assert now.stop - done <= max(most, 5)
        assert all(now.start <= donor < now.stop for donor in donors[now])
        done = now.stop


@given(rows=rows_of_unit, data=st.data())
def test_rows_that_cannot_be_read_leave_the_cycle_and_change_no_other_group(
    rows: list[int], data: st.DataObject
) -> None:
    first = 0
    bad: dict[int, str] = {}
    for size in sizes(len(rows)):  # a group loses nobody, or all but two or more, or all
        lost = data.draw(st.sampled_from([n for n in range(size + 1) if size - n != 1]))
        bad |= dict.fromkeys(data.draw(st.permutations(rows[first : first + size]))[:lost], "no image")
        first += size
    whole, left = donors_by_row(cut(rows, {}, 8)), donors_by_row(cut(rows, bad, 8))
    assert sorted(left) == [row for row in rows if row not in bad]
    for row, donor in left.items():
        expected = whole[row]
        while expected in bad:  # the next in the same cycle that can be read
            expected = whole[expected]
        assert donor == expected != row


def test_the_order_is_by_a_documented_hash() -> None:
    rows = [10, 11, 12, 13]
    order = sorted(rows, key=lambda row: hashlib.sha256(f"resample:7:2:{UNIT}:{row}".encode()).digest())
    expected = dict(zip(order, order[1:] + order[:1], strict=True))
    assert donors_by_row([donor_groups(UNIT, rows, wanted=rows)], seed=7, draw=2) == expected


def test_draws_seeds_and_units_have_donors_of_their_own() -> None:
    rows = list(range(40))
    groups = donor_groups(0, rows)
    found = [groups.donors(seed, draw).tolist() for seed in range(3) for draw in range(3)]
    found.append(donor_groups(1, rows).donors(0, 0).tolist())
    assert len({tuple(one) for one in found}) == 10


def test_where_nobody_knows_the_rows_their_number_is_their_place() -> None:
    assert donor_groups(0, [4, 5, 6, 7], last=False).rows == ((4, 5, 6, 7),)
    assert donor_groups(0, [4, 6, 7, 8], {5: "broken"}).rows == ((4, 6, 7, 8),)


def test_a_unit_of_one_row_is_refused_by_name() -> None:
    with pytest.raises(RunError, match=r"validation-3\.parquet gives one row only: take more images .*, got 1 row$"):
        donor_groups(0, [17], wanted=[17], name="validation-3.parquet")
    with pytest.raises(RunError, match="gives one row only"):
        donor_groups(0, [], {0: "no image"})


def test_a_group_with_one_image_that_can_be_read_is_refused_with_the_others() -> None:
    with pytest.raises(RunError, match=r"no donor for row 6 of a\.parquet: no other of the rows 4-7 .*\(row 4: no im"):
        donor_groups(0, [0, 1, 6], {2: "", 3: "", 4: "no image", 5: "", 7: ""}, name="a.parquet")


@pytest.mark.parametrize(("rows", "last"), [([0, 1, 2], False), ([8], True), ([2, 3, 4, 5], True)])
def test_batches_that_cut_a_group_are_refused(rows: list[int], last: bool) -> None:
    with pytest.raises(RunError, match="needs batches of whole groups of 4 rows"):
        donor_groups(0, rows, last=last)


def test_a_batch_without_a_good_image_has_no_groups() -> None:
    groups = donor_groups(0, [], {0: "", 1: "", 2: "", 3: ""})
    assert groups.rows == ()
    assert groups.donors(0, 0).shape == (0,)
    assert donor_groups(0, []).rows == ()  # a unit without rows
