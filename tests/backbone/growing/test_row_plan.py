import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.errors import UsageError

joins_of_masks = st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60)


@given(joins=joins_of_masks, batch_size=st.integers(1, 64), budget=st.integers(1, 200))
def test_every_mask_is_in_exactly_one_wave_or_idle(joins: list[int | None], batch_size: int, budget: int) -> None:
    plan = RowPlan.build(joins, batch_size, budget)
    placed = [mask for wave in plan.waves for mask in wave] + list(plan.idle)
    assert sorted(placed) == list(range(len(joins)))
    assert all(joins[mask] is None for mask in plan.idle)


@given(joins=joins_of_masks, batch_size=st.integers(1, 64), budget=st.integers(2, 200))
def test_no_forward_pass_exceeds_the_budget(joins: list[int | None], batch_size: int, budget: int) -> None:
    plan = RowPlan.build(joins, batch_size, budget)
    assert plan.most_rows <= budget
    assert 1 <= plan.images <= batch_size


@given(joins=joins_of_masks, batch_size=st.integers(1, 64), budget=st.integers(1, 200))
def test_masks_of_a_wave_are_in_the_order_in_which_they_join(
    joins: list[int | None], batch_size: int, budget: int
) -> None:
    for wave in RowPlan.build(joins, batch_size, budget).waves:
        places = [joins[mask] for mask in wave]
        assert places == sorted(places, key=lambda place: place or 0)


def test_a_budget_below_two_rows_still_scores_one_mask_at_a_time() -> None:
    plan = RowPlan.build([0, 3], 8, 1)
    assert plan.waves == ((0,), (1,))
    assert plan.images == 1


def test_without_masks_there_is_one_wave_with_the_trunk_alone() -> None:
    plan = RowPlan.build([], 32, 64)
    assert (plan.waves, plan.images, plan.most_rows) == (((),), 32, 32)


@pytest.mark.parametrize(("batch_size", "budget"), [(0, 8), (8, 0), (-1, 8)])
def test_sizes_below_one_are_refused(batch_size: int, budget: int) -> None:
    with pytest.raises(UsageError, match=f"got {batch_size} and {budget}"):
        RowPlan.build([1], batch_size, budget)
