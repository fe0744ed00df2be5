"""What a reader does with the page: keys, clicks, the slider, addresses, saved files."""

import csv
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from headprobe.report.page.build import write_page
from headprobe.run.load import load_files
from headprobe.run.results import write_rows
from tests.browser.conftest import Open
from tests.report.page.answer_oracle import lines

FOCUSED = "document.activeElement.getAttribute('data-head')"


def focus_the_map(page: Any) -> None:
    """Press Tab until the map has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('button.cell')"):
            return
    pytest.fail("Tab never reached the map")


def test_keys_lead_from_the_map_to_a_card_and_back(rich_page: Path, opened: Open) -> None:
    page = opened(rich_page).page
    focus_the_map(page)
    assert page.evaluate(FOCUSED) == "0.0"
    for key, head in (
        ("ArrowDown", "1.0"),
        ("ArrowDown", "2.0"),
        ("End", "2.2"),
        ("ArrowUp", "1.1"),
        ("ArrowLeft", "1.0"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(FOCUSED) == head
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card[open]")
    assert page.evaluate("document.activeElement.closest('#card') !== null")
    assert page.evaluate("location.hash") == "#head=1.1"
    page.keyboard.press("Escape")
    page.wait_for_selector("#card:not([open])", state="attached")
    assert page.evaluate(FOCUSED) == "1.1"
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('button.cell')")  # one stop in all


MARKS = """() => [...document.querySelectorAll("main section.figure")].map((section) => [
    section.id,
    section.querySelectorAll("[data-head].selected").length,
    section.querySelectorAll("[data-head]").length,
])"""
"""Of each figure, how many of its marks of heads are highlighted, and how many there are."""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_opens_the_card_and_highlights_the_head_in_every_figure(
    rich_page: Path, width: int, opened: Open
) -> None:
    page = opened(rich_page, width=width).page
    page.locator('button.cell[data-head="2.1"]').click()
    page.wait_for_selector("#card[open]")
    assert (
        "2.1" in page.locator("#card-title").inner_text()
        or "layer 2" in page.locator("#card-title").inner_text().lower()
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    marks = page.evaluate(MARKS)
    assert {name for name, selected, there in marks if there and not selected} == set()
    assert sum(selected > 0 for _, selected, _ in marks) >= 3
    assert page.evaluate("document.querySelectorAll('button.cell.faded').length") == 6
    page.go_back()
    page.wait_for_selector("#card:not([open])", state="attached")


def test_an_address_opens_the_card_of_its_head(rich_page: Path, opened: Open) -> None:
    page = opened(rich_page, "#head=2.2").page
    page.wait_for_selector("#card[open]")
    (row,) = (
        row for row in lines(rich_page.parent, "masks.csv") if (row["mask"], row["ablation"]) == ("head:2.2", "zero")
    )
    low, high = float(row["drop_low_pp"]), float(row["drop_high_pp"])
    text = page.locator("#card").inner_text().replace("\N{MINUS SIGN}", "-")
    assert f"95% interval {low:.3g} to {high:.3g}" in text
    page.keyboard.press("Escape")
    page.wait_for_selector("#card:not([open])", state="attached")


@pytest.mark.parametrize("width", [1280, 390])
def test_escape_closes_a_card_and_stays_on_the_page(rich_page: Path, width: int, opened: Open) -> None:
    page = opened(rich_page, width=width).page
    for head in ("0.1", "2.1"):
        page.locator(f'button.cell[data-head="{head}"]').click()
        page.wait_for_selector("#card[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#card:not([open])", state="attached")
        page.wait_for_timeout(150)  # a second step back would leave the page
        assert page.evaluate("location.protocol") == "file:"
        assert page.evaluate("location.hash") == ""
        assert page.evaluate(FOCUSED) == head


def test_a_head_differs_below_a_q_of_5_percent_and_not_at_it(rich: Path, tmp_path: Path, opened: Open) -> None:
    for file in rich.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    q = {"head:0.0": "0.05", "head:0.1": "0.0499"}
    rows = lines(rich, "masks.csv")
    changed = [row | {"bh_q": q.get(row["mask"], "0.5")} if row["mask"].startswith("head:") else row for row in rows]
    write_rows(tmp_path / "masks.csv", changed)
    page = opened(write_page([load_files(tmp_path)], tmp_path / "page.html")).page
    page.select_option("#column", "drop_pp_zero")
    marked = page.evaluate("[...document.querySelectorAll('button.cell.differs')].map((one) => one.dataset.head)")
    assert marked == ["0.1"]
    for head, differs in (("0.0", False), ("0.1", True)):
        page.evaluate(f"headprobe.page.open('{head}')")
        page.wait_for_selector(f"#card-title:has-text('head {head[-1]}')")
        text = page.locator("#card .costs li", has_text="Top-1 drop, zero").inner_text()
        assert ("also corrected for the number of heads" in text) == differs


@pytest.mark.parametrize("address", ["#head=9.9", "#head=", "#head=<b>", "#nowhere", "#head=0.0&run=7"])
def test_an_address_of_no_head_opens_no_card(address: str, rich_page: Path, opened: Open) -> None:
    page = opened(rich_page, address).page
    assert page.locator("#card[open]").count() == 0


def test_the_slider_shows_what_the_files_hold(rich: Path, rich_page: Path, opened: Open) -> None:
    page = opened(rich_page).page
    ladder = page.locator("#ladder")
    order = ladder.locator("select").first.input_value()
    kind = ladder.locator('.segments button[aria-pressed="true"]').get_attribute("data-value")
    points = [row for row in lines(rich, "curves.csv") if (row["order"], row["ablation"]) == (order, kind)]
    assert points
    points.sort(key=lambda row: int(row["heads_removed"]))
    slider = ladder.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert "0 of 7 heads" in ladder.inner_text()
    for row in points:
        page.keyboard.press("ArrowRight")
        text = ladder.inner_text().replace("\N{MINUS SIGN}", "-")
        assert f"{row['heads_removed']} of 7 heads" in text
        assert f"{100 * float(row['top1']):.1f}%" in text
        taken = page.evaluate("document.querySelectorAll('button.cell.selected').length")
        assert taken == int(row["heads_removed"])


def saved(page: Any, section: str, kind: str) -> bytes:
    """Press a figure's button, and return the file."""
    with page.expect_download() as download:
        page.locator(f"#{section} .tools button", has_text=kind).click()
    assert download.value.suggested_filename == f"headprobe-{section}.{kind.lower()}"
    return Path(download.value.path()).read_bytes()


