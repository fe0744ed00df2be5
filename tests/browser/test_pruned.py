"""The smaller model on the page, in a real browser: drawn offline and read by everyone, at any width; what it says."""

import csv
import io
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from headprobe.report.page.build import write_page
from headprobe.run.load import load_files
from tests.browser.conftest import Open
from tests.browser.test_page import OUTSIDE, OVER, undrawn, violations
from tests.browser.test_using import saved
from tests.report.page.made_runs import write_chosen, write_fast


@pytest.fixture(scope="session")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two pruned runs side by side: a set that was chosen by what it keeps, and one by its speed."""
    folder = tmp_path_factory.mktemp("smaller")
    runs = [write_chosen(folder / "chosen"), write_fast(folder / "fast")]
    return write_page([load_files(run) for run in runs], folder / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_offline_as_wide_as_the_screen_and_axe_finds_nothing_wrong(
    smaller: Path, width: int, dark: bool, opened: Open
) -> None:
    one = opened(smaller, width=width, dark=dark)  # a message on the console fails
    asked = [address for address in one.requests if not address.startswith(("data:", "blob:"))]
    assert asked == [smaller.resolve().as_uri()]
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    assert one.page.locator("#pruned svg[aria-label]").count() == 4
    for wrong in (undrawn(one.page), one.page.evaluate(OUTSIDE), one.page.evaluate(OVER)):
        assert wrong == []
    assert violations(one.page, "#pruned") == []


def test_its_marks_and_texts_hold_the_numbers_of_the_files(smaller: Path, opened: Open) -> None:
    page = opened(smaller).page
    marks = page.locator("#pruned path.dot[role]").evaluate_all("all => all.map((one) => one.ariaLabel)")
    assert len(marks) == (7 + 2) + (1 + 2 + 2)  # sets and speeds of both runs
    written = [mark for mark in marks if "the model that was written" in mark]
    assert len(written) == page.locator("#pruned svg[aria-label] path.dot[fill=none]").count() == 6
    assert sum("behind the first that failed" in mark for mark in marks) == 2
    # medians of 4, 6, 5 ms by 2, 6, 4 ms, pair by pair
    speed = "1.25 times as fast, pairs from 1.00 to 2.00"
    times = "5.00 to 4.00 ms, medians of 3 pairs, each timing the mean of 3 passes"
    assert f"3 of 7 heads removed, batch 1: the model that was written, {speed}, {times}" in marks
    shown = page.locator("#pruned").inner_text()
    for text in ("allowed: 6 points", "asked for: 1.2 at batch 64", "weight and bias, refitted", "fitted on 30 images"):
        assert text in shown


def test_its_figure_and_numbers_are_saved(smaller: Path, opened: Open) -> None:
    page = opened(smaller).page
    drawn = ET.fromstring(saved(page, "pruned", "SVG"))
    assert sum(one.tag.endswith("path") for one in drawn.iter()) > 14
    assert all("NaN" not in value and "var(" not in value for one in drawn.iter() for value in one.attrib.values())
    table = list(csv.DictReader(io.StringIO(saved(page, "pruned", "CSV").decode())))
    assert sum(row["speed"] != "" for row in table) == 6
    assert sum(row["limit_pp"] != "" for row in table) == 7
