import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.errors import UsageError

masks_with_rows = st.lists(st.integers(0, 59), max_size=60, unique=True)


@given(ordered=masks_with_rows, batch_size=st.integers(1, 64), budget=st.integers(1, 200))
def test_every_mask_is_in_exactly_one_wave_or_idle(ordered: list[int], batch_size: int, budget: int) -> None:
    plan = RowPlan.build(ordered, 60, batch_size, budget)
    assert [mask for wave in plan.waves for mask in wave] == ordered
    assert sorted([*ordered, *plan.idle]) == list(range(60))


@given(ordered=masks_with_rows, batch_size=st.integers(1, 64), budget=st.integers(2, 200))
def test_no_forward_pass_exceeds_the_budget(ordered: list[int], batch_size: int, budget: int) -> None:
    plan = RowPlan.build(ordered, 60, batch_size, budget)
    assert plan.most_rows <= budget
    assert 1 <= plan.images <= batch_size


def test_a_budget_below_two_rows_still_scores_one_mask_at_a_time() -> None:
    plan = RowPlan.build([0, 1], 2, 8, 1)
    assert plan.waves == ((0,), (1,))
    assert plan.images == 1


def test_without_masks_there_is_one_wave_with_the_trunk_alone() -> None:
    plan = RowPlan.build([], 0, 32, 64)
    assert (plan.waves, plan.images, plan.most_rows) == (((),), 32, 32)


@pytest.mark.parametrize(("batch_size", "budget"), [(0, 8), (8, 0), (-1, 8)])
def test_sizes_below_one_are_refused(batch_size: int, budget: int) -> None:
    with pytest.raises(UsageError, match=f"got {batch_size} and {budget}"):
        RowPlan.build([0], 1, batch_size, budget)


@given(ordered=masks_with_rows, batches=st.integers(1, 16), budget=st.integers(10, 300))
def test_images_that_must_stay_together_share_passes_within_the_budget(
    ordered: list[int], batches: int, budget: int
) -> None:
    plan = RowPlan.build(ordered, 60, 4 * batches, budget, together=4)
    assert plan.images % 4 == 0
    assert 4 <= plan.images <= 4 * batches
    assert plan.most_images == max(5, plan.images)  # a single image left over joins a group of four
    assert plan.least_rows <= plan.most_rows <= budget
    assert [mask for wave in plan.waves for mask in wave] == ordered


def test_a_budget_below_one_group_under_one_mask_is_refused_with_the_least() -> None:
    assert RowPlan.build([0, 1], 2, 32, 10, together=4).waves == ((0,), (1,))
    with pytest.raises(UsageError, match=r"choose --model.row_budget 10 or more, got 9$"):
        RowPlan.build([0, 1], 2, 32, 9, together=4)
    with pytest.raises(UsageError, match=r"choose --data.batch_size 4 or a multiple of it, got 3$"):
        RowPlan.build([0, 1], 2, 3, 100, together=4)
