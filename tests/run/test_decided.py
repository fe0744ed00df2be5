"""Which masks are decided, read from the units of a run by hand; tests/commands/test_status.py has real runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.run.decided import Decided, decided_in_short, read_decided
from headprobe.units.store import UnitStore
from headprobe.units.unit_sums import UnitSums

UNITS, ROWS, CLASSES = 6, 40, 5
FLIPS = (
    12,
    11,
    1,
    0,
    12,
)  # of the 40 rows of a unit those that each variant gets wrong; the last two hit the same heads
VARIANTS = [
    ["layer:0", "a", "zero", 0],
    ["layer:0", "a", "mean", 0],
    ["layer:1", "b", "zero", 0],
    ["layer:1", "b", "mean", 0],
    ["head:0.0", "a", "zero", 0],
]


def answers(labels: torch.Tensor) -> torch.Tensor:
    """Logits `[1 + variants, rows, classes]`: the baseline is right, and each variant wrong on its first rows."""
    shown = labels.repeat(1 + len(FLIPS), 1)
    for variant, flips in enumerate(FLIPS, start=1):
        shown[variant, :flips] = (shown[variant, :flips] + 1) % CLASSES
    return torch.nn.functional.one_hot(shown, CLASSES).float()


def store(folder: Path, done: int, by_class: bool = False, **session: Any) -> Path:
    """Write the units of a run of which the first are done."""
    sums = UnitSums(UNITS, lambda: PairedAccuracy(len(FLIPS), CLASSES))
    labels = torch.randint(0, CLASSES, (UNITS, ROWS), generator=torch.Generator().manual_seed(0))
    labels = labels.flatten().sort().values.reshape(UNITS, ROWS) if by_class else labels
    for unit in range(done):
        opened = sums.open(unit, range(ROWS), [], "file")
        opened.scores.update(answers(labels[unit]), labels[unit], torch.zeros(ROWS, dtype=torch.int64))
        opened.rows.labels += labels[unit].tolist()
        sums.close(unit, 80, "file")
    units = UnitStore(folder / "units", UNITS)
    units.open({"variants": VARIANTS}, {"test_families": {"each:layer": "0-3", "extra": "2-4"}} | session)
    units.save(sums.nodes)
    units.close()
    return folder / "units"


def test_masks_are_decided_by_e_bh_within_family_and_ablation(tmp_path: Path) -> None:
    # After two units 24 of 24 flips are losses under `a`, 2 of 2 under `b`.
    found = read_decided(store(tmp_path, 2))
    wanted = [Decided("each:layer", "zero", 2, 1), Decided("each:layer", "mean", 2, 1)]
    wanted += [Decided("extra", "zero", 2, 1), Decided("extra", "mean", 1, 0)]
    assert found == (wanted, "")
    assert decided_in_short(tmp_path / "units") == "decided 3 of 7 masks"


def test_a_mask_is_decided_where_e_passes_what_its_rank_asks(tmp_path: Path) -> None:
    # all losses: E = (1/2 / 1) (3/2 / 2) ... 2^n = product of (2k - 1) / k; 12 flips of `b` after all six units
    flips = np.arange(1, 7)
    assert np.prod((2 * flips - 1) / flips) == pytest.approx(14.4375)  # the sixth loss leaves it below 20
    *_, mean = read_decided(store(tmp_path, 6))[0]
    assert mean == Decided("extra", "mean", 1, 0)  # no flip at all
    zero = read_decided(tmp_path / "units")[0][0]
    assert zero == Decided("each:layer", "zero", 2, 1)  # `b`: 6 losses; rank 2 of 2 asks for 20


def test_sorted_units_decide_nothing_and_say_why(tmp_path: Path) -> None:
    decided, why = read_decided(store(tmp_path, 4, by_class=True))
    assert decided == []
    assert why.startswith("labels come sorted by class")
    assert decided_in_short(tmp_path / "units") == ""


@pytest.mark.parametrize(("done", "why"), [(0, ""), (1, "fewer than 50 images"), (2, "")])
def test_too_little_to_tell_is_said(tmp_path: Path, done: int, why: str) -> None:
    decided, said = read_decided(store(tmp_path, done))
    assert bool(decided) == (done == 2)
    assert said.startswith(why)


def test_units_of_runs_without_families_or_of_an_older_headprobe_decide_nothing(tmp_path: Path) -> None:
    assert read_decided(store(tmp_path / "single", 2, test_families={})) == ([], "")
    assert read_decided(store(tmp_path / "older", 2, test_families=None)) == ([], "")


def test_a_broken_file_is_no_reason_to_end_a_run(tmp_path: Path) -> None:
    directory = store(tmp_path, 2)
    next(directory.glob("units-*")).write_bytes(b"")
    assert decided_in_short(directory) == ""
