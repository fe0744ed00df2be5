"""`headprobe compare`: the same masks in several runs, from their files alone."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from headprobe.files import text_digest
from tests.cli_runs import QUICK, command, only_message
from tests.run.small_runs import write_run

SPECS = ["each:layer", "each:head"]
FILES = {"compare.csv", "compare_ranks.csv", "compare.json", "compare.png"}
HOSTILE = '<script>alert(1)</script> $x^2$ "quoted", [bold] \u05e9\u05dc\u05d5\u05dd'


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "one", SPECS)
    write_run(tmp_path / "two", SPECS, seed=1)
    return tmp_path


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_tables_and_a_figure_go_into_a_folder_and_are_made_again(runs: Path) -> None:
    for _ in range(2):
        ended = command(runs, "compare", "one", "two")
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.endswith("Results: compare/compare.csv  (all files: compare)\n")
    assert {file.name for file in (runs / "compare").iterdir()} == FILES
    assert (runs / "compare/compare.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(runs / "compare/compare.csv")
    assert len(rows) == 2 * 10  # two quantities of three layers and seven heads
    assert {row["test"] for row in rows} == {"two-sample"}  # these runs do not say which images they are of
    about = json.loads((runs / "compare/compare.json").read_text())
    assert [run["name"] for run in about["runs"]] == ["one", "two"]
    assert "does not say which images" in about["pairs"][0]["why"]


def test_the_screen_shows_drops_side_by_side_and_says_how_they_were_tested(runs: Path) -> None:
    ended = command(runs, "compare", "one", "two")
    for said in (
        "one | two: two-sample tests (Welch",
        "7 of each:head",
        "3 of each:layer",
        "top-1 drop in percentage points",
    ):
        assert said in ended.out
    row = next(
        row
        for row in rows_of(runs / "compare/compare.csv")
        if (row["mask"], row["quantity"]) == ("head:2.1", "drop_pp")
    )
    [line] = [line for line in ended.out.splitlines() if line.startswith("head:2.1 ")]
    for name in ("value_a", "value_b", "b_minus_a"):
        assert f"{float(row[name]):+.2f} [{float(row[f'{name}_low']):+.2f}, {float(row[f'{name}_high']):+.2f}]" in line
    rises = command(runs, "compare", "one", "two", "--quantity", "nll_rise", "--output", "rises")
    assert "NLL rise in nats" in rises.out


def test_three_runs_and_the_same_run_twice(runs: Path) -> None:
    write_run(runs / "three", SPECS, seed=2)
    ended = command(runs, "compare", "one", "two", "three")
    assert ended.code == 0, ended.err
    pairs = {(row["run_a"], row["run_b"]) for row in rows_of(runs / "compare/compare.csv")}
    assert pairs == {("one", "two"), ("one", "three"), ("two", "three")}
    twice = command(runs, "compare", "one", "one")
    assert "the very same images" in twice.out
    rows = rows_of(runs / "compare/compare.csv")
    assert {(row["b_minus_a"], row["p"], row["test"]) for row in rows} == {("0.0", "1.0", "paired")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one",), "a comparison needs two runs or more, got 1"),
        (("one", "nowhere"), "run.json is missing"),
        (
            ("one", "two", "--quantity", "top9"),
            "--quantity must be one that all runs have (nll_rise, drop_pp), got 'top9'",
        ),
        (("one", "two", "--output", "one"), "--output must be a new folder or one of an earlier comparison"),
        (("one", "two", "--output", "one/masks.csv"), "--output must be a folder such as compare"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_writes_nothing(runs: Path, words: tuple[str, ...], said: str) -> None:
    before = sorted(runs.rglob("*"))
    ended = command(runs, "compare", *words)
    assert ended.code == 2
    assert said in only_message(ended)
    assert ended.out == ""
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("name", ["run.json", "masks.csv", "groups.npz"])
def test_a_file_that_is_cut_off_is_one_message(runs: Path, name: str) -> None:
    content = (runs / "one" / name).read_bytes()
    (runs / "one" / name).write_bytes(content[: len(content) // 2])
    ended = command(runs, "compare", "one", "two")
    assert ended.code in (1, 2)
    assert only_message(ended).count("\n") == 1
    assert not (runs / "compare").exists()


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    model = {"name": HOSTILE, "heads_per_layer": [2, 2, 3]}
    write_run(tmp_path / "one", SPECS, model=model)
    write_run(tmp_path / "$two$ [red]", SPECS, seed=1)
    ended = command(tmp_path, "compare", "one", "$two$ [red]")
    assert ended.code == 0, ended.err
    assert {row["run_a"] for row in rows_of(tmp_path / "compare/compare.csv")} == {HOSTILE}
    assert "[bold]" in ended.out


def test_a_comparison_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from headprobe.cli import main; assert main(['compare', 'one', 'two']) == 0; "
        "assert not {'torch', 'lightning', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_real_runs_on_the_same_and_on_fewer_images(tmp_path: Path) -> None:
    for name, images in (("first", "40"), ("again", "40"), ("fewer", "30")):
        ended = command(
            tmp_path, "test", *QUICK, "--mask-spec", "each:layer", "--data.max_images", images,
            "--trainer.default_root_dir", name, "--resume", "never",
        )  # fmt: skip
        assert ended.code == 0, ended.err
    paths = [f"{name}/lightning_logs/version_0" for name in ("first", "again", "fewer")]
    ended = command(tmp_path, "compare", *paths)
    assert ended.code == 0, ended.err
    assert "first | again: paired tests" in ended.out
    assert "since they judged other images (max_images: 40 and 30)" in ended.out
    rows = rows_of(tmp_path / "compare/compare.csv")
    same = [row for row in rows if (row["run_a"], row["run_b"]) == ("first", "again")]
    assert len(same) == 12
    assert {(float(row["b_minus_a"]), float(row["p"])) for row in same} == {(0.0, 1.0)}
    assert text_digest(tmp_path / "first/lightning_logs/version_0/masks.csv") == text_digest(
        tmp_path / "again/lightning_logs/version_0/masks.csv"
    )
