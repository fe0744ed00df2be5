"""`test --dry-run`: what a spec expands to, what it will cost on this machine, and what it can resolve."""

import resource
import sys
import time
from typing import Any

import lightning
import torch

from headprobe.backbone.growing import GrowingPass
from headprobe.backbone.joins import find_joins
from headprobe.backbone.rows import ROW_BUDGET_CPU, ROW_BUDGET_GPU
from headprobe.backbone.weights import data_config
from headprobe.metrics.paired import smallest_resolvable_drop
from headprobe.module import HeadProbe
from headprobe.report.table import console

TIMED_PASSES = 3


def print_plan(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> None:
    """Print the plan of a run: masks, forward passes, time and memory measured on noise, smallest resolvable drop."""
    data.prepare_data()
    data.bind(probe.data_config, probe.num_classes)
    device = trainer.strategy.root_device
    probe.to(device)
    joins = find_joins(probe.backbone, probe.layout)
    growing = GrowingPass(probe.backbone, probe.layout, joins, probe.head_mask)
    default = ROW_BUDGET_CPU if device.type == "cpu" else ROW_BUDGET_GPU
    plan = growing.plan(data.batch_size, probe.row_budget or default)
    with growing, torch.inference_mode():
        seconds = _seconds_per_image(growing, probe, plan.images)
    images = data.expected_images
    console.print(_masks_text(probe), soft_wrap=True)
    console.print(
        f"plan: {plan.images} images x {1 + max(map(len, plan.chunks))} rows a forward pass, {len(plan.chunks)} "
        f"chunk(s) of masks; work of {_work(growing, probe):.2f} plain forward passes an image "
        f"instead of {1 + len(probe.masks)}"
    )
    console.print(f"memory: {_memory_text(device)} at the peak of a trial forward pass")
    if images is None:
        console.print(f"time: {seconds * 1000:.1f} ms an image; the data set does not say how many it has")
        return
    total = images * seconds / trainer.world_size
    console.print(
        f"time: about {_duration(total)} for {images:,} images on {trainer.world_size} process(es), model only "
        f"({seconds * 1000:.1f} ms an image on this machine)"
    )
    drop = smallest_resolvable_drop(images)
    console.print(
        f"resolves: a top-1 drop of {drop:.2f} points or more on {images:,} images "
        "(80% power, 5% level, if 2% of the images flip either way by chance)"
    )


def _masks_text(probe: HeadProbe) -> str:
    """Return the masks in a few lines."""
    names = [f"{named.name} ({named.mask.count} heads)" for named in probe.masks]
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    heads = sum(probe.layout.heads_per_layer)
    about = f"{probe.source.name}: {len(probe.layout.layers)} layers, {heads} heads"
    return f"{about}\nmasks: {len(names)} beside the baseline" + (f": {shown}" if names else "")


def _seconds_per_image(growing: GrowingPass, probe: HeadProbe, images: int) -> float:
    """Time whole forward passes on noise and return the best, per image."""
    channels, height, width = data_config(probe.backbone)["input_size"]
    noise = torch.randint(0, 256, (images, channels, height, width), dtype=torch.uint8, device=probe.device)
    plan = growing.plan(images, images * (1 + max(1, len(probe.masks))))
    plan = growing.plan(images, min(plan.budget, probe.row_budget or plan.budget))
    times = []
    for _ in range(1 + TIMED_PASSES):
        began = time.perf_counter()
        growing.logits(probe.normalised(noise), plan)
        if probe.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / images


def _work(growing: GrowingPass, probe: HeadProbe) -> float:
    """Return the work of one image in plain forward passes: a mask costs the layers from its first masked one on."""
    layers = len(probe.layout.layers)
    return 1 + sum((layers - first) / layers for first in growing.first_layers if first is not None)


def _memory_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB of memory"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
