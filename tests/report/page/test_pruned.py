"""The section of a model that was pruned: its numbers are those of the files, and it is left out where none was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headprobe.errors import RunError, UsageError
from headprobe.report.page.build import build
from headprobe.report.page.sections.pruned import pruned
from headprobe.run.load import load_files
from tests.report.page.made_runs import write_chosen, write_fast, write_made
from tests.report.page.page_oracle import check_page
from tests.report.page.test_sections import anchors
from tests.run.small_runs import write_run


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A run of one mask, whose heads are gone: those of a whole layer, and one of another."""
    return write_made(write_run(tmp_path / "one", ["layer:1+head:2.0"]), {"1": [0, 1], "2": [0]})


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    return write_chosen(tmp_path / "chosen")


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    return write_fast(tmp_path / "fast")


def test_the_numbers_of_a_pruned_run_are_those_of_its_files(one: Path, chosen: Path, fast: Path) -> None:
    for folder in (one, chosen, fast):
        assert "pruned" in check_page(folder)
    assert "pruned" in check_page(one, chosen, fast)


def data_of(folder: Path) -> dict[str, Any]:
    section = pruned([load_files(folder)])
    assert section is not None
    found: Sequence[dict[str, Any]] = section.data["runs"]
    return found[0]


def test_each_layer_says_what_stands_for_its_heads(one: Path, chosen: Path, fast: Path) -> None:
    assert data_of(one)["folded"] == ["", "the layer is a bias", "nothing folded"]
    assert data_of(fast)["folded"] == ["weight and bias", "", "weight and bias, refitted"]


def test_the_chosen_set_and_those_behind_the_first_that_failed_are_marked(chosen: Path) -> None:
    sets = data_of(chosen)["sets"]
    assert list(sets["heads"]) == [1, 2, 3, 4, 5, 6, 7]
    assert list(sets["chosen"]) == [0, 0, 1, 0, 0, 0, 0]
    assert list(sets["tested"]) == [1, 1, 1, 1, 1, 0, 0]


def test_its_link_leads_to_a_heading_of_the_docs(one: Path) -> None:
    section = pruned([load_files(one)])
    assert section is not None
    document, _, anchor = section.link.partition("#")
    assert anchor in set(anchors(Path(__file__).parents[3] / "docs" / document))


def test_it_is_left_out_where_nothing_was_pruned(tmp_path: Path, one: Path) -> None:
    other = load_files(write_run(tmp_path / "other", ["layer:1"]))
    assert pruned([other]) is None
    assert 'id="pruned"' not in build([other])
    section = pruned([other, load_files(one)])
    assert section is not None
    assert section.data["runs"][0] is None


def test_a_file_that_is_cut_off_or_newer_is_refused_with_its_name(one: Path) -> None:
    file = one / "pruned.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(RunError, match=r"pruned\.json cannot be read"):
        pruned([load_files(one)])
    file.write_text(json.dumps({**json.loads(text), "schema": 99}))
    with pytest.raises(UsageError, match=r"pruned\.json has schema 99"):
        pruned([load_files(one)])
