"""Trials of row budgets: what they choose, when they stop, and that they leave the model and torch as they were.

The costs of plans are written down here; a plan's shape is images a pass and chunks of masks.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from headprobe import budget
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.budget import BudgetTrials
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe

CPU = torch.device("cpu")
Costs = Callable[[RowPlan], float]


def trials(masks: int, batch: int = 32, device: torch.device = CPU, rows: int = 80) -> BudgetTrials:
    """Make trials for so many masks, each with a join point of its own, and one mask without heads."""
    places: Sequence[int | None] = [*range(masks), None]
    growing = SimpleNamespace(join_places=places, plan=lambda size, most: RowPlan.build(places, size, most))
    passes: Any = SimpleNamespace(growing=growing, plan=RowPlan.build(places, batch, rows))
    return BudgetTrials(passes, device)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Costs], list[RowPlan]]:
    """Let passes take the seconds that a function says, on a clock of our own; calling it gives the plans that run."""
    now = 0.0

    def script(costs: Costs) -> list[RowPlan]:
        run: list[RowPlan] = []

        def seconds(self: BudgetTrials, plan: RowPlan) -> float:
            nonlocal now
            run.append(plan)
            cost = costs(plan)
            now += cost
            return cost

        monkeypatch.setattr(BudgetTrials, "_seconds", seconds)
        return run

    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now))
    return script


def by_images(**costs: float) -> Costs:
    """Return the cost of a pass from the seconds an image takes: `images_4=0.5`."""
    return lambda plan: plan.images * costs[f"images_{plan.images}"]


def shapes(found: BudgetTrials) -> list[tuple[int, int]]:
    return [(trial.plan.images, len(trial.plan.chunks)) for trial in found.trials]


def test_the_budget_with_the_cheapest_image_is_found(scripted: Any) -> None:
    scripted(by_images(images_3=1.0, images_4=0.9, images_6=0.5, images_8=0.7, images_12=0.8))
    found = trials(masks=6)
    best = found.fastest(1000.0)
    assert best is not None
    assert (best.plan.images, best.plan.budget, best.seconds) == (6, 42, 0.5)
    assert best.plan.most_rows == 42  # 6 images under 6 masks and none


def test_two_budgets_in_vain_end_the_search(scripted: Any) -> None:
    scripted(by_images(images_3=1.0, images_4=0.5, images_6=0.6, images_8=0.7, images_12=0.1))
    found = trials(masks=6)
    found.fastest(1000.0)
    assert [images for images, _ in shapes(found)] == [3, 4, 6, 8]


def test_one_in_vain_is_forgotten_when_the_next_gains(scripted: Any) -> None:
    scripted(by_images(images_3=1.0, images_4=1.1, images_6=0.8, images_8=0.9, images_12=0.5, images_16=1, images_24=1))
    found = trials(masks=6)
    best = found.fastest(1000.0)
    assert best is not None
    assert best.plan.images == 12
    assert [images for images, _ in shapes(found)] == [3, 4, 6, 8, 12, 16, 24]


def test_a_gain_within_the_noise_of_clocks_is_none(scripted: Any) -> None:
    scripted(by_images(images_3=1.0, images_4=0.99, images_6=0.98))
    best = trials(masks=6).fastest(1000.0)
    assert best is not None
    assert best.plan.images == 3


def test_the_better_of_two_passes_counts(scripted: Any) -> None:
    slow_first = iter([30.0, 40.0, 60.0, 12.0, 8.0, 3.0])
    run = scripted(lambda plan: next(slow_first))
    found = trials(masks=6)
    best = found.fastest(1000.0)
    assert best is not None
    assert best.plan.images == 3
    assert [plan.images for plan in run] == [3, 4, 6, 6, 4, 3]  # upwards, then downwards
    assert [trial.seconds for trial in found.trials] == [1.0, 2.0, 2.0]


def test_the_search_ends_before_its_time_is_up(scripted: Any) -> None:
    run = scripted(lambda plan: plan.images * (1.0 - plan.images / 100))
    trials(masks=6).fastest(30.0)
    # half of the time: 3, 4 and 6 images take 2.91 + 3.84 + 5.64 = 12.4 s; 8 images would take about 7.5 s
    assert [plan.images for plan in run] == [3, 4, 6, 6, 4, 3]


def test_one_budget_alone_is_no_choice(scripted: Any) -> None:
    run = scripted(lambda plan: plan.images * 1.0)
    assert trials(masks=6).fastest(0.0) is None  # no time for a second one
    assert [plan.images for plan in run] == [3]
    assert trials(masks=40, batch=1).fastest(1000.0) is None  # there is no second one


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_where_memory_ends_the_best_so_far_is_taken(scripted: Any, error: RuntimeError) -> None:
    def costs(plan: RowPlan) -> float:
        if plan.most_rows > 50:
            raise error
        return 1.0

    scripted(costs)
    found = trials(masks=6)
    best = found.fastest(1000.0)
    assert best is not None
    assert (best.plan.images, shapes(found)) == (6, [(3, 1), (4, 1), (6, 1)])


def test_memory_that_ends_at_once_leaves_no_choice_and_no_estimate(scripted: Any) -> None:
    def none(plan: RowPlan) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    scripted(none)
    assert trials(masks=6).fastest(1000.0) is None
    assert trials(masks=6).estimate(50_000) == 0.0


def test_other_errors_are_not_swallowed(scripted: Any) -> None:
    def broken(plan: RowPlan) -> float:
        raise RuntimeError("shapes do not match")

    scripted(broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trials(masks=6).fastest(1000.0)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trials(masks=6).estimate(10)


def all_plans(scripted: Any, masks: int, batch: int, device: torch.device = CPU) -> list[RowPlan]:
    """Return the plans that are tried if each is better than the last."""
    cheaper = iter(2.0 ** -(number // 2) for number in range(1000))
    scripted(lambda plan: plan.images * next(cheaper))
    found = trials(masks, batch, device)
    found.fastest(1e9)
    return [trial.plan for trial in found.trials]


@pytest.mark.parametrize("batch", [1, 5, 32, 256])
@pytest.mark.parametrize("masks", [0, 1, 6, 36, 127, 128, 144, 384, 1023, 2000, 20_000])
@pytest.mark.parametrize(("kind", "fewest", "most"), [("cpu", 16, 1024), ("cuda", 128, 16384)])
def test_plans_differ_grow_and_stay_within_bounds(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, kind: str, fewest: int, most: int, masks: int, batch: int
) -> None:
    plans = all_plans(scripted, masks, batch, torch.device(kind))
    assert plans
    assert len({(plan.images, plan.chunks) for plan in plans}) == len(plans)
    rows = [plan.most_rows for plan in plans]
    assert rows == sorted(rows)
    assert all(fewest <= plan.budget <= most and plan.most_rows <= plan.budget for plan in plans)
    assert {plan.batch_size for plan in plans} == {batch}


def test_masks_are_split_into_chunks_only_where_they_are_many(scripted: Any) -> None:
    for masks in (0, 1, 36, 127):
        assert {len(plan.chunks) for plan in all_plans(scripted, masks, 32)} == {1}, masks
    several = all_plans(scripted, 144, 32)
    # the fewest rows: 16 of which one is the baseline's, so 144 masks need 10 passes
    assert [len(plan.chunks) for plan in several] == [10, 7, 5, 4, 3, 2, 1, 1, 1, 1, 1]
    assert [plan.images for plan in several] == [1] * 7 + [2, 3, 4, 6]


def test_a_budget_has_no_more_rows_than_its_passes_use(scripted: Any) -> None:
    assert [(plan.budget, plan.most_rows) for plan in all_plans(scripted, 6, 8)] == [
        (21, 21),
        (28, 28),
        (42, 42),
        (56, 56),
    ]


def test_the_time_of_a_run_is_that_of_one_image_in_each_chunk(scripted: Any) -> None:
    run = scripted(lambda plan: 0.25)
    assert trials(masks=6, rows=80).estimate(100) == 25.0
    assert [(plan.images, plan.chunks) for plan in run] == [(1, (tuple(range(6)),))]
    assert trials(masks=6, rows=3).estimate(8) == 6.0  # 3 passes of 2 masks each


def test_a_slow_first_pass_is_not_taken_for_a_long_run(scripted: Any) -> None:
    seconds = iter([100.0, 0.125])
    run = scripted(lambda plan: next(seconds))
    assert trials(masks=6).estimate(8) == 1.0
    assert len(run) == 2


@pytest.fixture(scope="module")
def probe() -> HeadProbe:
    probe = HeadProbe()
    probe.ablate([MaskSpec("each:layer")])
    probe.plan_passes(4)
    return probe


def hooks(probe: HeadProbe) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in probe.modules())


def test_a_trial_leaves_everything_as_it_was(probe: HeadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = probe.passes
    assert passes is not None
    images = torch.randint(0, 256, (4, *probe.data_config["input_size"]), dtype=torch.uint8)
    plan, installed, state = passes.plan, hooks(probe), torch.get_rng_state()
    logits = probe.masked_logits(images)
    found = BudgetTrials(passes, CPU)
    assert found.estimate(100) > 0.0
    best = found.fastest(1.0)
    assert best is not None
    assert all(trial.seconds > 0.0 for trial in found.trials)
    assert passes.plan is plan
    assert hooks(probe) == installed
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(probe.masked_logits(images), logits)
    assert {name for name, value in probe.named_parameters() if value.grad is not None} == set()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not match")])
def test_hooks_are_gone_after_a_trial_that_failed(
    probe: HeadProbe, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    passes, installed = probe.passes, hooks(probe)
    assert passes is not None
    plan = passes.plan

    def fails(self: GrowingPass, images: Any, chunk: Any, whole: bool) -> Any:
        assert hooks(probe) > installed
        raise error

    monkeypatch.setattr(GrowingPass, "_forward", fails)
    found = BudgetTrials(passes, CPU)
    if isinstance(error, torch.OutOfMemoryError):
        assert found.fastest(1.0) is None
    else:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            found.fastest(1.0)
    assert hooks(probe) == installed
    assert passes.plan is plan


def test_trials_compute_in_the_precision_of_the_run(probe: HeadProbe) -> None:
    passes = probe.passes
    assert passes is not None
    seen: list[tuple[torch.dtype, bool]] = []

    def note(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen.append((out.dtype, torch.is_inference_mode_enabled()))

    linear = next(module for module in probe.modules() if isinstance(module, nn.Linear))
    handle = linear.register_forward_hook(note)
    BudgetTrials(passes, CPU, lambda: torch.autocast("cpu", torch.bfloat16)).estimate(1)
    BudgetTrials(passes, CPU).estimate(1)
    handle.remove()
    assert seen == [(torch.bfloat16, True), (torch.float32, True)]
