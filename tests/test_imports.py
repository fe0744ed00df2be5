"""The rules of the house that need no running model: which way imports point, and what never stands in the code."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "headprobe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
BUILDER = PACKAGE / "data/digits/build.py"  # makes the bundled dataset; only its makers run it
TESTS = sorted((ROOT / "tests").rglob("*.py"))

GROUND = {"errors", "text", "files", "mixture", "processes"}
"""The ground floor, which everything may import; it knows no heads."""

DIRECTLY: dict[str, set[str]] = {
    "masks": set(),
    "metrics": set(),
    "units": set(),
    "data": set(),
    "backbone": {"masks", "metrics"},
    "api": {"calibration"},
    "catalog": {"backbone"},  # nothing in a run uses it
    "classifiers": {"metrics", "units"},
    "describe": {"backbone", "units"},
    "calibration": {"describe"},
    "passes": {"describe", "calibration"},
    "probe": {"passes", "units", "classifiers"},
    "module": {"probe"},
    "fit_steps": {"backbone"},
    "run": {"module", "units"},
    "report": {"run"},
    "loaded": {"report"},
    "callbacks": {"report", "fit_steps"},
    "trainer": {"callbacks"},
    "experiments": {"trainer"},
    "pruning": {"experiments", "api"},
    "commands": {"pruning", "data", "catalog"},  # the one room where data and module meet
    "cli": {"commands"},
    "__main__": {"cli"},
}
"""What each part may import, beside the ground floor and all that these may import themselves."""

INSIDE: dict[str, dict[str, set[str]]] = {
    "backbone": {
        "checkpoints": set(),
        "places": {"checkpoints", "pruned"},
        "pretrained": set(),
        "own_weights": {"checkpoints", "pretrained"},
        "preparation": set(),
        "weights": {"outputs", "own_weights", "places", "preparation", "pretrained", "pruned"},
        "built_size": {"preparation"},
        "gradients": set(),
        "sandbox": {"gradients"},
        "outputs": {"sandbox"},
        "heads": {"sandbox"},
        "masking": {"heads"},
        "capture": {"heads"},
        "growing": {"outputs", "masking", "capture"},
        "proofs": {"growing"},
        "pruned": {"masking"},
    },
    "metrics": {
        "arrays": set(),
        "sums": {"arrays"},
        "token_grid": {"arrays"},
        "projection": {"token_grid"},
        "class_sums": {"sums"},
        "feature_bank": {"class_sums"},
        "accuracy": {"sums"},
        "attention": {"sums", "token_grid", "projection"},
        "similarity": {"sums"},
        "spectrum": {"sums", "token_grid"},
        "importance": {"sums"},
        "features": {"accuracy"},
    },
    "classifiers": {
        "choice": set(),
        "base": set(),
        "fitted": {"base"},
        "class_mean": {"fitted", "choice"},
        "neighbours": {"fitted", "choice"},
        "head_file": {"base"},
        "fitting": {"class_mean", "neighbours"},
        "classifying": {"fitting", "head_file"},
    },
    "probe": {
        "scored_model": set(),
        "masked_model": {"scored_model"},
        "stages": {"masked_model"},
        "calibrating": {"stages"},
        "rounds": {"calibrating"},
    },
    "data": {
        "digits": set(),
        "sources": set(),
        "labels": {"sources"},
        "decode": {"sources"},
        "stream": {"decode", "labels"},
        "parts": {"stream"},
        "datamodule": {"stream", "parts"},
        "training": {"datamodule"},
    },
}
"""The same for the rooms inside of a part: what each may import of its own part."""


def reach(part: str, directly: dict[str, set[str]]) -> set[str]:
    """A part, and all that it may import directly or through others."""
    return {part}.union(*(reach(other, directly) for other in directly[part]))


def allowed(part: str) -> set[str]:
    return reach(part, DIRECTLY) | GROUND | {"__init__"}


def part_of(file: Path) -> str:
    """The sub-package or top-level module that a source file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(file: Path) -> str:
    """The folder or file inside of a part that a source file belongs to."""
    return file.relative_to(PACKAGE).parts[1].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported; `from a import b` gives `a.b`, which may be a module of a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_names(tree: ast.AST) -> list[list[str]]:
    """The dotted names of headprobe that a file imports, without `headprobe` itself."""
    return [name.split(".")[1:] for name in imported(tree) if name.split(".")[0] == "headprobe"]


