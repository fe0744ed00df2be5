"""`test --dry-run`: the masks of a spec, their cost on this machine, and the smallest drop that they can resolve."""

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.callbacks.identity import kept_proofs, statistics_of
from headprobe.commands.dry.fitting import Fitting, plan_fitting
from headprobe.commands.dry.timing import seconds_per_image
from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_tests import smallest_resolvable_drop
from headprobe.module import HeadProbe
from headprobe.report.table import console
from headprobe.text import counted, duration

if TYPE_CHECKING:
    from headprobe.commands.dry.classifier import ClassifierCost

CHURN_ONE_HEAD, CHURN_SEVERAL_HEADS = (0.01, 0.05), (0.03, 0.07)
"""Least and largest fraction of images that flip without net effect, as many lost as won, under masks of one head and
of several. Measured on DeiT-Ti: 500 ImageNet images, all heads, layers, indices, 32 random sets (docs/results.md)."""


def print_dry_run(
    trainer: lightning.Trainer,
    probe: HeadProbe,
    data: Any,
    about: Sequence[str] = (),
    writing: float | None = None,
) -> None:
    """Print what a run would do: masks, forward passes, time and memory measured on noise, smallest resolvable drop.

    Args:
        trainer: Where the run would be.
        probe: The model with its masks.
        data: The data module, bound to the model.
        about: Lines about the masks.
        writing: Seconds that tables and figures take, for a plan that counts them and the proofs too.
    """
    device = trainer.strategy.root_device
    probe.to(device)
    decided = probe.decisions()
    threads = torch.get_num_threads()
    if device.type == "cpu":  # the processes of a run share the cores
        torch.set_num_threads(max(1, threads // trainer.num_devices))
    probe.known = kept_proofs(trainer, probe).read()
    with torch.inference_mode():
        classifier = _classifier(trainer, probe, data)
        fitting = plan_fitting(trainer, probe, data)
        began = time.perf_counter()
        probe.begin_judging(data.batch_size, statistics_of(trainer))
        proofs = time.perf_counter() - began
        seconds = seconds_per_image(trainer, probe, data.batch_size)
        probe.end_judging()
    torch.set_num_threads(threads)
    images = data.expected_images
    decisions = [f"{decision.about}: {decision.text}" for decision in [*decided, *data.decisions()]]
    fits = [*(classifier.lines() if classifier else ()), *(fitting.lines() if fitting else ())]
    lines = [*decisions, *about, *_masks_lines(probe), *fits, _plan_line(probe)]
    if memory := _memory_text(device):
        lines.append(f"memory: {memory} at the peak of a trial forward pass, a process")
    beside = None if writing is None else Beside(proofs * (2 if fitting else 1), writing)
    lines += time_lines(seconds, images, trainer.world_size, fitting, beside, classifier)
    if images is not None and probe.labelled and (line := _resolves_line(images, probe)):
        lines.append(line)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _classifier(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> "ClassifierCost | None":
    """Return what fitting a classifier costs; None where none is fitted."""
    if not probe.takes_classes:
        return None
    from headprobe.commands.dry.classifier import plan_classifier  # here: few runs need it

    return plan_classifier(trainer, probe, data)


def _masks_lines(probe: HeadProbe) -> list[str]:
    names = [f"{variant.name} ({counted(variant.mask.mask.count, 'head')})" for variant in probe.variants]
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    heads = sum(probe.layout.heads_per_layer)
    return [
        f"model: {probe.title}, {counted(len(probe.layout.layers), 'layer')}, {counted(heads, 'head')}, "
        f"{counted(probe.num_classes, 'class') if probe.labelled else 'no classifier'}",
        f"masks: {len(names):,} beside the baseline" + (f": {shown}" if names else ""),
    ]


def _plan_line(probe: HeadProbe) -> str:
    plan = _plan(probe)
    rows = 1 + max(map(len, plan.waves))
    passes = "one such pass holds" if len(plan.waves) == 1 else f"{len(plan.waves):,} such passes hold"
    same = 0 if probe.passes is None else probe.passes.same
    once = f"; {counted(same, 'mask')} with the heads and ablation of another run with it" if same else ""
    return (
        f"plan: {counted(plan.images, 'image')} a forward pass, growing to {counted(rows, 'row')} each; {passes} all "
        f"masks; an image costs about {probe.work:.2f} plain forward passes instead of {1 + len(probe.variants)}{once}"
    )


def _plan(probe: HeadProbe) -> RowPlan:
    """Return the current row plan, which an out-of-memory during the trial replaces."""
    if probe.plan is None:
        raise RunError("the forward passes are not planned")
    return probe.plan


class Beside(NamedTuple):
    """Seconds that a run takes beside its passes.

    Attributes:
        proofs: Before images are read.
        writing: For tables and figures, at the end.
    """

    proofs: float
    writing: float


def time_lines(
    seconds: float,
    images: int | None,
    processes: int,
    fitting: Fitting | None,
    beside: Beside | None = None,
    classifier: "ClassifierCost | None" = None,
) -> list[str]:
    """Return the time of both stages, and what it is of an image."""
    each = f"{seconds * 1000:.3g} ms an image on this machine"
    on = "one process" if processes == 1 else f"{processes} processes"
    fit = [classifier.time_line(processes)] if classifier else []
    fit += fitting.time_lines(processes) if fitting else []
    judge = "time to judge" if fit else "time"
    if images is None:
        return [*fit, f"{judge}: {each}, model only; the data set does not say how many images it has"]
    whole = images * seconds / processes
    lines = [
        *fit,
        f"{judge}: about {duration(whole)} for {counted(images, 'image')} on {on} ({each}, model "
        "only; reading and decoding go on beside it)",
    ]
    if beside is not None:
        lines.append(
            f"time beside: about {duration(beside.proofs)} to prove the masks, {duration(beside.writing)} for tables, "
            "figures and the page"
        )
    if any(one is not None and one.images is None for one in (fitting, classifier)):
        return lines
    if fit or beside is not None:
        most = "at most about" if fitting and fitting.heads else "about"
        fits = fitting.images * fitting.most_seconds / processes if fitting and fitting.images else 0.0
        fits += classifier.seconds_in_all(processes) if classifier else 0.0
        lines.append(f"time in all: {most} {duration(whole + fits + sum(beside or ()))}")
    return lines


def _resolves_line(images: int, probe: HeadProbe) -> str:
    """Return the smallest drops that the masks' p can find, in words; empty without a masked head."""
    counts = {variant.mask.mask.count for variant in probe.variants} - {0}
    kinds = [churn for churn, there in ((CHURN_ONE_HEAD, 1 in counts), (CHURN_SEVERAL_HEADS, counts - {1})) if there]
    if not kinds:
        return ""
    lowest, highest = min(low for low, _ in kinds), max(high for _, high in kinds)
    small, large = (smallest_resolvable_drop(images, churn) for churn in (lowest, highest))
    if math.isnan(small) or math.isnan(large):
        return f"resolves: no top-1 drop, as {counted(images, 'image')} are too few"
    return (
        f"resolves: a top-1 drop of {small:.2f} to {large:.2f} points or more on {counted(images, 'image')} (80% "
        f"power, 5% level, if {lowest:.0%} to {highest:.0%} of the images flip either way by chance, as under such "
        "masks of DeiT-Ti)"
    )


def _memory_text(device: torch.device) -> str:
    """Return the peak memory of this process in words, empty where the system does not report it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource  # not at module level: Windows has none
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB of memory"
