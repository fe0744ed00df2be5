"""The row budget of a run: tried once, found again, never in the way of what was asked for or scored before."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest

from headprobe.backbone.growing.row_plan import RowPlan
from headprobe.budget import BudgetTrials
from headprobe.callbacks.row_budget import choose_budget
from headprobe.errors import RunError
from headprobe.module import HeadProbe
from tests import forked
from tests.callbacks.test_resume import broken_off, record, units
from tests.cli_runs import QUICK, Ended, command
from tests.forked import digits

TEST = ("test", "--mask-spec", "each:layer", *QUICK)
RESUMED = ("test", "--mask-spec", "each:layer", "--data.path", "set", "--data.num_workers", "0")
RUN = (*RESUMED, "--trainer.accelerator", "cpu")
TRIED, KEPT = "the fastest that was tried", "as measured before"


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials pay in any run."""
    monkeypatch.setattr("headprobe.callbacks.row_budget.PAYS_FROM", 0.0)


def prefer(rows: int) -> Callable[[BudgetTrials, RowPlan], float]:
    """Make trials find these rows the fastest."""
    return lambda _, plan: plan.images * (1e-7 if plan.budget == rows else 1e-6)


@pytest.fixture
def prefers_42(pays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BudgetTrials, "_seconds", prefer(42))


@pytest.fixture
def no_trials(pays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: BudgetTrials, *_: Any) -> Any:
        raise AssertionError("a budget was tried")

    monkeypatch.setattr(BudgetTrials, "fastest", forbidden)


def kept(folder: Path) -> Path:
    (file,) = (folder / "lightning_logs" / "row_budgets").iterdir()
    return file


