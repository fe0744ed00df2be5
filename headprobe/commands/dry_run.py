"""`test --dry-run`: the masks of a spec, their cost on this machine, and the smallest drop that they can resolve."""

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.calibration.fills import stand_in
from headprobe.calibration.optimal import MOST_ROUNDS, Search, heads_to_optimise
from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_tests import smallest_resolvable_drop
from headprobe.module import HeadProbe
from headprobe.report.table import console
from headprobe.text import counted, duration

TIMED_SECONDS = 3.0
TIMED_PASSES = 3
"""The trial lasts so many seconds, or so many passes if these take longer."""

CHURN_ONE_HEAD, CHURN_SEVERAL_HEADS = (0.01, 0.05), (0.03, 0.07)
"""Least and largest fraction of images that flip without net effect, as many lost as won, under masks of one head and
of several. Measured on DeiT-Ti: 500 ImageNet images, all heads, layers, indices, 32 random sets (docs/results.md)."""


def print_dry_run(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> None:
    """Print what a run would do: masks, forward passes, time and memory measured on noise, smallest resolvable drop.

    Args:
        trainer: Where the run would be.
        probe: The model with its masks.
        data: The data module, bound to the model.
    """
    device = trainer.strategy.root_device
    probe.to(device)
    if device.type == "cpu":  # the processes of a run share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // trainer.num_devices))
    images, processes = data.expected_images, trainer.world_size
    fits = [] if probe.given_calibration is not None else [*probe.fitted_kinds, *["scores"] * probe.score_heads]
    if fits:
        probe.calibration = stand_in(probe.layout)
    with torch.inference_mode():
        optimal = _optimal_line(trainer, probe, data)
        probe.plan_passes(data.batch_size)
        seconds = _seconds_per_image(trainer, probe, data.batch_size)
    decisions = [f"{decision.about}: {decision.text}" for decision in [*probe.decisions(), *data.decisions()]]
    lines = [*decisions, *_masks_lines(probe), _plan_line(probe)]
    if fits:
        lines.append(_calibration_line(trainer, probe, data))
    if memory := _memory_text(device):
        lines.append(f"memory: {memory} at the peak of a trial forward pass, a process")
    lines += _time_lines(seconds, images, processes)
    lines += optimal
    if images is not None and (line := _resolves_line(images, probe)):
        lines.append(line)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _masks_lines(probe: HeadProbe) -> list[str]:
    names = [f"{variant.name} ({counted(variant.mask.mask.count, 'head')})" for variant in probe.variants]
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    heads = sum(probe.layout.heads_per_layer)
    return [
        f"model: {probe.title}, {counted(len(probe.layout.layers), 'layer')}, {counted(heads, 'head')}, "
        f"{counted(probe.num_classes, 'class')}",
        f"masks: {len(names):,} beside the baseline" + (f": {shown}" if names else ""),
    ]


def _plan_line(probe: HeadProbe) -> str:
    plan = _plan(probe)
    rows = 1 + max(map(len, plan.waves))
    passes = "one such pass holds" if len(plan.waves) == 1 else f"{len(plan.waves):,} such passes hold"
    return (
        f"plan: {counted(plan.images, 'image')} a forward pass, growing to {counted(rows, 'row')} each; {passes} all "
        f"masks; an image costs about {probe.work:.2f} plain forward passes instead of {1 + len(probe.variants)}"
    )


def _calibration_line(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> str:
    """Return what fitting costs: images, time and the memory of the sums, measured on noise."""
    size = probe.data_config["input_size"]
    noise = torch.randint(0, 256, (data.batch_size, *size), dtype=torch.uint8, device=probe.device)
    times = []
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for fitting in (True, False):  # the passes alone come second: what the sums add to them
            probe.begin_calibration(fitting)
            times.append(_best_of_three(probe, noise))
    memory = probe.end_calibration()
    images = data.calibration_expected
    fitted = [*probe.fitted_kinds, *["scores of heads"] * probe.score_heads]
    shown = "an unknown number of images" if images is None else counted(images, "image")
    seconds = "" if images is None else f", about {duration(images * times[0] / len(noise) / trainer.world_size)}"
    return (
        f"calibration: {shown} fit {', '.join(fitted)}{seconds}, {times[0] / times[1]:.2f} plain forward "
        f"passes an image; sums of {memory / 2**20:.1f} MiB"
    )


def _best_of_three(probe: HeadProbe, noise: torch.Tensor) -> float:
    """Return the least time of a batch of three, in seconds: other programs only add to it."""
    times = []
    for number in range(3):
        began = time.perf_counter()
        labels, rows = torch.zeros(len(noise), dtype=torch.int64), torch.arange(len(noise)) + number * len(noise)
        probe.test_step(Noise(noise, labels.to(noise.device), rows), 0)
        if noise.is_cuda:
            torch.cuda.synchronize(noise.device)
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Noise:
    """A batch of images that do not count."""

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    unit: int = 0
    last: bool = False
    bad: tuple[()] = ()
    failure: str | None = None
    name: str = "noise"


def _seconds_per_image(trainer: lightning.Trainer, probe: HeadProbe, batch_size: int) -> float:
    """Time whole batches of noise under all masks, as the run will compute them, and return the median, per image."""
    size = probe.data_config["input_size"]
    noise = torch.randint(0, 256, (batch_size, *size), dtype=torch.uint8, device=probe.device)
    with trainer.precision_plugin.forward_context():
        _timed(probe, noise[: _plan(probe).images])  # the first pass allocates, and may halve the rows
        images = min(batch_size, _plan(probe).images)
        times: list[float] = []
        while len(times) < TIMED_PASSES or sum(times) < min(TIMED_SECONDS, 20 * times[0]):
            times.append(_timed(probe, noise[:images]))
    return sorted(times)[len(times) // 2] / images


def _timed(probe: HeadProbe, images: torch.Tensor) -> float:
    began = time.perf_counter()
    probe.masked_logits(images).cpu()  # a GPU has finished only when its result is here
    return time.perf_counter() - began


def _optimal_line(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> list[str]:
    """Return what the search for optimal constants costs, measured on noise; nothing where nothing is sought."""
    heads = heads_to_optimise(probe.variants)
    if not heads or not data.fits:
        return []
    images = data.calibration_expected
    seconds = _seconds_per_trial(trainer, probe, data.batch_size, Search(heads, stand_in(probe.layout)))
    rounds = f"at most {MOST_ROUNDS} rounds of a forward and backward pass over the calibration images, with a variant "
    rounds += f"for each of {counted(len(heads), 'head')} until it has converged"
    each = f"{seconds * 1000:.3g} ms an image and round"
    if images is None:
        return [f"optimal: {rounds}; {each}"]
    most = MOST_ROUNDS * images * seconds / trainer.world_size
    return [f"optimal: {rounds}; at most about {duration(most)} for {counted(images, 'image')} ({each})"]


def _seconds_per_trial(trainer: lightning.Trainer, probe: HeadProbe, batch_size: int, search: Search) -> float:
    """Time passes of noise with gradients, and return the median, per image.

    Raises:
        UsageError: The model's forward pass cuts gradients off.
    """
    probe.search = search
    plan = probe.plan_passes(batch_size)
    size = probe.data_config["input_size"]
    noise = torch.randint(0, 256, (plan.images, *size), dtype=torch.uint8, device=probe.device)
    times: list[float] = []
    with trainer.precision_plugin.forward_context():
        while len(times) < 1 + TIMED_PASSES:  # the first allocates, and may halve the rows
            began = time.perf_counter()
            probe.trial_losses(noise, torch.zeros(len(noise), dtype=torch.int64, device=probe.device))
            times.append(time.perf_counter() - began)
    probe.search = None
    return sorted(times[1:])[TIMED_PASSES // 2] / len(noise)


def _plan(probe: HeadProbe) -> RowPlan:
    """Return the current row plan, which an out-of-memory during the trial replaces."""
    if probe.plan is None:
        raise RunError("the forward passes are not planned")
    return probe.plan


def _time_lines(seconds: float, images: int | None, processes: int) -> list[str]:
    each = f"{seconds * 1000:.3g} ms an image on this machine"
    if images is None:
        return [f"time: {each}, model only; the data set does not say how many images it has"]
    on = "one process" if processes == 1 else f"{processes} processes"
    return [
        f"time: about {duration(images * seconds / processes)} for {counted(images, 'image')} on {on} ({each}, model "
        "only; reading and decoding go on beside it)",
    ]


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
