"""`test --dry-run`: what a run would do, and nothing written."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.commands.dry import fitting as dry_fitting
from headprobe.commands.dry import run as dry_run
from headprobe.commands.dry import timing as dry_timing
from headprobe.commands.dry.fitting import Fitting
from headprobe.commands.dry.run import print_dry_run
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe
from headprobe.report.table import console
from tests.cli_runs import QUICK, command


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_timing, "TIMED_SECONDS", 0.0)


pytestmark = pytest.mark.usefixtures("_briefly")


def dry_run_text(images: int | None, spec: str = "each:layer", **options: Any) -> str:
    """Return what a dry run prints for a data set of so many images."""
    torch.set_num_threads(1)
    probe = HeadProbe(**options)
    probe.choose_masks([MaskSpec(spec)])
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with console.capture() as captured:
        print_dry_run(trainer, probe, SimpleNamespace(batch_size=8, expected_images=images, decisions=list))
    return captured.get()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "each:layer", "--dry-run")
    assert ended.code == 0
    assert ended.err == ""
    # behind the lines of what is decided about model and data
    assert [line.split(":")[0] for line in ended.out.splitlines()][-6:] == [
        "model", "masks", "plan", "memory", "time", "resolves",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_alone_has_a_plan() -> None:
    text = dry_run_text(500, "none")
    assert "masks: 0 beside the baseline\n" in text
    assert "about 1.00 plain forward passes instead of 1\n" in text


def test_the_work_of_a_growing_pass_is_counted_in_plain_forward_passes() -> None:
    # 6 layers: 1 for the baseline, and 6/6 + 5/6 + ... + 1/6 for the masks
    assert "about 4.50 plain forward passes instead of 7\n" in dry_run_text(500)


def test_every_wave_of_masks_adds_its_own_trunk() -> None:
    assert "3 such passes hold all masks; an image costs about 6.50 plain" in dry_run_text(500, row_budget=3)


SWEEP = ("test", *QUICK, "--mask-spec", "each:layer")


def planned(folder: Path, *words: str) -> list[str]:
    """Return what a dry run says of forward passes."""
    ended = command(folder, *SWEEP, "--dry-run", *words)
    assert (ended.code, ended.err) == (0, "")
    return [line for line in ended.out.splitlines() if line.startswith("plan:")]


def test_a_run_is_planned_with_the_budget_that_is_given(tmp_path: Path) -> None:
    (line,) = planned(tmp_path, "--model.row_budget", "14")
    assert line.startswith("plan: 2 images a forward pass, growing to 7 rows each")


def test_a_run_is_planned_with_the_usual_budget(tmp_path: Path) -> None:
    (line,) = planned(tmp_path)
    assert line.startswith("plan: 6 images a forward pass, growing to 7 rows each")


def test_the_plan_is_timed_in_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    step = HeadProbe.test_step

    def note(probe: HeadProbe, batch: Any, number: int) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return step(probe, batch, number)

    monkeypatch.setattr(HeadProbe, "test_step", note)
    planned(tmp_path, "--trainer.precision", "bf16-mixed")
    assert seen == {True}


def test_the_estimate_grows_with_the_number_of_images() -> None:
    assert "for 50,000 images on one process" in dry_run_text(50_000)


@pytest.mark.parametrize(
    ("spec", "churn"),
    [
        ("each:head", (0.01, 0.05)),
        ("head:0.0", (0.01, 0.05)),
        ("each:layer", (0.03, 0.07)),
        ("random:0-3/3:0", (0.03, 0.07)),
    ],
)
def test_the_smallest_drops_are_found_8_times_in_10_under_the_churn_that_is_said(
    spec: str, churn: tuple[float, float]
) -> None:
    line = dry_run_text(2000, spec).splitlines()[-1]
    assert line.startswith("resolves: a top-1 drop of ")
    assert f"if {churn[0]:.0%} to {churn[1]:.0%} of the images flip either way by chance" in line
    drops = [float(number) / 100 for number in re.findall(r"(\d+\.\d+)", line)[:2]]
    for drop, flips in zip(drops, churn, strict=True):
        cells = [flips / 2 + drop, flips / 2, 1 - flips - drop]
        lost, won, _ = np.random.default_rng(0).multinomial(2000, cells, size=20_000).T
        found = np.abs(lost - won) / np.sqrt(np.maximum(lost + won, 1)) > 1.96
        assert abs(found.mean() - 0.8) < 0.015


def test_masks_of_one_head_and_of_several_share_one_range() -> None:
    assert "if 1% to 7% of the images flip" in dry_run_text(500, "random:1-3:0")


def test_too_few_images_are_said_to_find_nothing() -> None:
    assert dry_run_text(3).splitlines()[-1] == "resolves: no top-1 drop, as 3 images are too few"


def test_without_a_masked_head_nothing_is_said_of_drops() -> None:
    assert "resolves" not in dry_run_text(500, "none") + dry_run_text(500, "random:0:0")


def test_an_unknown_number_of_images_is_said() -> None:
    text = dry_run_text(None)
    assert "the data set does not say how many images it has" in text
    assert "resolves" not in text


def test_the_seconds_of_all_waves_follow_from_those_of_two() -> None:
    # a row takes 0.5 s a layer, and each mask leaves out 0.6 of a layer
    work: dict[tuple[int, ...], int] = {(0, 1): 22, (2, 3): 16, (4,): 9}
    seconds = {wave: 0.5 * layers - 0.3 * len(wave) for wave, layers in work.items()}
    some = {wave: seconds[wave] for wave in list(work)[1:]}
    assert dry_timing.whole_step(work, some) == pytest.approx(sum(seconds.values()))
    assert dry_timing.whole_step(work, seconds) == pytest.approx(sum(seconds.values()))


def test_a_wave_that_another_program_held_up_foretells_no_negative_time() -> None:
    work: dict[tuple[int, ...], int] = {(0, 1): 100, (2, 3): 60, (4, 5): 20}
    assert dry_timing.whole_step(work, {(4, 5): 8.0, (2, 3): 4.0}) == pytest.approx(12.0 * 180 / 80)


def test_where_a_step_takes_seconds_the_two_waves_with_the_least_work_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = HeadProbe(row_budget=3)
    probe.choose_masks([MaskSpec("each:layer")])
    probe.begin_judging(8, ())
    plan = probe.plan
    ran: list[tuple[int, ...]] = []
    forward = GrowingPass._forward

    def note(growing: GrowingPass, images: torch.Tensor, wave: tuple[int, ...], whole: bool) -> torch.Tensor:
        ran.append(wave)
        return forward(growing, images, wave, whole)

    monkeypatch.setattr(GrowingPass, "_forward", note)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with torch.inference_mode():
        assert dry_timing.seconds_per_image(trainer, probe, 8) > 0
    assert ran == [(4, 5), (4, 5), (2, 3)]
    assert probe.plan == plan


@pytest.mark.slow
def test_the_estimate_is_within_a_factor_of_three_of_the_run(tmp_path: Path) -> None:
    options = ("test", "--mask-spec", "each:head", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
    printed = command(tmp_path, *options, "--dry-run").out
    estimate = float(re.search(r"\(([\d.e+]+) ms an image", printed)[1]) * 500 / 1000  # type: ignore[index]
    ended = command(tmp_path, *options)
    seconds = float(re.search(r'"seconds": ([\d.]+)', (ended.directory() / "run.json").read_text())[1])  # type: ignore[index]
    assert estimate / 3 < seconds < 3 * estimate + 2  # reading, decoding and drawing the figures take about 2 s


# -- with something to fit ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a dry run says of ablations of all kinds, by the first word of each line."""
    kinds = "zero,mean,linear,position,resample:2,optimal"
    ended = command(tmp_path_factory.mktemp("fitted"), *SWEEP, "--ablation", kinds, "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    return dict(line.split(": ", 1) for line in ended.out.splitlines())


def test_a_dry_run_states_images_and_passes_of_both_stages(fitted: dict[str, str]) -> None:
    images = re.search(r"fitted on (\d+) images of one half, .*; judged on (\d+) others", fitted["calibration"])
    assert images is not None
    fit, judged = images.groups()
    assert int(fit) + int(judged) == 40
    assert fitted["fitting"].startswith(f"linear, mean, position on {fit} images, in one forward pass")
    assert re.search(r"which costs as much as \d\.\d\d plain forward passes$", fitted["fitting"])
    assert "plain forward passes instead of 43" in fitted["plan"]
    assert f"for {fit} images, then at most " in fitted["time to fit"]
    assert f"for {judged} images on one process" in fitted["time to judge"]


def test_the_memory_of_moments_is_that_of_its_matrices(fitted: dict[str, str]) -> None:
    probe = HeadProbe()
    matrices = sum(8 * (layer.heads * layer.head_dim) ** 2 for layer in probe.layout.layers)
    means = sum(8 * layer.rows * layer.tokens * layer.heads * layer.head_dim for layer in probe.layout.layers)
    said = float(re.match(r"(\d+) KiB for each unit", fitted["sums"])[1]) * 1024  # type: ignore[index]
    assert matrices + means < said < 1.2 * (matrices + means)  # squared norms of heads stand beside the channels


def planned_fitting(**changed: Any) -> Fitting:
    known: dict[str, Any] = {"kinds": ("mean",), "images": 1000, "units": 500, "reading": 8, "sums": 2**20}
    return Fitting(**(known | {"plain": 0.01, "seconds": 0.012} | changed))


def test_units_are_merged_so_that_memory_and_disk_grow_by_the_logarithm() -> None:
    (_, line) = planned_fitting().lines()
    assert "1.0 MiB for each unit of the data; of units that are read (8 at once) and merged ones (up to 9)" in line
    assert "about 22.0 MiB in memory at the peak, a process, and up to 9.0 MiB on disk" in line
    assert planned_fitting(units=2 * 500).memory == planned_fitting().memory + 2**20


def test_the_time_in_all_counts_fitting_every_round_and_judging() -> None:
    rounds = planned_fitting(heads=3, round_seconds=0.1)
    assert rounds.lines()[-1].startswith("optimal: at most 40 rounds")
    assert "as much as 10.0 plain forward passes an image (100 ms)" in rounds.lines()[-1]
    lines = dry_run.time_lines(0.05, 2000, 2, rounds)
    assert lines[0] == "time to fit: about 6.0 s for 1,000 images, then at most 33 min to seek optimal constants"
    assert lines[1].startswith("time to judge: about 50 s for 2,000 images on 2 processes (50 ms an image")
    assert lines[2] == "time in all: at most about 34 min"
    assert dry_run.time_lines(0.05, 2000, 2, planned_fitting())[2] == "time in all: about 56 s"


def test_unknown_numbers_of_images_leave_the_time_of_one() -> None:
    lines = dry_run.time_lines(0.05, None, 1, planned_fitting(images=None))
    assert lines[0] == "time to fit: 12 ms an image, model only"
    assert "how many images it has" in lines[1]
    assert len(lines) == 2


def test_the_cost_of_fitting_is_the_least_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("headprobe.commands.dry.fitting.time.perf_counter", lambda: clock[0])
    spent = {"plain": iter([9.0, 1.0, 5.0, 2.0]), "ours": iter([9.0, 7.0, 1.2, 3.0])}

    def run(name: str) -> torch.Tensor:
        clock[0] += next(spent[name])
        return torch.empty(0)

    found = dry_fitting._in_turns((lambda: run("plain"), lambda: run("ours")))
    assert found == pytest.approx([1.0, 1.2])
