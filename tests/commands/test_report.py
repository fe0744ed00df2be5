"""`headprobe report`: the page of one run or several, of any age, from their files alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_runs import command, only_message
from tests.run.small_runs import write_run

SPECS = ["each:layer", "each:head", "grow:random:0-1"]
FIRST_RELEASE = {"masks.csv", "masks.json", "run.json"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", SPECS)


def is_page(file: Path) -> bool:
    return 'name="generator" content="headprobe' in file.read_text(encoding="utf-8")


def test_the_page_of_a_run_goes_into_its_folder_and_is_made_again(run: Path) -> None:
    for _ in range(2):
        ended = command(run.parent, "report", "run")
        assert (ended.code, ended.out, ended.err) == (0, "run/report.html\n", "")
    assert is_page(run / "report.html")


def test_a_run_with_the_oldest_files_alone_has_a_page(run: Path) -> None:
    for file in run.iterdir():
        if file.name not in FIRST_RELEASE:
            file.unlink()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({key: record[key] for key in ("status", "model", "data")}))
    ended = command(run.parent, "report", "run")
    assert ended.code == 0, ended.err
    assert is_page(run / "report.html")


def test_the_page_of_several_runs_goes_into_the_working_folder(run: Path) -> None:
    other = write_run(run.parent / "other", ["each:layer"], ["zero", "mean"])
    ended = command(run.parent, "report", "run", "other")
    assert (ended.code, ended.out) == (0, "report.html\n")
    assert is_page(run.parent / "report.html")
    assert not (run / "report.html").exists()
    assert not (other / "report.html").exists()


def test_output_names_the_file(run: Path) -> None:
    ended = command(run.parent, "report", "run", "--output", "pages/mine.html")
    assert (ended.code, ended.out) == (0, "pages/mine.html\n")
    assert is_page(run.parent / "pages/mine.html")


@pytest.mark.parametrize("words", [("run",), ("run", "--output", "run/report.html")])
def test_a_file_of_somebody_else_is_kept(run: Path, words: tuple[str, ...]) -> None:
    (run / "report.html").write_text("<h1>mine</h1>")
    ended = command(run.parent, "report", *words)
    assert ended.code == 2
    assert "is there already and is no page of headprobe's: name another file with --output" in only_message(ended)
    assert (run / "report.html").read_text() == "<h1>mine</h1>"


def test_a_run_that_is_not_finished_or_not_there_is_one_message(run: Path) -> None:
    (run / "masks.csv").unlink()
    for path, said in (("run", "masks.csv is missing"), ("nowhere", "run.json is missing")):
        ended = command(run.parent, "report", path)
        assert ended.code == 2
        assert said in only_message(ended)


@pytest.mark.parametrize("name", ["run.json", "masks.json", "masks.csv", "groups.npz"])
def test_a_file_that_is_cut_off_is_one_message_or_leaves_its_part_out(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    ended = command(run.parent, "report", "run")
    if ended.code:
        assert ended.code in (1, 2)
        assert only_message(ended).count("\n") == 1
        assert not (run / "report.html").exists()
    else:
        assert name == "groups.npz"  # what the page does not read


def test_a_folder_as_output_and_a_run_given_twice_are_refused(run: Path) -> None:
    ended = command(run.parent, "report", "run", "--output", "run")
    assert (ended.code, "--output must be a file such as run/report.html" in only_message(ended)) == (2, True)
    ended = command(run.parent, "report", "run", "run/../run")
    assert (ended.code, "each run once" in only_message(ended)) == (2, True)


def test_a_page_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from headprobe.cli import main; assert main(['report', 'run']) == 0; "
        "assert not {'torch', 'lightning', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_table_that_is_cut_off_makes_no_page_and_is_named(run: Path) -> None:
    content = (run / "curves.csv").read_bytes()
    (run / "curves.csv").write_bytes(content[: len(content) // 2])
    ended = command(run.parent, "report", "run")
    assert ended.code == 1
    assert "curves.csv cannot be read, as it is cut off" in only_message(ended)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_names_the_option_that_helps(run: Path) -> None:
    ended = command(run.parent, "report", "run", "--output", "run/masks.csv/page.html")
    assert ended.code == 1
    message = only_message(ended)
    assert "the page cannot be written" in message
    assert "name another file with --output, got 'run/masks.csv/page.html'" in message
    assert "--trainer" not in message


def test_an_output_that_ends_as_a_folder_is_refused(run: Path) -> None:
    ended = command(run.parent, "report", "run", "--output", "pages/")
    assert (ended.code, "--output must be a file such as pages/report.html" in only_message(ended)) == (2, True)
    assert not (run.parent / "pages").exists()
