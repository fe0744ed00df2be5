"""What describing heads costs beside a plain forward pass: ``python -m benchmarks.describe --batch 64 --threads 2``.

All cases take turns in one run, so that what else the machine does meets all of them alike.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.report import Times, compare, markdown, publish, refuse_below_one, take_turns
from headprobe.backbone.capture.layer_facts import LayerFacts, layer_facts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Observer, Tap, tapping
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.cli import keep_freed_memory
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic, Observation, Subject
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums

UNITS = 100  # of the data set; a batch belongs to one, which is never finished here
SHARED = Path(__file__).resolve().parents[2] / "shared" / "deit_tiny" / "model.safetensors"
PLAIN, EVERYTHING = "plain forward", "all together"
STATISTICS = ("HeadAttention", "HeadSpectrum", "HeadSimilarity")
"""The cases of which `all together` is made."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    keep_freed_memory()  # as the command does
    torch.set_num_threads(options.threads)
    model, weights = load(options.model, options.weights)
    size = tuple(int(length) for length in model.pretrained_cfg["input_size"])
    images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0))
    batches = list(torch.split(images, options.batch))
    layout = find_heads(model, (size[0], size[1], size[2]), options.model)
    cases = {PLAIN: forward(model, layout, batches, None)}
    for name, observer in observers(layout, layer_facts(model, layout)).items():
        cases[name] = forward(model, layout, batches, observer)
    times = take_turns(cases, options.repeats)
    rows = [row | {"share": shares(times).get(row["case"])} for row in compare(times, PLAIN)]
    setting = {
        "model": options.model,
        "weights": weights,
        "images": options.images,
        "batch": options.batch,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    publish(table(setting, rows), setting, rows, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.describe", description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="name of a timm model")
    parser.add_argument("--weights", type=Path, help="its weights (safetensors); by default DeiT-Ti's in ../shared")
    parser.add_argument("--images", type=int, help="images of noise per pass; by default one batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9, help="rounds, each of them one pass of every case")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "batch", "threads", "repeats")
    options.images = options.batch if options.images is None else options.images
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    return options


def load(name: str, weights: Path | None) -> tuple[Any, str]:
    """Return the model and which weights it has; how sharply heads attend does not change what it costs."""
    if weights is None and name.startswith("deit_tiny_patch16_224") and SHARED.exists():
        weights = SHARED
    if weights is None:
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False).eval(), "random"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)})
    return model.eval(), f"{weights.parent.name}/{weights.name}"


def observers(layout: HeadLayout, facts: tuple[LayerFacts, ...]) -> dict[str, Observer]:
    """Return what is measured, by name: what each callback collects, alone and all together."""

    def collecting(*statistics: HeadStatistic) -> Observer:
        for statistic in statistics:
            statistic.begin(Subject(layout, facts, units=UNITS))
        sums = {statistic.name: statistic.open(0) for statistic in statistics}
        seen = 0  # images before this pass: each is another one of a long unit, of which few are examples

        def observe(record: LayerRecord) -> None:
            nonlocal seen
            observation = Observation(0, torch.arange(seen, seen + record.images), (record,))
            seen += record.images * (record.layer == len(layout.layers) - 1)
            for statistic in statistics:
                statistic.observe(observation, sums[statistic.name])

        return observe

    return {
        "taps alone": ignore,
        "weights recomputed": recompute,
        "HeadAttention, no offset maps": collecting(AttentionSums(offset_maps=False)),
        STATISTICS[0]: collecting(AttentionSums()),
        STATISTICS[1]: collecting(SpectrumSums()),
        STATISTICS[2]: collecting(SimilaritySums()),
        "HeadSimilarity, precision float32": collecting(SimilaritySums(precision="float32")),
        EVERYTHING: collecting(AttentionSums(), SpectrumSums(), SimilaritySums()),
    }


def ignore(_: LayerRecord) -> None:
    """Take a record and do nothing."""


def recompute(record: LayerRecord) -> None:
    """Recompute attention weights and do nothing with them."""
    for _ in record.exponentials(prefix=0):
        pass


def forward(
    model: nn.Module, layout: HeadLayout, batches: Sequence[Tensor], observer: Observer | None
) -> Callable[[], None]:
    """Return a forward pass of all batches, with or without an observer."""
    taps = [] if observer is None else [Tap(observer)]

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                with tapping(model, layout, taps):
                    model(batch)

    return run


def shares(times: Times) -> dict[str, float]:
    """Return which part of what describing costs each statistic has, by the medians of CPU seconds."""
    seconds = {name: median(cpu for _, cpu in times[name]) for name in (PLAIN, *STATISTICS)}
    more = {name: seconds[name] - seconds[PLAIN] for name in STATISTICS}
    return {name: own / sum(more.values()) for name, own in more.items()}


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    names = ("clock_ratio_of_minima", "clock_median_ratio", "cpu_ratio_of_minima", "cpu_median_ratio")
    lines = [
        (
            row["case"],
            f"{row['seconds']:.3f}",
            *(f"{row[name]:.2f}" for name in names),
            "" if row["share"] is None else f"{row['share']:.0%}",
        )
        for row in rows
    ]
    columns = ("case", "seconds", "clock: minima", "median", "CPU: minima", "median", "share")
    return markdown(setting, columns, lines)


if __name__ == "__main__":
    main()
