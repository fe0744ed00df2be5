"""`interactions.csv` follows from `masks.csv`, `masks.json` and `groups.npz`."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t
from statsmodels.stats.multitest import multipletests

from headprobe.run.games import games
from headprobe.run.interactions import interaction_rows, interactions_in_words
from headprobe.run.load import Row, RunFiles, load_files
from headprobe.run.results import write_arrays
from tests.run.small_runs import HEADS, IMAGES, keep_one_group, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    # layers first: of a set under two names, such as a layer of two heads, the first name counts
    return load_files(write_run(tmp_path_factory.mktemp("run"), ["subsets:layer", "each:pair"], ["zero", "resample:2"]))


def rows_of(run: RunFiles, **wanted: str) -> list[Row]:
    return [row for row in interaction_rows(games(run)) if all(row[name] == value for name, value in wanted.items())]


def rise(run: RunFiles, mask: object, ablation: str, column: str = "nll_rise") -> float:
    """The mean of draws, from masks.csv."""
    values = [row[column] for row in run.masks if row["mask"] == mask and row["ablation"] == ablation]
    assert values
    return float(np.mean([float(value) for value in values]))


def test_the_table_is_computed_again_from_the_files(run: RunFiles) -> None:
    again, table = interaction_rows(games(run)), run.table("interactions.csv")
    assert table is not None
    assert list(table) == list(again[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in again], err_msg=name)


def test_every_pair_within_a_layer_and_every_two_layers_have_a_row(run: RunFiles) -> None:
    found = rows_of(run, kind="pairwise", ablation="zero", quantity="nll_rise")
    pairs = {(str(row["mask_a"]), str(row["mask_b"])) for row in found}
    heads = {
        (f"head:{layer}.{one}", f"head:{layer}.{other}")
        for layer, count in enumerate(HEADS)
        for one, other in combinations(range(count), 2)
    }
    layers = {("layer:0", "layer:1"), ("layer:0", "layer:2"), ("layer:1", "layer:2")}
    assert pairs == heads | layers
    assert len(found) == len(pairs)


def test_a_row_names_its_parts_by_layer_and_head(run: RunFiles) -> None:
    found = {row["mask"]: row for row in rows_of(run, kind="pairwise", ablation="zero", quantity="nll_rise")}
    for mask, cells in (
        ("head:2.0,1", (2, 0, 2, 1)),
        ("layer:0,2", (0, None, 2, None)),
    ):
        row = found[mask]
        shown = [row[name] for name in ("layer_a", "head_a", "layer_b", "head_b")]
        assert tuple(None if value != value else value for value in shown) == cells


@pytest.mark.parametrize("quantity", ["nll_rise", "drop_pp"])
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_an_interaction_is_the_joint_rise_less_both_rises_of_masks_csv(
    run: RunFiles, ablation: str, quantity: str
) -> None:
    found = rows_of(run, kind="pairwise", ablation=ablation, quantity=quantity)
    assert found
    for row in found:
        wanted = [rise(run, row[name], ablation, quantity) for name in ("mask_a", "mask_b", "mask")]
        assert [row[f"rise_{end}"] for end in ("a", "b", "both")] == pytest.approx(wanted, abs=1e-12)
        assert row["interaction"] == pytest.approx(wanted[2] - wanted[0] - wanted[1], abs=1e-12)
        assert row["images"] == IMAGES


def test_the_interval_is_that_of_a_regression_through_groups_left_out(run: RunFiles) -> None:
    """An oracle in plain loops: the jackknife as its textbook writes it."""
    groups = run.arrays("groups.npz")
    (row,) = rows_of(run, kind="pairwise", ablation="zero", quantity="nll_rise", mask="head:2.0,1")
    places = {
        (str(mask), str(kind)): n for n, (mask, kind) in enumerate(zip(groups["mask"], groups["ablation"], strict=True))
    }
    base, both, one, other = (
        groups["nll"][places[mask, kind]]
        for mask, kind in (("none", "none"), ("head:2.0,1", "zero"), ("head:2.0", "zero"), ("head:2.1", "zero"))
    )
    there = np.flatnonzero(groups["images"])
    pseudo = []
    for group in there:
        keep = [number for number in there if number != group]
        value = (both - one - other + base)[keep].sum() / groups["images"][keep].sum()
        pseudo.append(value)
    count = len(there)
    error = np.sqrt((count - 1) / count * sum((value - np.mean(pseudo)) ** 2 for value in pseudo))
    reach = t.ppf(0.975, count - 1) * error
    assert row["interaction_low"] == pytest.approx(float(row["interaction"]) - reach)
    assert row["interaction_high"] == pytest.approx(float(row["interaction"]) + reach)
    assert row["p"] == pytest.approx(2 * t.sf(abs(float(row["interaction"])) / error, count - 1))


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_out_0_and_q_is_benjamini_and_hochbergs(
    run: RunFiles,
) -> None:
    for kind in ("pairwise", "shapley"):
        for ablation in ("zero", "resample"):
            found = rows_of(run, kind=kind, ablation=ablation, quantity="nll_rise")
            p = [float(row["p"]) for row in found]
            outside = [float(row["interaction_low"]) > 0 or float(row["interaction_high"]) < 0 for row in found]
            assert [value < 0.05 for value in p] == outside
            np.testing.assert_allclose([float(row["bh_q"]) for row in found], multipletests(p, method="fdr_bh")[1])


def test_shapley_interactions_are_those_of_all_sets_of_layers(run: RunFiles) -> None:
    found = rows_of(run, kind="shapley", ablation="zero", quantity="nll_rise")
    assert [(row["layer_a"], row["layer_b"]) for row in found] == [(0, 1), (0, 2), (1, 2)]
    value = {
        frozenset(layers): rise(run, "layer:" + spec, "zero")
        for layers, spec in (
            ([0], "0"),
            ([1], "1"),
            ([2], "2"),
            ([0, 1], "0,1"),
            ([0, 2], "0,2"),
            ([1, 2], "1,2"),
            ([0, 1, 2], "0-2"),
        )
    }
    value[frozenset()] = 0.0
    for row in found:
        one, other = int(row["layer_a"]), int(row["layer_b"])
        (third,) = {0, 1, 2} - {one, other}
        each = [
            value[rest | {one, other}] - value[rest | {one}] - value[rest | {other}] + value[rest]
            for rest in (frozenset[int](), frozenset({third}))
        ]
        assert row["interaction"] == pytest.approx(np.mean(each))


def test_masks_asked_for_by_themselves_are_parts_of_one_that_holds_them(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["index:0", "index:1", "index:0,1", "random:0-3/3:1"]))
    (row, _) = interaction_rows(games(run))
    assert [row[name] for name in ("mask", "mask_a", "mask_b")] == ["index:0,1", "index:0", "index:1"]
    assert np.isnan([float(row[name]) for name in ("layer_a", "head_a", "layer_b", "head_b")]).all()


def test_without_pairs_there_is_no_table(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path / "a", ["each:head", "each:layer"]))
    # a layer of two heads is the pair of its heads: these are all that there is
    assert {row["mask"] for row in interaction_rows(games(run))} == {"layer:0", "layer:1"}
    alone = load_files(write_run(tmp_path / "b", ["each:head"]))
    assert interaction_rows(games(alone)) == []
    assert alone.table("interactions.csv") is None
    assert interactions_in_words([]) == ""


def test_runs_of_before_without_groups_have_none(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:pair"])
    (tmp_path / "groups.npz").unlink()
    assert games(load_files(tmp_path)) == []


def test_a_head_without_effect_has_an_interaction_of_0_with_p_1_and_no_interval(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:pair"]))
    groups = run.arrays("groups.npz")
    names = groups["mask"].tolist()
    for name in ("nll", "top1_count"):  # head 0.1 changes nothing, alone or beside 0.0
        groups[name][names.index("head:0.1")] = groups[name][0]
        groups[name][names.index("head:0.0,1")] = groups[name][names.index("head:0.0")]
    write_arrays(tmp_path / "groups.npz", groups)
    (row, _) = [row for row in interaction_rows(games(load_files(tmp_path))) if row["mask"] == "head:0.0,1"]
    assert (row["interaction"], row["p"]) == (0, 1)
    assert np.isnan([float(row["interaction_low"]), float(row["interaction_high"])]).all()


def test_one_image_has_interactions_without_intervals(tmp_path: Path) -> None:
    keep_one_group(write_run(tmp_path, ["each:pair", "subsets:layer"]))
    rows = interaction_rows(games(load_files(tmp_path)))
    assert rows
    for row in rows:
        assert np.isfinite(float(row["interaction"]))
        assert np.isnan(float(row["interaction_low"]))


def test_an_infinite_nll_leaves_its_interactions_empty_and_others_whole(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:pair"]))
    groups = run.arrays("groups.npz")
    groups["nll"][groups["mask"].tolist().index("head:0.0"), np.flatnonzero(groups["images"])[0]] = np.inf
    write_arrays(tmp_path / "groups.npz", groups)
    for row in interaction_rows(games(load_files(tmp_path))):
        broken = "head:0.0" in (row["mask_a"], row["mask_b"]) and row["quantity"] == "nll_rise"
        assert np.isnan(float(row["interaction_low"])) == broken


def test_one_line_says_how_many_pairs_interact(run: RunFiles) -> None:
    line = interactions_in_words(interaction_rows(games(run)))
    assert line.startswith("interactions.csv: 8 pairs of heads or other parts; ")
    assert "under zero" in line
    assert "under resample" in line
