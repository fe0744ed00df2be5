"""The commands of README and docs/ work, a run writes what they say, and the files that they name exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
import pytest

from headprobe import cli
from headprobe.calibration.constants import LayerConstants
from headprobe.calibration.scores import score_rows
from headprobe.callbacks.records import SCHEMA
from headprobe.masks.spec import MaskSpec
from headprobe.masks.tables import SCORES
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy, paired_scores
from headprobe.run.importance import importance_of
from headprobe.run.load import load_files
from headprobe.run.results import class_rows, variant_rows, write_rows
from tests.run.small_runs import HEADS, write_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
CODE = [file.as_posix() for folder in ("headprobe", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]

pytestmark = pytest.mark.usefixtures("no_arguments", "at_root")


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """RunFiles commands where the documentation says: in the repository, with nothing fetched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its page, line, language and lines."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A documented command, without the words up to `headprobe`, and the output shown below it, if any."""

    place: str
    words: tuple[str, ...]
    shown: tuple[str, ...]


def place_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (number, line.strip("` ")), []
        else:
            yield Block(page, *opened, tuple(lines))
            opened = None
    assert opened is None, f"{page.name}: the code block of line {opened} is not closed"


def typed(block: Block) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The command lines of a shell block, continued lines joined, each with the output shown below it."""
    lines = "\n".join(block.lines).replace("\\\n", " ").splitlines()
    if block.language != "console":
        yield from ((line, ()) for line in lines)
        return
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].removeprefix("$ "), tuple(lines[start + 1 : end])


def after_headprobe(words: list[str]) -> tuple[str, ...] | None:
    """The words after `headprobe` or `python -m headprobe`, whatever launches it; None for other commands."""
    for place, word in enumerate(words):
        launched = place == 0 or words[place - 1] == "-m" or words[0] in {"srun", "torchrun"} or "=" in words[place - 1]
        if word == "headprobe" and launched:
            return tuple(words[place + 1 :])
    return None


def simple_commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, which `&&`, `|` and `;` join, without redirections."""
    for joiner, group in groupby(words, lambda word: word in {"&&", "||", "|", ";"}):
        if not joiner:
            yield list(takewhile(lambda word: word not in {">", ">>", "2>&1"}, group))


def commands_of(page: Path) -> Iterator[Command]:
    for block in blocks(page):
        if block.language not in {"bash", "console", "sh", "shell"}:
            continue
        for line, shown in typed(block):
            for simple in simple_commands(shlex.split(line, comments=True)):
                words = after_headprobe(simple)
                if words is not None:
                    yield Command(f"{page.name}:{block.line} {shlex.join(words)}", words, shown)


COMMANDS = [command for page in PAGES for command in commands_of(page)]
RUNS = [
    command
    for command in COMMANDS
    if command.words[:1] in {("study",), ("test",), ("fit",), ("prune",)} and "--help" not in command.words
]
# what these print needs runs or a checkpoint: their tests are in tests/commands
NEED_FILES = {"report", "compare", "status", "convert"}
PRINTS = [command for command in COMMANDS if command not in RUNS and command.words[0] not in NEED_FILES]
CONFIGS = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
SPECS = [
    (page.name, spec)
    for page in PAGES
    for spec in re.findall(r"--mask-spec[ =]'?([^\s'`)]+)", page.read_text(encoding="utf-8"))
]


@cache
def options(command: str) -> frozenset[str]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([command, "--help-all"]) == 0
    return frozenset(re.findall(r"(?<!\S)\[?(--[\w.+-]+)", out.getvalue()))


def test_the_documentation_has_commands_to_test() -> None:
    assert {command.words[0] for command in COMMANDS} >= {"test", "masks"}


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command.place)
def test_a_documented_run_names_only_options_that_exist(command: Command) -> None:
    used = {word.partition("=")[0] for word in command.words if word.startswith("--") and "init_args" not in word}
    used = {"--model.options" if word.startswith("--model.options.") else word for word in used}  # any of timm's
    assert used - options(command.words[0]) == set()


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command.place)
def test_a_documented_run_is_accepted_with_its_config_and_mask_spec(command: Command) -> None:
    assert cli.main([*command.words, "--print_config"]) == 0


