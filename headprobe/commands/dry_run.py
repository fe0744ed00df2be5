"""`test --dry-run`: the masks of a spec, their cost on this machine, and the smallest drop that they can resolve."""

import sys
import time
from typing import Any

import lightning
import torch

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_tests import smallest_resolvable_drop
from headprobe.module import HeadProbe
from headprobe.report.table import console
from headprobe.text import counted, duration

TIMED_SECONDS = 3.0
TIMED_PASSES = 3
"""The trial lasts so many seconds, or so many passes if these take longer."""


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
    with torch.inference_mode():
        probe.plan_passes(data.batch_size)
        seconds = _seconds_per_image(trainer, probe, data.batch_size)
    decisions = [f"{decision.about}: {decision.text}" for decision in [*probe.decisions(), *data.decisions()]]
    lines = [*decisions, *_masks_lines(probe), _plan_line(probe)]
    if memory := _memory_text(device):
        lines.append(f"memory: {memory} at the peak of a trial forward pass, a process")
    lines += _time_lines(seconds, images, processes)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _masks_lines(probe: HeadProbe) -> list[str]:
    names = [f"{variant.name} ({counted(variant.mask.mask.count, 'head')})" for variant in probe.variants]
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    heads = sum(probe.layout.heads_per_layer)
    return [
        f"model: {probe.title}, {len(probe.layout.layers)} layers, {heads} heads, {probe.num_classes} classes",
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
    drop = smallest_resolvable_drop(images)
    return [
        f"time: about {duration(images * seconds / processes)} for {images:,} images on {on} ({each}, model only; "
        "reading and decoding go on beside it)",
        f"resolves: a top-1 drop of {drop:.2f} points or more on {images:,} images "
        "(80% power, 5% level, if 2% of the images flip either way by chance)",
    ]


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
