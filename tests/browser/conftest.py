"""A real browser, and pages to open in it: Debian's chromium by playwright, which downloads nothing of its own."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headprobe.callbacks.derived import write_derived
from headprobe.report.page.build import write_page
from headprobe.run.load import load_files, read_files
from headprobe.run.results import write_rows
from tests.report.page.answer_oracle import lines
from tests.report.page.made_runs import write_examples, write_whole_run

RAGGED, MANY = (2, 2, 3), (12,) * 12
HALF: dict[str, Any] = {"calibration": "0f", "calibration_images": 31}
EVERYTHING = ("each:head", "each:layer", "each:index", "each:pair", "grow:random:0-9", "one-per-layer:0-98")
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" </script> مرحبا \u202eabc 🦜 {{ 7 * 7 }}"
"""Text that must be shown as it is, in the place of any name."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; without one the tests are skipped, and say what is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[test]"
    )
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in a context of its own, and all that it asked for and said."""

    page: Any
    session: Any
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def seconds(self) -> float:
        """Seconds of a processor that the page took so far: other work on the machine does not count."""
        found = {one["name"]: one["value"] for one in self.session.send("Performance.getMetrics")["metrics"]}
        return float(found["ThreadTime"])

    def dismiss(self, dialog: Any) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()


Open = Callable[..., Opened]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Open a file without a network; a test that leaves a console message, an error or a dialog behind fails."""
    contexts: list[Any] = []
    found: list[Opened] = []

    def open_file(file: Path, address: str = "", width: int = 1280, dark: bool = False, drawn: bool = True) -> Opened:
        scheme, size = "dark" if dark else "light", {"width": width, "height": 844 if width < 800 else 800}
        context = chromium.new_context(offline=True, viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        one = Opened(page, context.new_cdp_session(page))
        one.session.send("Performance.enable")
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.on("console", lambda message: one.said.append(f"{message.type}: {message.text}"))
        one.page.on("pageerror", lambda error: one.said.append(f"error: {error}"))
        one.page.on("dialog", one.dismiss)
        one.page.goto(file.resolve().as_uri() + address, wait_until="load" if drawn else "commit")
        # wait_for_function would evaluate a text, which the page forbids.
        if drawn:
            one.page.wait_for_selector("html[data-ready=yes]")
        found.append(one)
        return one

    yield open_file
    for context in contexts:
        context.close()
    assert [text for one in found for text in one.said] == []


# -- runs and their pages --


def write_rich_run(folder: Path, heads: tuple[int, ...] = RAGGED, specs: tuple[str, ...] = EVERYTHING) -> Path:
    """Write a run with every file that a page reads, scored orders among them."""
    with pytest.MonkeyPatch.context() as patch:
        earlier = write_whole_run(folder / "earlier", patch, heads, ("each:head",), ("zero",))
        step = max(1, sum(heads) // 12)
        orders = [f"grow:{earlier}:{name}:least:{step}-{sum(heads)}/{step}" for name in ("gradient_abs", "stable_rank")]
        run = write_whole_run(folder / "run", patch, heads, (*specs, *orders), ("zero", "mean", "linear"), **HALF)
    for _ in write_derived(read_files(run)):  # once more, now that scores are there
        pass
    return run


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything, of a model with layers of unlike numbers of heads."""
    return write_rich_run(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="session")
def rich_page(rich: Path) -> Path:
    return write_page([load_files(rich)], rich / "report.html")


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 144 heads in 12 layers."""
    specs = ("each:head", "each:layer", "each:index", "random:12-144/12:0-9", "one-per-layer:0-98")
    run = write_rich_run(tmp_path_factory.mktemp("many"), MANY, specs)
    return write_page([load_files(run)], run / "report.html")


@pytest.fixture(scope="session")
def two_runs(rich: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs side by side, of models with other heads."""
    with pytest.MonkeyPatch.context() as patch:
        other = write_whole_run(tmp_path_factory.mktemp("other"), patch, (3, 3, 6), model=model_of("swin", (3, 3, 6)))
    return write_page([load_files(rich), load_files(other)], other / "report.html")


def model_of(name: str, heads: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "weights": None, "pretrained": False, "heads_per_layer": list(heads)}


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without labels, with everything that such a run has."""
    specs = ("each:head", "each:layer", "each:index", "each:pair", "grow:random:0-9", "one-per-layer:0-98")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("unlabelled")
        run = write_whole_run(folder, patch, RAGGED, specs, ("zero", "mean"), labelled=False, **HALF)
    for _ in write_derived(read_files(run)):  # once more, now that scores are there
        pass
    return run


@pytest.fixture(scope="session")
def unlabelled_page(unlabelled: Path) -> Path:
    return write_page([load_files(unlabelled)], unlabelled / "report.html")


@pytest.fixture(scope="session")
def one_mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with a single mask, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        folder = write_whole_run(tmp_path_factory.mktemp("one"), patch, specs=("layer:1",), ablations=("zero",))
    for name in ("scores.csv", "heads.csv", "similarity.npz", "spectrum.csv", "offset_maps.npz", "examples.npz"):
        (folder / name).unlink()
    return write_page([load_files(folder)], folder / "report.html")


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which one layer's mask and half of an order break the model: their NLL is no number."""
    folder = write_rich_run(tmp_path_factory.mktemp("broken"))
    none = {"nll": "", "nll_rise": "", "nll_rise_low": "", "nll_rise_high": ""}
    for name in ("masks.csv", "curves.csv"):
        rows = lines(folder, name)
        gone = [row.get("mask") == "layer:1" or int(row.get("heads_removed", 0)) > 3 for row in rows]
        write_rows(folder / name, [row | none if one else row for row, one in zip(rows, gone, strict=True)])
    return write_page([load_files(folder)], folder / "report.html")


@pytest.fixture(scope="session")
def enormous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose losses are of the size of 1e29 nats."""
    folder = write_rich_run(tmp_path_factory.mktemp("enormous"))
    for name in ("masks.csv", "curves.csv", "interactions.csv", "shapley.csv"):
        rows = lines(folder, name)
        write_rows(folder / name, [{column: _times(cell, column) for column, cell in row.items()} for row in rows])
    return write_page([load_files(folder)], folder / "report.html")


def _times(cell: str, column: str) -> str:
    of_losses = ("nll", "interaction", "value", "rise_")
    return f"{float(cell) * 1e29!r}" if cell and column.startswith(of_losses) else cell


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which model, data, classes, paths, notices and the command are hostile text."""
    folder = tmp_path_factory.mktemp("hostile")
    record: dict[str, Any] = {
        "model": model_of(HOSTILE, RAGGED),
        "data": {"path": HOSTILE, "split": HOSTILE},
        "command": HOSTILE,
        "decisions": {"order of heads": HOSTILE, "split": HOSTILE},
        "undefined": {HOSTILE: {HOSTILE: [0]}},
        "versions": {"python": HOSTILE},
    }
    with pytest.MonkeyPatch.context() as patch:
        write_whole_run(folder, patch, RAGGED, **record)
    write_examples(folder, RAGGED, name=HOSTILE)
    return write_page([load_files(folder)], folder / "report.html")
