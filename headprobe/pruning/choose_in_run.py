"""The set that a run removes: chosen by what its test shows, or before it by speed; and the curve that led there."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headprobe.calibration.constants import Calibration
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import FITTED
from headprobe.masks.spec import Variant
from headprobe.module import HeadProbe
from headprobe.pruning import choose
from headprobe.pruning.cost import Latency, latency
from headprobe.pruning.make import Pruning
from headprobe.trainer import ProbeTrainer

SPEED_BATCH = 64
"""Images a batch of the latencies that `--speed` compares."""


def by_accuracy(probe: HeadProbe, most_pp: float) -> tuple[Variant, str]:
    """Return the largest set that is shown to lose at most so much, and the curve that led to it as a CSV file.

    Args:
        probe: The model, whose sets were judged.
        most_pp: The largest drop of top-1 allowed, percentage points.

    Raises:
        RunError: None is shown to.
    """
    choose.refuse_unordered(probe.variants)
    if probe.scores is None:
        raise RunError("the test ended before its results were added up")
    tested, chosen = choose.fixed_sequence(choose.counts_of(probe.variants, probe.scores), most_pp)
    if chosen is None:
        raise RunError(choose.why_none(tested[0], most_pp))
    return probe.variants[chosen], choose.curve_text(tested, chosen)


def by_speed(trainer: ProbeTrainer, probe: HeadProbe, data: Any, wanted: float, pairs: int) -> str:
    """Give the model the smallest set that is fast enough; return the curve that led to it as a CSV file.

    Args:
        trainer: Runs the calibration, where something must be fitted.
        probe: The model with all sets.
        data: The data module.
        wanted: How many times faster the model should be.
        pairs: Pairs of timings of each set that is tried.

    Raises:
        UsageError: There are several processes.
        RunError: No set is fast enough.
    """
    if trainer.world_size > 1:
        raise UsageError(
            "--speed measures in one process, and several would choose different sets: leave --trainer.devices "
            f"out, got {trainer.world_size} processes"
        )
    if probe.fits:
        trainer.calibrate(probe, data)
    choose.refuse_unordered(probe.variants)
    variants: Sequence[Variant] = list(probe.variants)
    probe.to(trainer.strategy.root_device)
    timed: dict[int, Latency] = {}

    def speed_of(place: int) -> float:
        smaller = Pruning(probe, variants[place]).smaller()
        timed[place] = latency((probe.backbone, smaller), probe.layout.input_size, SPEED_BATCH, pairs)
        return timed[place].speed

    chosen, measured = choose.smallest_fast(len(variants), wanted, speed_of)
    if chosen is None:
        most = variants[-1].mask.mask.count
        raise RunError(
            f"not even without {most} heads is the model {wanted:g} times as fast at batch {SPEED_BATCH}: nothing "
            f"was written; ask for less with --speed, got {measured[len(variants) - 1]:.2f} times"
        )
    _take(probe, data, variants[chosen])
    by_heads = {variants[at].mask.mask.count: one for at, one in sorted(timed.items())}
    return _speeds_text(by_heads, variants[chosen].mask.mask.count)


def _take(probe: HeadProbe, data: Any, variant: Variant) -> None:
    """Go on with one set alone, and with what was fitted for it already."""
    found, kind = probe.calibration, variant.ablation
    heads = sorted(variant.mask.mask.masked)
    probe.choose_masks("+".join(f"head:{layer}.{head}" for layer, head in heads), kind)
    if kind in FITTED and found is not None:
        go_on_with(probe, data, found)


def go_on_with(probe: HeadProbe, data: Any, found: Calibration) -> None:
    """Judge with what was fitted already, the classifier among it.

    Args:
        probe: The model.
        data: The data module, which goes on to leave out the rows that fitted it.
        found: What was fitted.
    """
    data.calibration_images = None  # their rows are left out as those of a given calibration
    classifying = probe.classifying
    probe.use_calibration(replace(found, classifier={} if classifying is None else classifying.saved()))


def _speeds_text(timed: Mapping[int, Latency], chosen: int) -> str:
    """Return the latencies of sets, by their number of heads, as the text of a CSV file."""
    name = f"speed_batch_{SPEED_BATCH}"
    lines = [f"heads,{name},{name}_least,{name}_most,passes,chosen"]
    for heads, one in timed.items():
        ends = f"{min(one.ratios)!r},{max(one.ratios)!r}"
        lines.append(f"{heads},{one.speed!r},{ends},{one.passes},{int(heads == chosen)}")
    return "\n".join(lines) + "\n"


def by_column(curve: str) -> dict[str, list[float]]:
    """Return a curve's numbers by column; none of an empty text, where the mask was given."""
    rows = list(csv.DictReader(curve.splitlines()))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}
