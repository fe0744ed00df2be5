"""What a model costs: parameters, multiply-adds, and its latency beside another model's, in interleaved pairs."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headprobe.backbone.sandbox import evaluating, example_images
from headprobe.text import counted

BATCHES = (1, 64)
"""Images a batch whose latency is measured."""

WARM_UP = 2

SHORTEST = 0.01
"""Seconds that a timing takes at least, in as many forward passes as that needs: shorter ones are mostly noise."""

FEWEST_PAIRS = 5
SECONDS_A_BATCH = 60.0
"""Pairs of timings end after so many seconds for each batch size, but for the fewest."""


@dataclass(frozen=True)
class Latency:
    """Forward passes of two models, taken in turns.

    Attributes:
        batch: Images a pass.
        before: Seconds of a pass of the first model, one timing after the other.
        after: Seconds of a pass of the second, each timed right after or before its partner.
        passes: Passes that each timing is the mean of.
    """

    batch: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    passes: int = 1

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times faster the second model was, pair by pair."""
        return tuple(first / second for first, second in zip(self.before, self.after, strict=True))

    @property
    def speed(self) -> float:
        """The median of these ratios."""
        return median(self.ratios)


@dataclass(frozen=True)
class Cost:
    """What a model costs beside another.

    Attributes:
        parameters: Of the first model and the second.
        multiply_adds: Of one image through each.
        latencies: By batch size.
        device: Where it was measured, and on how many threads.
    """

    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    latencies: tuple[Latency, ...]
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        found = asdict(self)
        found["latencies"] = [asdict(one) for one in self.latencies]
        return found


def measured(
    before: nn.Module, after: nn.Module, input_size: tuple[int, int, int], pairs: int, batches: Sequence[int] = BATCHES
) -> Cost:
    """Measure two models on noise, on the device that they are on.

    Args:
        before: The whole model.
        after: The pruned one.
        input_size: `(channels, height, width)` of an image.
        pairs: Pairs of timings for each batch size.
        batches: Images a batch.
    """
    models = (before, after)
    return Cost(
        (parameters_of(before), parameters_of(after)),
        (multiply_adds(before, input_size), multiply_adds(after, input_size)),
        tuple(latency(models, input_size, batch, pairs) for batch in batches),
        _device_text(next(before.parameters()).device),
    )


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Return the multiply-adds of one image: in matrix products, convolutions and attention, as PyTorch counts them."""
    # fused attention on CPUs is not counted, and taken apart it is two matrix products; the counter's own hooks fail on
    # views of parameters where gradients are off
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH)):
            stack.enter_context(context)
        stack.enter_context(evaluating(model))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(example_images(model, input_size, 1))
    return int(counter.get_total_flops()) // 2  # a multiply-add is two operations


def latency(models: tuple[nn.Module, nn.Module], input_size: tuple[int, int, int], batch: int, pairs: int) -> Latency:
    """Time forward passes of two models in pairs; each model comes first in every second one.

    What slows the machine down for a while slows both of a pair, so their ratio is steadier than their times. Passes
    that are over in a moment are timed several at once, as many of each model.
    """
    images = example_images(models[0], input_size, batch)
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(models[0]), evaluating(models[1]), torch.inference_mode():
        passes = passes_of([_seconds(model, images) for model in models * WARM_UP])
        began = time.perf_counter()
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                times[which].append(_seconds(models[which], images, passes))
            if pair + 1 >= FEWEST_PAIRS and time.perf_counter() - began > SECONDS_A_BATCH:
                break
    return Latency(batch, tuple(times[0]), tuple(times[1]), passes)


def passes_of(seconds: Sequence[float]) -> int:
    """Return how many passes a timing holds, so that even the quickest of these takes `SHORTEST` seconds."""
    return max(1, ceil(SHORTEST / min(seconds)))


def _seconds(model: Callable[[Tensor], Any], images: Tensor, passes: int = 1) -> float:
    """Return the seconds of a forward pass, the mean of some; each is waited for until its device has done it."""
    _wait(images.device)
    began = time.perf_counter()
    for _ in range(passes):
        model(images)
        _wait(images.device)
    return (time.perf_counter() - began) / passes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"


# -- in words ----------------------------------------------------------------------------------------------------------


def cost_lines(cost: Cost) -> list[str]:
    """Return a cost as lines of a table: before, after, and how many times less."""
    lines = [
        _line("", ("before", "after"), ""),
        _line("parameters", [f"{number:,}" for number in cost.parameters], _share(*cost.parameters)),
        _line("multiply-adds", [_large(number) for number in cost.multiply_adds], _share(*cost.multiply_adds)),
    ]
    for one in cost.latencies:
        times = [_milliseconds(seconds) for seconds in (one.before, one.after)]
        faster = f"{one.speed:.2f}x [{min(one.ratios):.2f}, {max(one.ratios):.2f}]"
        lines.append(_line(f"ms a batch of {one.batch}", times, faster))
    pairs = ", ".join(str(len(one.ratios)) for one in cost.latencies)
    passes = ", ".join(str(one.passes) for one in cost.latencies)
    lines.append(
        f"latency: median [smallest, largest] of {pairs} interleaved pairs of timings, each a mean of {passes} passes; "
        f"speed by pair; {cost.device}"
    )
    return lines


def _line(name: str, values: Sequence[str], change: str) -> str:
    before, after = values
    return f"{name:<17} {before:>29} {after:>29}  {change}".rstrip()


def _share(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.1f}%"


def _large(number: int) -> str:
    unit, size = ("G", 1e9) if number >= 1e9 else ("M", 1e6)
    return f"{number / size:.2f} {unit}"


def _milliseconds(seconds: Sequence[float]) -> str:
    middle, low, high = (1000 * value for value in (median(seconds), min(seconds), max(seconds)))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
