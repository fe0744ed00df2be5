"""`headprobe study`: one run with the whole study and its page, resumed by the same command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from headprobe.commands.dry import timing as dry_timing
from headprobe.commands.dry.fitting import Fitting
from headprobe.commands.dry.run import Beside, time_lines
from headprobe.errors import RunError
from headprobe.experiments.study import PARTS
from headprobe.module import HeadProbe
from tests import forked
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.forked import digits

PLAIN = ("--trainer.callbacks", "null", "--trainer.accelerator", "cpu", "--data.num_workers", "0")
SHORT = ("study", *PLAIN, "--skip", ",".join(set(PARTS) - {"layers", "nulls", "indices"}), "--ablation", "zero,mean")
RESULTS = ("masks.csv", "groups.npz", "index_null.csv", "ablations.csv", "calibration.safetensors")


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_timing, "TIMED_SECONDS", 0.0)


def record(ended: Ended, version: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ended.directory(version) / "run.json").read_text(encoding="utf-8"))
    return content


def line(ended: Ended, begins: str) -> str:
    return next(text for text in ended.out.splitlines() if text.startswith(begins))


def test_the_plan_of_the_usual_study_stands_before_it_and_a_dry_run_stops_there(tmp_path: Path) -> None:
    ended = command(tmp_path, "study", "--trainer.accelerator", "cpu", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    study = line(ended, "study: ")
    assert all(f"{part} (" in study for part in PARTS)
    assert study.endswith("ablation by zero, mean, linear")
    assert "masks: 637 beside the baseline" in line(ended, "masks: ")
    assert "of 500" in line(ended, "images: ")  # of the bundled images 400 are taken, and that is said
    for begins in ("plan: ", "memory: ", "time to fit: ", "time to judge: ", "time beside: ", "time in all: "):
        assert re.search(r"\d", line(ended, begins)), begins
    assert list(tmp_path.iterdir()) == []


def test_the_time_in_all_is_the_sum_of_its_parts() -> None:
    fitting = Fitting(("mean",), images=300, units=1, reading=1, plain=0.05, seconds=0.1, sums=0)
    lines = time_lines(0.2, 300, 2, fitting, Beside(proofs=4.0, writing=31.0))
    assert lines[0] == "time to fit: about 15 s for 300 images"
    assert lines[1].startswith("time to judge: about 30 s for 300 images on 2 processes")
    assert lines[2:] == [
        "time beside: about 4.0 s to prove the masks, 31 s for tables, figures and the page",
        "time in all: about 80 s",
    ]


@pytest.mark.slow
def test_a_study_leaves_the_tables_of_a_test_and_a_page(tmp_path: Path) -> None:
    skip = "nulls,random,shapley"
    ended = command(tmp_path, "study", *QUICK, "--skip", skip, "--mask-spec", "layer:0+head:3.1")
    assert ended.code == 0, ended.err
    there = {file.name for file in ended.directory().iterdir()}
    described = {"heads.csv", "offset_maps.npz", "similarity.npz", "spectrum.csv"}
    tables = {"ablations.csv", "scores.csv", "importance.csv", "curves.csv", "orders.csv", "interactions.csv"}
    assert {"masks.csv", "report.html", "config.yaml", *described, *tables} <= there
    rows = ended.rows()
    assert {row["ablation"] for row in rows if row["mask"] == "head:3.0"} == {"zero", "mean", "linear"}
    assert {row["ablation"] for row in rows if row["mask"] == "head:3.0,1"} == {"zero"}
    assert {row["ablation"] for row in rows if row["mask"] == "layer:0+head:3.1"} == {"zero", "mean", "linear"}
    assert line(ended, "Report: ") == "Report: lightning_logs/version_0/report.html"
    assert "<title>What does the multi-head do?" in (ended.directory() / "report.html").read_text(encoding="utf-8")
    assert record(ended)["command"].startswith("headprobe study ")
    assert "left out of the study" not in record(ended)["decisions"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_study_without_labels_is_of_features_up_to_its_page(tmp_path: Path) -> None:
    ended = command(tmp_path, "study", *QUICK, "--model.classifier", "none", "--skip", "nulls,random,shapley")
    assert ended.code == 0, ended.err
    there = {file.name for file in ended.directory().iterdir()}
    described = {"heads.csv", "offset_maps.npz", "similarity.npz", "spectrum.csv"}
    tables = {"ablations.csv", "scores.csv", "importance.csv", "curves.csv", "orders.csv", "interactions.csv"}
    assert {"masks.csv", "report.html", *described, *tables} <= there
    rows = ended.rows()
    assert len(rows) == 1 + 3 * (6 + 4 + 24) + 36 + 2 * 2 * 10  # layers, indices, heads; pairs; two orders, two ends
    assert all(0 < float(row["feature_distance"]) < 10 for row in rows[1:])
    said = record(ended)
    assert "gradient_abs (nothing classifies images" in said["decisions"]["left out of the study"]
    assert "top-1" not in ended.out
    page = (ended.directory() / "report.html").read_text(encoding="utf-8")
    assert "No label was read." in page


def test_a_study_that_broke_off_goes_on_by_the_same_command(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 4)
    words = (*SHORT, "--data.path", "set")
    real, seen = HeadProbe.test_step, []

    def step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        if batch.name != "noise":  # the plan's
            seen.append(self.calibrating)
            if seen.count(False) == 3:
                raise RunError("the machine went away")
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProbe, "test_step", step)
        broken = command(tmp_path, *words)
        assert broken.code == 1
        assert broken.err.endswith("headprobe: error: the machine went away\n")
        assert seen == [True] * 4 + [False] * 3
        seen += [False] * 3  # never again the third
        ended = command(tmp_path, *words)
    assert ended.code == 0, ended.err
    assert seen[10:] == [False] * 2
    assert record(ended, 1)["units_resumed"] == 2
    assert (ended.directory(1) / "report.html").is_file()
    # a config.yaml says all of the command
    config = "lightning_logs/version_1/config.yaml"
    undisturbed = command(tmp_path, "study", "--config", config, "--resume", "never")
    for name in RESULTS:
        assert (ended.directory(1) / name).read_bytes() == (undisturbed.directory(2) / name).read_bytes(), name


def test_two_processes_find_what_one_finds_and_make_one_page(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 4)
    ended = {}
    for processes in (1, 2):
        words = (*SHORT, "--data.path", "../set")
        ended[processes] = forked.run(tmp_path / str(processes), *words, processes=processes)
        assert ended[processes].code == 0, ended[processes].err
    for name in RESULTS:
        one, two = ((own.directory() / name).read_bytes() for own in ended.values())
        assert one == two, name
    assert ended[2].out.count("study: ") == ended[2].out.count("Report: ") == 1
    assert (ended[2].directory() / "report.html").is_file()


def test_the_plan_of_a_swin_has_draws_for_each_set_of_layers_that_has_an_index(tmp_path: Path) -> None:
    ended = command(
        tmp_path, "study", *PLAIN, "--model.name", "digits_swin", "--skip", "heads,random,scores", "--dry-run"
    )
    assert ended.code == 0, ended.err
    assert "nulls (297 draws of one head per layer, under zero alone)" in line(ended, "study: ")
    assert "heads (" not in line(ended, "study: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--skip", "pairs,nuls"),
            "--skip must be some of layers, indices, nulls, heads, pairs, random, scores, shapley",
        ),
        (("--mask-spec", "layer:9"), "has no layer 9"),
        (("--mask-spec", "resample:layer:1"), "the run has no ablation resample: add it to --ablation"),
        (("--skips", "nulls"), "did you mean --skip?"),
        (("--ablation", "zeros"), "did you mean zero?"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    ended = command(tmp_path, "study", *QUICK, *words)
    assert ended.code == 2
    assert said in only_message(ended)
    assert list(tmp_path.iterdir()) == []
