"""What fitting ablations would cost, for `test --dry-run`: images, passes, memory and time, measured on noise."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor

from headprobe.calibration.fills import stand_in
from headprobe.calibration.optimal import MOST_ROUNDS, Search, heads_to_optimise
from headprobe.data.stream import ImageBatch
from headprobe.masks.ablations import OPTIMAL
from headprobe.module import HeadProbe
from headprobe.probe.rounds import RescoringRound, SearchRound
from headprobe.probe.stages import Stage
from headprobe.text import counted, duration

SCORES = "scores of heads"

ROUNDS = 3
"""Passes of each kind that are timed, in turns, after one that allocates."""

COPIES_AT_THE_END = 5
"""Sums that stand in memory as often when the constants are made, written and named by a digest. Measured."""


@dataclass(frozen=True)
class Fitting:
    """What fits before anything is judged.

    Attributes:
        kinds: Kinds of ablation that are fitted, and `SCORES` where heads are scored.
        images: Images that calibrate, None where nobody knows.
        units: Units that they come in, for one process.
        reading: Units that are read at once, by one process.
        plain: Seconds of a plain forward pass, an image.
        seconds: Seconds of the pass that calibrates, an image.
        sums: Bytes of the sums of a unit.
        heads: Heads whose optimal constant is sought.
        round_seconds: Seconds of a round of that search, an image.
        rescoring: Rounds after which heads are scored anew, of each kind: their number, and seconds of one, an image.
        backward: Whether heads are scored by gradients too: without labels there are none.
    """

    kinds: tuple[str, ...]
    images: int | None
    units: int
    reading: int
    plain: float
    seconds: float
    sums: int
    heads: int = 0
    round_seconds: float = 0.0
    rescoring: tuple[tuple[int, float], ...] = ()
    backward: bool = False

    @property
    def finished(self) -> int:
        """Sums of finished units that are kept at most: neighbours are merged, two by two."""
        return self.units.bit_length()

    @property
    def memory(self) -> int:
        """Bytes of all sums at the peak, of one process."""
        return self.sums * (self.reading + self.finished + COPIES_AT_THE_END)

    @property
    def most_seconds(self) -> float:
        """Seconds an image of all that is done with it before anything is judged, on one process, at most."""
        return self.seconds + self.rescoring_seconds + MOST_ROUNDS * self.round_seconds

    @property
    def rescoring_seconds(self) -> float:
        """Seconds of all rounds after which heads are scored anew, an image."""
        return sum(rounds * seconds for rounds, seconds in self.rescoring)

    def lines(self) -> list[str]:
        """Return all but the time in words."""
        images = "an unknown number of images" if self.images is None else counted(self.images, "image")
        own = size_in_words(self.sums)
        kinds = ", ".join(kind for kind in self.kinds if kind != OPTIMAL) or "the means that optimal begins with"
        found = [
            f"fitting: {kinds} on {images}, in one forward {'and backward ' * self.backward}pass of the "
            f"unmasked model each, which costs as much as {self.seconds / self.plain:.2f} plain forward passes",
            f"sums: {own} for each unit of the data; of units that are read ({self.reading} at once) and merged ones "
            f"(up to {self.finished}) about {size_in_words(self.memory)} in memory at the peak, a process, and up to "
            f"{size_in_words(self.finished * self.sums)} on disk; calibration.safetensors takes {own}",
        ]
        if self.rescoring:
            rounds = sum(rounds for rounds, _ in self.rescoring)
            found.append(
                f"rescored: {counted(rounds, 'round')} over the calibration images, one after each tenth of the heads "
                f"of each order, of the model without these; together they cost as much as "
                f"{self.rescoring_seconds / self.plain:.1f} plain forward passes an image "
                f"({self.rescoring_seconds * 1000:.3g} ms)"
            )
        if self.heads:
            found.append(
                f"optimal: at most {MOST_ROUNDS} rounds of a forward and backward pass over the calibration images, "
                f"with a variant for each of {counted(self.heads, 'head')} until it has converged; a round costs as "
                f"much as {self.round_seconds / self.plain:.1f} plain forward passes an image "
                f"({self.round_seconds * 1000:.3g} ms)"
            )
        return found

    def time_lines(self, processes: int) -> list[str]:
        """Return the time in words, stage by stage; nothing where nobody knows the number of images."""
        if self.images is None:
            return [f"time to fit: {self.seconds * 1000:.3g} ms an image, model only"]
        images = self.images / processes
        text = f"about {duration(images * self.seconds)} for {counted(self.images, 'image')}"
        if self.rescoring:
            text += f", then about {duration(images * self.rescoring_seconds)} to score heads anew"
        if self.heads:
            text += f", then at most {duration(images * MOST_ROUNDS * self.round_seconds)} to seek optimal constants"
        return [f"time to fit: {text}"]


def plan_fitting(trainer: lightning.Trainer, probe: HeadProbe, data: Any) -> Fitting | None:
    """Measure what fitting costs; None where nothing is fitted. The passes must be planned anew afterwards.

    The probe has constants that were fitted on nothing from then on.

    Raises:
        UsageError: The model's forward pass cuts gradients off, which optimal constants need.
    """
    kinds = (*probe.fitted_kinds, *[SCORES] * probe.score_heads)
    if probe.given_calibration is not None or not kinds:
        return None
    images, units, reading = data.calibrates_on(trainer.world_size)
    probe.calibration = stand_in(probe.layout)
    heads = heads_to_optimise(probe.variants)
    of_round = _seconds_of_round(trainer, probe, data.batch_size, heads) if heads else 0.0
    rescoring = _rescoring(trainer, probe, data.batch_size)
    plain, seconds, sums = seconds_and_sums(trainer, probe, data.batch_size)
    backward = probe.score_heads and probe.labelled
    return Fitting(kinds, images, units, reading, plain, seconds, sums, len(heads), of_round, rescoring, backward)


def _rescoring(trainer: lightning.Trainer, probe: HeadProbe, batch_size: int) -> tuple[tuple[int, float], ...]:
    """Return the rounds after which heads are scored anew, with and without gradients: how many, and their seconds."""
    if not probe.rescored_orders or probe.calibration is None:
        return ()
    from headprobe.calibration.rescoring import distinct, rounds_of, stand_in_round

    every = sum(probe.layout.heads_per_layer)
    rounds: dict[bool, int] = {}
    found = []
    orders = distinct(probe.rescored_orders, every)
    for clause, wanted in orders:
        trial = stand_in_round(clause, probe.layout, probe.calibration, probe.gone_by)
        gradients = trial.now is not None and trial.now.needs_gradients
        if trial.now is not None and gradients not in rounds:
            found.append((gradients, seconds_and_sums(trainer, probe, batch_size, RescoringRound(probe, trial))[1]))
        rounds[gradients] = rounds.get(gradients, 0) + rounds_of(every, wanted)
    return tuple((rounds[gradients], seconds) for gradients, seconds in found if rounds[gradients])


def seconds_and_sums(
    trainer: lightning.Trainer, probe: HeadProbe, batch_size: int, stage: Stage | None = None
) -> tuple[float, float, int]:
    """Return the seconds of a plain pass and of one of a stage, an image, and the bytes of a unit's sums.

    Args:
        trainer: Where the run would be.
        probe: The model with its masks.
        batch_size: Images of a batch.
        stage: What fits; by default the constants and scores that the masks need.
    """
    plan = probe.begin_calibration(batch_size, stage)
    noise = _noise(probe, min(batch_size, plan.images))
    labels = torch.zeros(len(noise), dtype=torch.int64, device=probe.device)
    done = 0

    def plain() -> Tensor:
        logits: Tensor = probe.backbone(probe.normalised(noise))
        return logits

    def fitting() -> Tensor:
        nonlocal done
        rows = torch.arange(done, done + len(noise))
        done += len(noise)
        return probe.validation_step(ImageBatch(noise, labels, 0, rows, last=False, name="noise"), 0).logits

    with trainer.precision_plugin.forward_context():
        times = _in_turns((plain, fitting))
    return times[0] / len(noise), times[1] / len(noise), probe.end_calibration()


def _seconds_of_round(
    trainer: lightning.Trainer, probe: HeadProbe, batch_size: int, heads: list[tuple[int, int]]
) -> float:
    """Return the seconds of a pass with gradients of a variant for each head, an image."""
    if probe.calibration is None:
        return 0.0
    stage = SearchRound(probe, Search(heads, probe.calibration))
    noise = _noise(probe, probe.begin_calibration(batch_size, stage).images)
    labels = torch.zeros(len(noise), dtype=torch.int64, device=probe.device)
    with trainer.precision_plugin.forward_context():
        (seconds,) = _in_turns((lambda: stage.trial_losses(noise, labels)[0],))  # the first may halve the rows
    probe.end_calibration()
    return seconds / len(noise)


def _noise(probe: HeadProbe, images: int) -> Tensor:
    size = probe.data_config["input_size"]
    return torch.randint(0, 256, (images, *size), dtype=torch.uint8, device=probe.device)


def _in_turns(passes: tuple[Callable[[], Tensor], ...]) -> list[float]:
    """Return the least seconds of each pass: other programs only add to it, and turns let them meet all passes."""
    times: list[list[float]] = [[] for _ in passes]
    for number in range(1 + ROUNDS):
        for own, run in zip(times, passes, strict=True):
            began = time.perf_counter()
            found = run()
            if found.is_cuda:
                torch.cuda.synchronize(found.device)
            if number:
                own.append(time.perf_counter() - began)
    return [min(own) for own in times]


def size_in_words(size: int) -> str:
    """Return a number of bytes in words."""
    for unit, least in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"