@pytest.mark.parametrize("command", PRINTS, ids=lambda command: command.place)
def test_a_documented_command_that_needs_no_data_prints_what_is_shown(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = 2 if "^" in {line.strip() for line in command.shown} else 0
    assert cli.main(command.words) == expected
    out, err = capsys.readouterr()
    printed = [line.rstrip() for line in (err if expected else out).splitlines()]
    if "..." in command.shown:
        place = command.shown.index("...")
        end = len(printed) - len(command.shown[place + 1 :])
        printed = [*printed[:place], "...", *printed[end:]]
    assert not command.shown or printed == [line.rstrip() for line in command.shown]


@pytest.mark.parametrize("block", CONFIGS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_documented_config_is_accepted(block: Block, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("\n".join(block.lines), encoding="utf-8")
    assert cli.main(["test", "--config", str(config), "--print_config"]) == 0


@pytest.mark.parametrize(("page", "spec"), SPECS)
def test_a_mask_spec_in_running_text_is_one(page: str, spec: str) -> None:
    assert MaskSpec(spec).canonical


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [
        target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#|mailto:", target)
    ]
    assert [target for target in targets if not (page.parent / target.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=place_of)
def test_every_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])((?:headprobe|tests|configs|benchmarks|docs)/[\w./-]*\w)", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", ALL_PAGES, ids=place_of)
def test_every_file_of_the_code_that_a_page_names_in_short_exists(page: Path) -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")))
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in CODE)} == set()


@pytest.mark.parametrize("page", ALL_PAGES, ids=place_of)
def test_every_module_that_a_page_runs_exists(page: Path) -> None:
    named = set(re.findall(r"python3? -m ((?:headprobe|benchmarks|tests)[\w.]*\w)", page.read_text(encoding="utf-8")))
    files = {name: ROOT / name.replace(".", "/") for name in named}
    assert {name for name, file in files.items() if not file.exists() and not file.with_suffix(".py").exists()} == set()


def documented_columns(heading: str) -> list[str]:
    """The first cells of the table below a heading of docs/results.md."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def test_every_column_of_masks_csv_is_documented_in_its_order() -> None:
    (baseline,) = variant_rows([], paired_scores(PairedAccuracy(0, 2).to_arrays()))
    assert documented_columns("masks.csv") == list(baseline)


def test_every_column_of_ablations_csv_and_array_of_groups_npz_is_documented_in_its_order(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ["zero", "mean"]))
    assert documented_columns("ablations.csv") == list(run.table("ablations.csv") or ())
    assert documented_columns("groups.npz") == list(run.arrays("groups.npz"))


def test_every_column_of_scores_csv_is_documented_in_its_order() -> None:
    (row,) = score_rows([LayerConstants(1, np.zeros((1, 2)), scores={name: np.zeros(1) for name in SCORES})], 9)
    assert documented_columns("scores.csv") == list(row)


def test_every_column_of_importance_csv_is_documented_in_its_order(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    places = [(layer, head) for layer, count in enumerate(HEADS) for head in range(count)]
    scores = [{"layer": layer, "head": head, "images": 9, "gradient_abs": 1.5 * layer} for layer, head in places]
    write_rows(tmp_path / "scores.csv", scores)
    rows = importance_of(load_files(tmp_path))
    assert documented_columns("importance.csv") == list(rows[0])


def test_every_column_of_curves_orders_and_index_null_csv_is_documented_in_its_order(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0-1", "each:index", "one-per-layer:0-1"]))
    for name in ("curves.csv", "orders.csv", "index_null.csv"):
        assert documented_columns(name) == list(run.table(name) or ()), name


@pytest.mark.parametrize("name", ["interactions.csv", "shapley.csv"])
def test_every_column_about_sets_of_heads_is_documented_in_its_order(tmp_path: Path, name: str) -> None:
    run = load_files(write_run(tmp_path, ["subsets:layer"]))
    assert documented_columns(name) == list(run.table(name) or ())


def test_every_column_of_classes_csv_is_documented_in_its_order() -> None:
    metric = PairedAccuracy(0, 1, per_class=True)
    metric.class_images += 1
    (row,) = class_rows([], paired_scores(metric.to_arrays()), [(0, "a")])
    assert documented_columns("classes.csv") == list(row)


def test_every_column_of_the_records_is_documented_in_its_order() -> None:
    assert documented_columns("records") == list(SCHEMA.names)


def test_every_decision_that_the_code_makes_is_documented() -> None:
    page = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    keys: set[str] = set()
    for file in (ROOT / "headprobe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Decision":
                assert isinstance(node.args[0], ast.Constant), f"{file.name} makes up a key while it runs"
                keys.add(str(node.args[0].value))
    assert len(keys) > 10
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