def own_parts(tree: ast.AST) -> set[str]:
    """The parts of headprobe that a file imports; of its root only the version is no part."""
    return {"__init__" if name in ([], ["__version__"]) else name[0] for name in own_names(tree)}


def outside(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)} - {"headprobe"} - sys.stdlib_module_names


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that run when a module is imported: no function bodies, no type-checking blocks."""
    kept: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            kept.append(statement)
    return ast.Module(kept, [])


def keyword(call: ast.Call, name: str) -> object:
    found = next((item.value for item in call.keywords if item.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else None


def places(guilty: Callable[[ast.AST], bool]) -> list[str]:
    """Where in the package a kind of syntax stands, as file:line."""
    found = ((file, node) for file in SOURCES for node in ast.walk(tree_of(file)) if guilty(node))
    return [f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}" for file, node in found]


def test_every_part_of_the_package_has_its_place_in_the_table() -> None:
    assert {part_of(file) for file in SOURCES} <= DIRECTLY.keys() | GROUND | {"__init__"}


@pytest.mark.parametrize("part", sorted(INSIDE))
def test_every_room_has_its_place_in_the_table_of_its_part(part: str) -> None:
    rooms = {room_of(file) for file in SOURCES if part_of(file) == part}
    assert rooms - {"__init__"} <= INSIDE[part].keys()


@pytest.mark.parametrize("part", sorted(DIRECTLY))
def test_imports_point_one_way(part: str) -> None:
    wrong = {
        str(file.relative_to(ROOT)): sorted(own_parts(tree_of(file)) - allowed(part))
        for file in SOURCES
        if part_of(file) == part
    }
    assert {file: parts for file, parts in wrong.items() if parts} == {}


@pytest.mark.parametrize(("part", "room"), [(part, room) for part in sorted(INSIDE) for room in sorted(INSIDE[part])])
def test_imports_point_one_way_inside_of_a_part(part: str, room: str) -> None:
    may = reach(room, INSIDE[part])
    wrong = {
        str(file.relative_to(ROOT)): sorted({name[1] for name in own_names(tree_of(file)) if name[0] == part} - may)
        for file in SOURCES
        if part_of(file) == part and room_of(file) == room
    }
    assert {file: rooms for file, rooms in wrong.items() if rooms} == {}


def test_the_ground_floor_stands_on_itself() -> None:
    for name in GROUND:
        assert own_parts(tree_of(PACKAGE / f"{name}.py")) <= GROUND - {name}, name
    assert own_parts(tree_of(PACKAGE / "errors.py")) == set()


def test_a_folder_has_at_most_about_fifteen_files() -> None:
    folders: dict[Path, int] = {}
    for file in SOURCES:
        if file.name != "__init__.py":
            folders[file.parent] = folders.get(file.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): files for folder, files in folders.items() if files > 15} == {}


def test_the_package_has_at_most_275_files() -> None:
    # 126 when the house was built; since then local sources, model places, converting, calibration, what Python users
    # load, the page, classifiers of features comparing and pruning moved in.
    assert len([file for file in SOURCES if file.name != "__init__.py"]) <= 275


def test_the_package_itself_imports_no_room_before_a_name_is_used() -> None:
    at_once = at_import(tree_of(PACKAGE / "__init__.py"))
    assert own_parts(at_once) | outside(at_once) == set()


def test_report_knows_neither_lightning_nor_timm() -> None:
    used = {name for file in SOURCES if part_of(file) == "report" for name in outside(tree_of(file))}
    assert used & {"lightning", "pytorch_lightning", "timm"} == set()
    known = set().union(*(own_parts(tree_of(file)) for file in SOURCES if part_of(file) == "report"))
    assert not known & {"module", "probe", "passes", "describe", "backbone", "callbacks"}


@pytest.mark.parametrize("module", ["fcntl", "resource", "pwd", "grp", "termios"])
def test_nothing_that_windows_lacks_is_imported_with_a_module(module: str) -> None:
    guilty = [file for file in SOURCES if module in {name.split(".")[0] for name in imported(at_import(tree_of(file)))}]
    assert guilty == []


@pytest.mark.parametrize("part", ["masks", "metrics"])
def test_masks_and_metrics_know_neither_lightning_nor_timm(part: str) -> None:
    used = {name for file in SOURCES if part_of(file) == part for name in outside(tree_of(file))}
    assert used & {"lightning", "pytorch_lightning", "timm", "datasets"} == set()


@cache
def modules_after(*arguments: str) -> set[str]:
    """The top-level modules that a Python process has imported when it ends, by its own account."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("heavy", ["torch", "lightning", "timm", "datasets"])