SECTIONS = (
    *("heads", "curves", "ladder", "layers", "indices", "similarity"),
    *("attention", "spectra", "importance", "worth", "ablations"),
)


def test_the_page_of_a_whole_study_has_every_figure(rich_page: Path, opened: Open) -> None:
    found = opened(rich_page).page.evaluate(
        "[...document.querySelectorAll('.tools')].map((one) => one.closest('section').id)"
    )
    assert tuple(found) == SECTIONS


@pytest.mark.parametrize("sections", [SECTIONS[:4], SECTIONS[4:8], SECTIONS[8:]], ids=lambda one: one[0])
def test_figures_are_saved_as_svg_and_csv(sections: tuple[str, ...], rich_page: Path, opened: Open) -> None:
    page = opened(rich_page).page  # chromium asks before a page saves more than ten files
    for section in sections:
        drawn = ET.fromstring(saved(page, section, "SVG"))
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg", section
        assert min(float(drawn.get(side, "0")) for side in ("width", "height")) > 100
        marks = [one for one in drawn.iter() if one.tag.rpartition("}")[2] in MARKED]
        assert len(marks) > 5, section
        assert all("var(" not in value and "NaN" not in value for one in drawn.iter() for value in one.attrib.values())
        table = list(csv.DictReader(io.StringIO(saved(page, section, "CSV").decode())))
        assert table, section
        assert None not in {name for row in table for name in row}


MARKED = {"rect", "path", "circle", "line", "polygon"}


def test_a_figure_is_saved_as_png(rich_page: Path, opened: Open) -> None:
    with Image.open(io.BytesIO(saved(opened(rich_page).page, "curves", "PNG"))) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 5


def test_the_saved_table_of_heads_holds_the_numbers_of_the_files(rich: Path, rich_page: Path, opened: Open) -> None:
    table = list(csv.DictReader(io.StringIO(saved(opened(rich_page).page, "heads", "CSV").decode())))
    masks = {(row["mask"], row["ablation"]): row for row in lines(rich, "masks.csv")}
    sources = [lines(rich, name) for name in ("scores.csv", "heads.csv")]
    by_head: dict[tuple[str, str], dict[str, str]] = {(row["layer"], row["head"]): {} for row in table}
    for row in (one for source in sources for one in source):
        by_head[row["layer"], row["head"]] |= row
    compared = 0
    for row in table:
        mask = f"head:{row['layer']}.{row['head']}"
        for ablation in ("zero", "mean", "linear"):
            own = masks[mask, ablation]
            for column in ("drop_pp", "nll_rise"):
                assert float(row[f"{column}_{ablation}"]) == pytest.approx(float(own[column]), rel=1e-4, abs=1e-12)
                compared += 1
        for column, text in by_head[row["layer"], row["head"]].items():
            if column in row and column not in ("mask", "layer", "head", "images") and text:
                assert float(row[column]) == pytest.approx(float(text), rel=1e-4, abs=1e-12)
                compared += 1
    assert compared > 7 * 20
