import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.data.stream import default_workers, even_shares, spread

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=20)


@given(SIZES, st.integers(0, 500))
def test_shares_add_up_and_never_exceed_a_unit(sizes: list[int], images: int) -> None:
    shares = even_shares(sizes, images)
    assert sum(shares) == min(images, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@given(SIZES, st.integers(0, 500))
def test_shares_are_even_except_where_a_unit_has_no_more(sizes: list[int], images: int) -> None:
    shares = even_shares(sizes, images)
    unexhausted = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert max(shares) - min(unexhausted, default=max(shares)) <= 1


@given(st.integers(0, 300), st.integers(0, 300))
def test_spread_rows_are_one_of_each_equal_stretch(size: int, share: int) -> None:
    share = min(size, share)
    rows = spread(size, share)
    assert len(set(rows)) == share
    assert all(part * size // share <= row < (part + 1) * size // share for part, row in enumerate(rows))


def test_few_images_come_from_units_spread_over_all_of_them() -> None:
    shares = even_shares([100] * 100, 10)
    assert [sum(shares[first : first + 10]) for first in range(0, 100, 10)] == [1] * 10
    more = even_shares([100] * 100, 1050)
    assert [sum(more[first : first + 10]) for first in range(0, 100, 10)] == [105] * 10


def test_a_small_dataset_needs_no_workers() -> None:
    assert default_workers(units=5, images=500, processes=1, local_processes=1) == 0


@pytest.mark.parametrize(("processes", "most"), [(1, 14), (5, 3), (14, 1), (100, 1)])
def test_workers_never_outnumber_units(monkeypatch: pytest.MonkeyPatch, processes: int, most: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(1000)), raising=False)
    assert default_workers(14, 50_000, processes, local_processes=1) == most


def test_one_process_has_at_most_sixteen_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(1000)), raising=False)
    assert default_workers(504, 50_000, processes=1, local_processes=1) == 16


def test_workers_leave_a_core_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert default_workers(504, 50_000, processes=2, local_processes=2) == 3
    assert default_workers(504, 50_000, processes=16, local_processes=16) == 0
