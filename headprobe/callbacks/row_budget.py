"""Chooses how many rows share a forward pass: as asked for, as in an earlier session, as measured, or by trial."""

import json
from pathlib import Path
from typing import Any

import lightning

from headprobe.backbone.weights import built_options
from headprobe.budget import LEAST, MOST, PAYS_FROM, SHARE, BudgetTrials, Trial
from headprobe.errors import RunError
from headprobe.module import HeadProbe
from headprobe.passes import ForwardPasses
from headprobe.processes import from_first
from headprobe.report.table import console
from headprobe.run.budgets import keep_budget, measured_budget
from headprobe.run.record import hardware, versions
from headprobe.text import counted


class RowBudget(lightning.Callback):
    """Finds the fastest row budget for a run that is long enough to gain by it, unless one is given.

    The first process tries and all others follow: rows decide the last bits of a logit, so all must have the same.
    """

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Choose before the first image is scored."""
        if isinstance(pl_module, HeadProbe):
            choose_budget(trainer, pl_module)


def choose_budget(trainer: lightning.Trainer, probe: HeadProbe) -> None:
    """Choose the row budget of a planned test, where the user and units of an earlier session leave the choice.

    Raises:
        RunError: Nothing is planned.
    """
    passes = probe.passes
    if passes is None:
        raise RunError("plan_passes must be called before a row budget can be chosen")
    if probe.row_budget is not None or probe.most_rows is not None:
        return
    rows = json.loads(from_first(trainer, lambda: json.dumps(_chosen(trainer, probe, passes)).encode()))
    if rows != passes.plan.budget:
        passes.take(rows)
        if probe.device.type == "cuda":
            passes.rehearse(probe.device)


def _chosen(trainer: lightning.Trainer, probe: HeadProbe, passes: ForwardPasses) -> int:
    """Return the budget that was measured before, or is now; the planned one where a trial does not pay."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning where there is one
    trials = BudgetTrials(passes, probe.device, trainer.precision_plugin.forward_context)
    images = getattr(data, "images_to_do", None)
    run = PAYS_FROM if images is None else trials.estimate(images // trainer.world_size)
    if run < PAYS_FROM:
        return passes.plan.budget
    rows = measured_before(trainer, probe, passes)
    if rows is not None:
        _say(f"Row budget: {counted(rows, 'row')} a forward pass, as measured before")
        return rows
    best = trials.fastest(min(MOST, max(LEAST, SHARE * run)))
    if best is None:
        return passes.plan.budget
    tried = {trial.plan.budget: trial.seconds for trial in trials.trials}
    keep_budget(_directory(trainer), _about(trainer, probe, passes), best.plan.budget, tried)
    _say(_found(best, tried))
    return best.plan.budget


def measured_before(trainer: lightning.Trainer, probe: HeadProbe, passes: ForwardPasses) -> int | None:
    """Return the row budget that was measured for these forward passes on this machine, None where none was."""
    return measured_budget(_directory(trainer), _about(trainer, probe, passes))


def _directory(trainer: lightning.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "lightning_logs" / "row_budgets"


def _about(trainer: lightning.Trainer, probe: HeadProbe, passes: ForwardPasses) -> dict[str, Any]:
    """Return what the speed of a forward pass depends on."""
    return {
        "model": probe.source.name,
        "options": built_options(probe.source),
        "input_size": list(passes.growing.layout.input_size),
        "classes": probe.num_classes,
        "joins": " ".join(str(place) for place in passes.growing.join_places),
        "batch_size": passes.plan.batch_size,
        "device": trainer.strategy.root_device.type,
        "hardware": hardware(),
        "processes": trainer.num_devices,
        "precision": str(trainer.precision),
        "versions": versions(),
    }


def _found(best: Trial, tried: dict[int, float]) -> str:
    others = ", ".join(f"{rows} {seconds / best.seconds:.2f}" for rows, seconds in sorted(tried.items()))
    return (
        f"Row budget: {counted(best.plan.budget, 'row')} a forward pass, the fastest that was tried (rows and time "
        f"beside the fastest: {others}); --model.row_budget {best.plan.budget} takes it without a trial"
    )


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
