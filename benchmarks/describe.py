"""What describing heads costs beside a plain forward pass: ``python -m benchmarks.describe --batch 64 --threads 2``.

All cases take turns in one run, so that what else the machine does meets all of them alike.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.report import markdown, publish, ratios, refuse_below_one
from headprobe.backbone.capture.layer_facts import LayerFacts, layer_facts
from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Observer, Tap, tapping
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic, Observation, Subject
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums

UNITS = 100  # of the data set; a batch belongs to one, which is never finished here
SHARED = Path(__file__).resolve().parents[2] / "shared" / "deit_tiny" / "model.safetensors"
PLAIN, EVERYTHING = "plain forward", "all together"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model, weights = load(options.model, options.weights)
    size = tuple(int(length) for length in model.pretrained_cfg["input_size"])
    images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0))
    batches = list(torch.split(images, options.batch))
    layout = find_heads(model, (size[0], size[1], size[2]), options.model)
    cases = {PLAIN: forward(model, layout, batches, None)}
    for name, observer in observers(layout, layer_facts(model, layout)).items():
        cases[name] = forward(model, layout, batches, observer)
    rows = compare(take_turns(cases, options.repeats))
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

        def observe(record: LayerRecord) -> None:
            observation = Observation(0, torch.arange(record.images), (record,))
            for statistic in statistics:
                statistic.observe(observation, sums[statistic.name])

        return observe

    return {
        "taps alone": ignore,
        "HeadAttention, no offset maps": collecting(AttentionSums(offset_maps=False)),
        "HeadAttention": collecting(AttentionSums()),
        "HeadSpectrum": collecting(SpectrumSums()),
        "HeadSimilarity": collecting(SimilaritySums()),
        "HeadSimilarity, precision float32": collecting(SimilaritySums(precision="float32")),
        EVERYTHING: collecting(AttentionSums(), SpectrumSums(), SimilaritySums()),
    }


def ignore(_: LayerRecord) -> None:
    """Take a record and do nothing."""


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


def take_turns(cases: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return seconds of each case and round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(-1, repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return for each case its cost relative to the plain forward pass: of the minima, and median over rounds."""
    plain = seconds[PLAIN]
    return [
        {
            "case": name,
            "seconds": min(times),
            **ratios(times, plain),
        }
        for name, times in seconds.items()
    ]


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    lines = [
        (row["case"], f"{row['seconds']:.3f}", f"{row['ratio_of_minima']:.2f}", f"{row['median_ratio']:.2f}")
        for row in rows
    ]
    return markdown(setting, ("case", "seconds", "ratio of minima", "median ratio"), lines)


if __name__ == "__main__":
    main()