def test_reading_a_mask_spec_imports_nothing_heavy(heavy: str) -> None:
    loaded = modules_after("-c", "from headprobe.masks.spec import MaskSpec; MaskSpec('each:head').expand([3, 3], '')")
    assert "headprobe" in loaded
    assert heavy not in loaded


@pytest.mark.parametrize("heavy", ["torch", "lightning", "timm", "datasets", "jsonargparse"])
def test_help_imports_nothing_heavy(heavy: str) -> None:
    loaded = modules_after("-m", "headprobe", "--help")
    assert "headprobe" in loaded
    assert heavy not in loaded


def prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def catches_everything(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    return node.type is None or bool({"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(node.type))))


def may_run_code(node: ast.AST) -> bool:
    """Loads that run what a file says: pickles, unsafe YAML, code from a hub."""
    if isinstance(node, ast.ImportFrom) and all(name.name.endswith("Error") for name in node.names):
        return False  # what `torch.load(weights_only=True)` raises is a class of pickle's
    if isinstance(node, ast.Import | ast.ImportFrom):
        loaders = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
        return bool(loaders & {name.split(".")[0] for name in imported(node)})
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return (
        (called.endswith("torch.load") and keyword(node, "weights_only") is not True)
        or keyword(node, "allow_pickle") is True
        or any(item.arg == "trust_remote_code" for item in node.keywords)
        or called in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}
    )


def test_the_package_never_prints() -> None:
    assert places(prints) == []


def test_the_package_asserts_nothing() -> None:
    assert places(lambda node: isinstance(node, ast.Assert)) == []


def test_the_package_catches_nothing_that_it_does_not_name() -> None:
    assert places(catches_everything) == []


def test_the_package_opens_nothing_that_can_run_code() -> None:
    assert places(may_run_code) == []


@pytest.mark.parametrize(
    ("guilty", "code"),
    [
        (prints, "print(1)"),
        (catches_everything, "try: 1\nexcept: 2"),
        (catches_everything, "try: 1\nexcept (OSError, Exception): 2"),
        (may_run_code, "from pickle import loads"),
        (may_run_code, "torch.load(path)"),
        (may_run_code, "numpy.load(path, allow_pickle=True)"),
        (may_run_code, "load_dataset(path, trust_remote_code=False)"),
    ],
)
def test_these_rules_notice_what_breaks_them(guilty: Callable[[ast.AST], bool], code: str) -> None:
    assert any(guilty(node) for node in ast.walk(ast.parse(code)))


def tracked_texts() -> list[tuple[str, str]]:
    """Every text file that git knows or would add, with its content."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to the project")
    texts = []
    for name in filter(None, listing.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts.append((name, content.decode("utf-8")))
    return texts


MACHINE_FOLDER = r"(?<![\w.}{*])/(?:work|home|root|Users|mnt|scratch|tmp|opt|srv)/\w"
PACKAGE_HOST = r"py" r"pi\.org|python" r"hosted|anaconda\.(?:org|com)|download\.py" r"torch|(?:extra-)?index-" r"url"


@pytest.mark.parametrize("pattern", [MACHINE_FOLDER, PACKAGE_HOST], ids=["machine folders", "package registries"])
def test_no_tracked_text_names(pattern: str) -> None:
    found = {name: match[0] for name, text in tracked_texts() if (match := re.search(pattern, text, re.IGNORECASE))}
    assert found == {}


def declared(*extras: str) -> set[str]:
    """The packages that pyproject.toml asks for, with `-`, `_` and case as in names of distributions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(item for extra in extras for item in project["optional-dependencies"][extra])]
    return {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in wanted}  # type: ignore[index]


def distributions(modules: set[str]) -> dict[str, set[str]]:
    """For every imported module the packages that bring it."""
    known = metadata.packages_distributions()
    return {module: {name.lower().replace("_", "-") for name in known.get(module, [module])} for module in modules}


def undeclared(files: list[Path], packages: set[str]) -> list[str]:
    modules = set().union(*(outside(tree_of(file)) for file in files)) - {"tests", "benchmarks"}
    return sorted(module for module, names in distributions(modules).items() if not names & packages)


def test_the_package_declares_every_package_it_imports() -> None:
    assert undeclared([file for file in SOURCES if file != BUILDER], declared()) == []


def test_the_tests_declare_every_package_they_import() -> None:
    assert undeclared([*TESTS, BUILDER], declared("test")) == []