def counts(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the whole numbers of `masks.csv`."""
    names = [name for name in rows[0] if all(row[name].isdigit() for row in rows)]
    assert {"images", "top1_count", "top5_count", "right_to_wrong", "wrong_to_right"} <= set(names)
    return [{name: row[name] for name in names} for row in rows]


@pytest.mark.usefixtures("pays")
def test_a_measured_budget_is_told_once_used_recorded_and_kept(tmp_path: Path) -> None:
    ended = command(tmp_path, *TEST)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("Row budget: ")]
    rows = json.loads(kept(tmp_path).read_text())["rows"]
    assert line.startswith(f"Row budget: {rows} rows a forward pass, {TRIED} (rows and time beside the fastest: ")
    assert line.endswith(f"; --model.row_budget {rows} takes it without a trial")
    assert f" {rows} 1.00" in line
    found = record(ended, 0)
    assert found["row_plan"]["budget"] == rows
    assert found["units_by_row_budget"] == {str(rows): found["data"]["units"]}
    assert found["row_budget"] == "auto"
    other = command(tmp_path, *TEST, "--model.row_budget", "7")
    assert other.code == 0, other.err
    assert record(other, 1)["row_plan"]["budget"] == 7
    assert counts(other.rows(1)) == counts(ended.rows(0))


@pytest.mark.usefixtures("prefers_42")
def test_the_next_run_takes_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = command(tmp_path, *TEST)
    monkeypatch.setattr(BudgetTrials, "_seconds", prefer(21))
    again = command(tmp_path, *TEST, "--resume", "never")
    assert "Row budget: 42 rows a forward pass, the fastest" in first.out
    assert "(rows and time beside the fastest: 21 10.00, 28 10.00, 42 1.00, 56 10.00, 84 10.00)" in first.out
    assert f"Row budget: 42 rows a forward pass, {KEPT}\n" in again.out
    assert TRIED not in again.out
    assert [record(again, version)["row_plan"]["budget"] for version in (0, 1)] == [42, 42]
    assert (again.directory(1) / "masks.csv").read_bytes() == (again.directory(0) / "masks.csv").read_bytes()


OTHERS = [
    ("--data.batch_size", "16"),
    ("--mask-spec", "each:index"),
    ("--trainer.precision", "bf16-mixed"),
    ("--model.name", "digits_swin"),
]


@pytest.mark.parametrize("other", OTHERS, ids=[" ".join(words) for words in OTHERS])
@pytest.mark.usefixtures("prefers_42")
def test_another_run_is_measured_on_its_own(tmp_path: Path, other: tuple[str, ...]) -> None:
    command(tmp_path, *TEST)
    words = TEST if other[0] != "--mask-spec" else ("test", *QUICK)
    ended = command(tmp_path, *words, *other)
    assert ended.code == 0, ended.err
    assert TRIED in ended.out
    assert len(list((tmp_path / "lightning_logs" / "row_budgets").iterdir())) == 2


@pytest.mark.usefixtures("prefers_42")
def test_more_images_of_the_same_run_are_not_measured_again(tmp_path: Path) -> None:
    command(tmp_path, *TEST)
    ended = command(tmp_path, *TEST, "--data.max_images", "30")
    assert f"42 rows a forward pass, {KEPT}" in ended.out


@pytest.mark.usefixtures("no_trials")
def test_a_budget_that_is_asked_for_is_taken_without_a_word(tmp_path: Path) -> None:
    ended = command(tmp_path, *TEST, "--model.row_budget", "42")
    assert ended.code == 0, ended.err
    assert "Row budget" not in ended.out
    assert record(ended, 0)["row_plan"]["budget"] == 42
    assert record(ended, 0)["row_budget"] == 42
    assert not (tmp_path / "lightning_logs" / "row_budgets").exists()


def test_a_short_run_takes_the_usual_budget_without_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BudgetTrials, "fastest", None)
    ended = command(tmp_path, *TEST)
    assert ended.code == 0, ended.err
    assert "Row budget" not in ended.out
    assert record(ended, 0)["row_plan"]["budget"] == 48
    assert not (tmp_path / "lightning_logs" / "row_budgets").exists()


@pytest.mark.usefixtures("pays")
def test_a_run_without_a_choice_takes_the_usual_budget(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", "--mask-spec", "each:head", *QUICK, "--data.batch_size", "1")
    assert ended.code == 0, ended.err
    assert "Row budget" not in ended.out
    assert record(ended, 0)["row_plan"]["budget"] == 48


@pytest.mark.usefixtures("prefers_42")
def test_a_resumed_run_keeps_the_budget_of_its_units(tmp_path: Path) -> None:
    digits(tmp_path / "set", 40, 5)
    assert "Row budget: 42" in broken_off(tmp_path, 3).out
    content = json.loads(kept(tmp_path).read_text())
    kept(tmp_path).write_text(json.dumps({**content, "rows": 84}))
    ended = command(tmp_path, *RUN)
    assert ended.code == 0, ended.err
    assert "Resuming: 3 of 5 units" in ended.out
    assert "Row budget" not in ended.out
    found = record(ended, 1)
    assert (found["row_plan"]["budget"], found["units_by_row_budget"]) == (42, {"42": 5})
    fresh = command(tmp_path, *RUN, "--resume", "never")
    assert f"84 rows a forward pass, {KEPT}" in fresh.out
    assert record(fresh, 2)["units_by_row_budget"] == {"84": 5}
    assert units(tmp_path).name == found["key"]  # however many rows there are
    asked = command(tmp_path, *RUN, "--model.row_budget", "42")
    assert (ended.directory(1) / "masks.csv").read_bytes() == (asked.directory(3) / "masks.csv").read_bytes()


@pytest.mark.usefixtures("prefers_42")
def test_a_broken_file_is_measured_again_and_replaced(tmp_path: Path) -> None:
    command(tmp_path, *TEST)
    kept(tmp_path).write_text('{"rows": -3}')
    ended = command(tmp_path, *TEST, "--resume", "never")
    assert (ended.code, ended.err) == (0, "")
    assert TRIED in ended.out
    assert json.loads(kept(tmp_path).read_text())["rows"] == 42


@pytest.mark.usefixtures("prefers_42")
def test_a_budget_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").mkdir()
    (tmp_path / "lightning_logs" / "row_budgets").write_text("a file")
    ended = command(tmp_path, *TEST)
    assert (ended.code, ended.err) == (0, "")
    assert record(ended, 0)["row_plan"]["budget"] == 42


def _prefer_by_rank(folder: str, words: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Work as a forked process whose trials pay, and find 42 rows the fastest in the first process, 21 in others."""
    patch = pytest.MonkeyPatch()  # ends with the process
    patch.setattr("headprobe.callbacks.row_budget.PAYS_FROM", 0.0)
    patch.setattr(BudgetTrials, "_seconds", prefer(42 if environment["LOCAL_RANK"] == "0" else 21))
    _WORK(folder, words, environment, log)


_WORK = forked._work


def forked_run(folder: Path, *words: str, processes: int) -> Ended:
    digits(folder / "set", 40, 5)
    ended = forked.run(folder, *RUN, *words, processes=processes)
    assert ended.code == 0, forked.Running((), folder).text("err", 0)
    return ended


def test_all_processes_take_the_choice_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = forked_run(tmp_path / "asked", "--model.row_budget", "42", processes=1)
    monkeypatch.setattr(forked, "_work", _prefer_by_rank)
    both = forked_run(tmp_path / "both", processes=2)
    assert both.out.count("Row budget: 42 rows a forward pass, the fastest") == 1
    assert "Row budget" not in (tmp_path / "both" / "out.1").read_text()
    assert record(both, 0)["units_by_row_budget"] == {"42": 5}
    assert (both.directory() / "masks.csv").read_bytes() == (asked.directory() / "masks.csv").read_bytes()
    again = forked.run(tmp_path / "both", *RUN, "--resume", "never", processes=2)
    assert again.out.count(f"Row budget: 42 rows a forward pass, {KEPT}") == 1
    assert (again.directory(1) / "masks.csv").read_bytes() == (asked.directory() / "masks.csv").read_bytes()


def test_without_a_plan_there_is_no_choice() -> None:
    with pytest.raises(RunError, match="plan_passes must be called"):
        choose_budget(lightning.Trainer(accelerator="cpu", logger=False), HeadProbe())
