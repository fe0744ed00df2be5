"""`index_null.csv`: p-values against a permutation that is simulated, draws found by the layers of the index."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.metrics.accuracy.paired_tests import bh_q
from headprobe.run.index_null import lacking, null_rows, nulls_of, p_of_draws, percentile, smallest_p
from headprobe.run.load import Row, RunFiles, load_files, read_files
from headprobe.run.results import write_masks, write_rows
from tests.run.small_runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return load_files(write_run(tmp_path, ["each:index", "one-per-layer:0-98", "one-per-layer:0-30:2"]))


def row_of(run: RunFiles, mask: str, quantity: str = "nll_rise", ablation: str = "zero") -> Row:
    key = (mask, ablation, quantity)
    (row,) = [row for row in null_rows(run) if (row["mask"], row["ablation"], row["quantity"]) == key]
    return row


def test_the_table_is_computed_again_from_the_files(run: RunFiles) -> None:
    table = run.table("index_null.csv")
    assert table is not None
    again = null_rows(run)
    assert list(table) == list(again[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in again], err_msg=name)


def test_an_index_is_beside_the_draws_of_exactly_its_layers(run: RunFiles) -> None:
    assert {null.mask: (null.layers, len(null.draws["nll_rise"])) for null in nulls_of(run)} == {
        "index:0": ("0-2", 99),
        "index:1": ("0-2", 99),
        "index:2": ("2", 31),
    }


def test_the_cells_follow_from_masks_csv(run: RunFiles) -> None:
    shared: dict[frozenset[tuple[int, int]], float] = {}  # masks of the same heads have the first one's value
    for row in run.masks[1:]:
        shared.setdefault(frozenset(run.heads[str(row["mask"])]), float(row["nll_rise"]))
    own = shared[frozenset(run.heads["index:1"])]
    draws = np.array([shared[frozenset(run.heads[f"one-per-layer:{seed}"])] for seed in range(99)])
    row = row_of(run, "index:1")
    assert row["value"] == own
    assert row["percentile"] == pytest.approx(stats.percentileofscore(draws, own, "mean"))
    wanted = [draws.mean(), *np.quantile(draws, [0.025, 0.975])]
    assert [row[f"draws_{name}"] for name in ("mean", "low", "high")] == pytest.approx(wanted)
    assert (row["draws"], row["p"], row["p_smallest"]) == (99, p_of_draws(own, draws), 0.02)


def test_too_few_draws_have_no_p_and_the_remedy_is_named(run: RunFiles) -> None:
    row = row_of(run, "index:2")
    assert row["draws"] == 31
    assert np.isnan([float(row["p"]), float(row["bh_q"])]).all()
    assert np.isfinite(float(row["percentile"]))
    assert lacking(null_rows(run), 3) == ["one-per-layer:0-98:2"]
    few = [{**row, "draws": 98, "layers": "0-2"} for row in null_rows(run)[:1]]
    assert lacking(few, 3) == ["one-per-layer:0-98"]


def test_an_index_without_a_draw_is_listed(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:index", "one-per-layer:0-98"]))
    row = row_of(run, "index:2")
    assert row["draws"] == 0
    assert np.isnan([float(row[name]) for name in ("draws_mean", "percentile", "p", "p_smallest", "bh_q")]).all()


def test_q_is_taken_over_the_indices_that_have_a_p(run: RunFiles) -> None:
    for quantity in ("drop_pp", "nll_rise"):
        rows = [row_of(run, mask, quantity) for mask in ("index:0", "index:1")]
        assert [row["bh_q"] for row in rows] == pytest.approx(bh_q([float(row["p"]) for row in rows]).tolist())


@pytest.mark.parametrize(
    "specs", [["each:index"], ["one-per-layer:0-98"], ["index:0-1", "one-per-layer:0-98"], ["none"]]
)
def test_without_indices_and_draws_there_is_no_table(tmp_path: Path, specs: list[str]) -> None:
    assert null_rows(load_files(write_run(tmp_path, specs))) == []


def test_a_seed_that_is_named_twice_is_one_draw(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["index:0", "one-per-layer:0-9", "one-per-layer:5-14:0-2"]))
    assert row_of(run, "index:0")["draws"] == 15


def test_each_ablation_is_by_itself_and_draws_of_it_count_with_their_mean(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:index", "one-per-layer:0-98"], ["zero", "resample:2"]))
    rises = [float(row["nll_rise"]) for row in run.masks if (row["mask"], row["ablation"]) == ("index:1", "resample")]
    assert row_of(run, "index:1", ablation="resample")["value"] == pytest.approx(np.mean(rises))
    assert row_of(run, "index:1", ablation="resample")["value"] != row_of(run, "index:1")["value"]


def test_heads_of_swin_have_nulls_by_their_sets_of_layers(tmp_path: Path) -> None:
    specs = [MaskSpec(text) for text in ("each:index", "one-per-layer:0-98", "one-per-layer:0-98:2-3")]
    variants = expand_all(specs, [3, 3, 6, 6], "swin")
    run = read_files(write_run(tmp_path, ["none"]))
    baseline = run.masks[0]
    rng = np.random.default_rng(0)
    rows = [baseline] + [
        {**baseline, "mask": one.mask.name, "ablation": "zero", "nll_rise": float(rng.normal())} for one in variants
    ]
    write_rows(tmp_path / "masks.csv", rows)
    write_masks(tmp_path / "masks.json", variants)
    found = nulls_of(read_files(tmp_path))
    assert [(null.mask, null.layers) for null in found[2:4]] == [("index:2", "0-3"), ("index:3", "2,3")]
    assert [len(null.draws["nll_rise"]) for null in found] == [99] * 6


# -- the p --


@pytest.mark.parametrize("draws", [99, 100, 199])
def test_beyond_all_draws_the_p_is_the_smallest(draws: int) -> None:
    values = np.random.default_rng(0).normal(size=draws)
    for value in (-9.0, 9.0):
        assert p_of_draws(value, values) == pytest.approx(smallest_p(draws)) == pytest.approx(2 / (draws + 1))


def test_the_p_is_twice_the_smaller_tail() -> None:
    draws = np.arange(1.0, 100)
    for value in (0.5, 3.5, 20.5, 80.5, 99.5):
        tail = 1 + min((draws < value).sum(), (draws > value).sum())
        assert p_of_draws(value, draws) == pytest.approx(2 * tail / 100)
    assert p_of_draws(50.0, draws) == 1
    assert p_of_draws(float("nan"), draws) != p_of_draws(float("nan"), draws)


def test_values_that_are_all_equal_are_nothing_unusual() -> None:
    assert p_of_draws(2.0, np.full(99, 2.0)) == 1
    assert percentile(2.0, np.full(99, 2.0)) == 50


@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "whole numbers"])
def test_an_index_that_nothing_sets_apart_is_called_so_at_most_at_the_rate(alpha: float, kind: str) -> None:
    rng = np.random.default_rng(3)
    values = {
        "normal": rng.normal(size=(3000, 100)),
        "lognormal": rng.lognormal(0, 1.5, (3000, 100)),
        "whole numbers": rng.poisson(1.5, (3000, 100)).astype(np.float64),
    }[kind]
    found = np.array([p_of_draws(row[0], row[1:]) for row in values])
    assert (found <= alpha).mean() <= alpha + 0.011
    if kind != "whole numbers":  # and as often as steps of 0.02 allow
        assert (found <= alpha).mean() >= alpha // 0.02 * 0.02 - 0.011


def test_heads_permuted_within_layers_give_false_alarms_at_most_at_the_rate_over_all_indices() -> None:
    """The indices of a model share their draws, and a head belongs to one index alone."""
    rng = np.random.default_rng(4)
    layers, heads, draws = 6, 4, 199
    alarms, single = 0, []
    for _ in range(1000):
        effects = rng.lognormal(0, 1, (layers, heads))  # a random place for every head
        drawn = effects[np.arange(layers), rng.integers(0, heads, (draws, layers))].sum(axis=1)
        p_values = [p_of_draws(value, drawn) for value in effects.sum(axis=0)]
        single.append(np.mean(np.array(p_values) <= 0.05))
        alarms += bool((bh_q(p_values) <= 0.05).any())
    assert np.mean(single) <= 0.058
    assert alarms / 1000 <= 0.058
