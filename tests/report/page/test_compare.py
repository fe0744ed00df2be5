"""The section of two runs against each other: its numbers are those of the tables, and it is left out where it must."""

from pathlib import Path
from typing import Any

import pytest

from headprobe.report.page.build import build
from headprobe.report.page.encode import plain
from headprobe.report.page.sections.compare import compare
from headprobe.run.comparison.names import names_of_runs
from headprobe.run.comparison.tables import mask_rows, pairs_of
from headprobe.run.load import RunFiles, load_files
from tests.run.small_runs import write_run

SPECS = ("each:head", "each:layer", "grow:random:0", "one-per-layer:0-4")


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFiles]:
    paths = [write_run(tmp_path / f"run_{seed}", SPECS, ("zero", "mean"), seed=seed) for seed in range(3)]
    return [load_files(path) for path in paths]


def decoded(column: Any) -> list[Any]:
    return column if isinstance(column, list) else [column["of"][place] for place in column["at"]]


def test_every_pair_has_the_numbers_of_its_table(runs: list[RunFiles]) -> None:
    section = compare(runs)
    assert section is not None
    data = plain(section.data)
    assert [(pair["a"], pair["b"]) for pair in data["pairs"]] == [
        ("run_0", "run_1"),
        ("run_0", "run_2"),
        ("run_1", "run_2"),
    ]
    for shown, pair in zip(data["pairs"], pairs_of(runs, names_of_runs(runs)), strict=True):
        assert [family["family"] for family in shown["families"]] == ["each:head", "each:layer"]
        assert shown["first"] == "each:head"
        columns = {name: decoded(values) for name, values in shown["rows"].items()}
        keys = list(zip(*(columns[name] for name in ("mask", "ablation", "quantity")), strict=True))
        wanted = {(row["mask"], row["ablation"], row["quantity"]): row for row in mask_rows(pair)}
        assert len(keys) == 2 * 4 * 10
        for place, key in enumerate(keys):
            for name in ("value_a", "value_b", "b_minus_a", "b_minus_a_low", "p"):
                assert columns[name][place] == pytest.approx(wanted[key][name], rel=1e-3, abs=1e-12), (key, name)


def test_a_run_alone_or_of_other_heads_has_none(runs: list[RunFiles], tmp_path: Path) -> None:
    assert compare(runs[:1]) is None
    other = {"name": "other", "heads_per_layer": [4, 3]}
    assert compare([runs[0], load_files(write_run(tmp_path / "other", SPECS, model=other))]) is None


def test_a_run_that_fits_none_of_the_others_is_named(runs: list[RunFiles], tmp_path: Path) -> None:
    other = load_files(write_run(tmp_path / "other", ("index:0",)))
    few = load_files(write_run(tmp_path / "few", ("layer:0",), ("zero",)))
    section = compare([*runs[:2], other, few])
    assert section is not None
    assert len(section.data["pairs"]) == 1
    refused = "\n".join(section.data["refused"])
    assert "run_0 and other are not compared: these runs cannot be compared, they have other masks" in refused
    assert "run_1 and few share no form of 3 to 200 masks." in refused


def test_the_page_of_two_runs_has_it_and_the_page_of_one_has_not(runs: list[RunFiles]) -> None:
    assert 'id="compare"' in build(runs[:2])
    assert 'id="compare"' not in build(runs[:1])
