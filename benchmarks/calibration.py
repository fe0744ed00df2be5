"""What fitting ablations costs beside a plain forward pass: ``python -m benchmarks.calibration --threads 1``.

All cases take turns in one run, so that what else the machine does meets all of them alike. Ours is the whole step of
the stage that calibrates: uint8 images are normalised, run, scored, and the slots of all layers are added up.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.describe import SHARED
from benchmarks.report import compare, markdown, publish, refuse_below_one, take_turns
from headprobe.data.stream import ImageBatch
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import LINEAR, MEAN, POSITION
from headprobe.module import HeadProbe

PLAIN, WITHOUT = "plain forward", "the step without sums"
SCORES = "scores of heads"
CPU = torch.device("cpu")
FITTED = ((MEAN,), (MEAN, LINEAR), (POSITION,), (MEAN, LINEAR, POSITION))
"""Kinds of ablation that are fitted together."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    weights = str(SHARED) if options.weights is None and options.model == "deit_tiny_patch16_224" else options.weights
    if weights is not None and not Path(weights).exists():
        weights = None
    try:
        device = torch.device(options.device)
        passes = cases(options.model, weights, options.batch, device)
        with torch.inference_mode():
            wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
            times = take_turns(passes, options.repeats, wait)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
    rows = compare(times, PLAIN)
    setting = {
        "model": options.model,
        "weights": "random" if weights is None else Path(weights).parent.name,
        "batch": options.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    publish(table(setting, rows), setting, rows, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="name of a timm model")
    parser.add_argument("--weights", help="its weights (safetensors); by default DeiT-Ti's in ../shared, else random")
    parser.add_argument("--batch", type=int, default=32, help="images of noise per pass")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9, help="rounds, each of them one pass of every case")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "batch", "threads", "repeats")
    return options


def cases(model: str, weights: str | None, batch: int, device: torch.device = CPU) -> dict[str, Callable[[], None]]:
    """Return a pass of each case over the same images, by name."""
    probes: dict[str, HeadProbe] = {}
    for kinds in ((MEAN,), *FITTED):
        name = ", ".join(kinds) if probes else WITHOUT
        torch.manual_seed(0)
        probe = HeadProbe(model, weights, pretrained=False).to(device).eval()
        probe.choose_masks("layer:0", list(kinds))
        with torch.inference_mode():  # on a GPU a pass is rehearsed
            probe.begin_calibration(batch)
        if name == WITHOUT:
            probe.statistics = ()
            probe.begin_units(1)
            probe.plan_passes(batch)
        probes[name] = probe
    probes[SCORES] = scoring = HeadProbe(model, weights, pretrained=False).to(device).eval()
    scoring.choose_masks("none", score_heads=True)
    with torch.inference_mode():
        scoring.begin_calibration(batch)
    size = probes[WITHOUT].data_config["input_size"]
    images = torch.randint(0, 256, (batch, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images.to(device)
    backbone, ready = probes[WITHOUT].backbone, probes[WITHOUT].normalised(images)

    def plain() -> None:
        backbone(ready)

    return {PLAIN: plain, **{name: steps(probe, images) for name, probe in probes.items()}}


def steps(probe: HeadProbe, images: Tensor) -> Callable[[], None]:
    """Return a step that calibrates: a batch of one long unit, each time with new row numbers."""
    labels, done = torch.zeros(len(images), dtype=torch.int64, device=images.device), 0

    def step() -> None:
        nonlocal done
        rows = torch.arange(done, done + len(images))
        probe.validation_step(ImageBatch(images, labels, 0, rows, last=False), 0)
        done += len(images)

    return step


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    names = ("seconds", "clock_ratio_of_minima", "clock_median_ratio", "cpu_ratio_of_minima", "cpu_median_ratio")
    lines = [(row["case"], *(f"{row[name]:.3f}" for name in names)) for row in rows]
    return markdown(setting, ("case", "seconds", "clock: minima", "median", "CPU: minima", "median"), lines)


if __name__ == "__main__":
    main()
