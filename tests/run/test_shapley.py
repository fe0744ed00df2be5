"""`shapley.csv` follows from `masks.csv`, `masks.json` and `groups.npz`."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from headprobe.masks.draws import random_order
from headprobe.run.games import games
from headprobe.run.load import Row, RunFiles, load_files
from headprobe.run.shapley import shapley_in_words, shapley_rows, too_few_orders
from tests.run.small_runs import HEADS, IMAGES, keep_one_group, write_run

EVERY = [(layer, head) for layer, count in enumerate(HEADS) for head in range(count)]
COLUMNS = ("value", "value_low", "value_high", "value_se_orders", "value_se_images")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    specs = ["grow:random:0-5", "keep:grow:random:0-1", "subsets:layer"]
    return load_files(write_run(tmp_path_factory.mktemp("run"), specs, ["zero", "resample:2"]))


def rows_of(run: RunFiles, **wanted: str) -> list[Row]:
    return [row for row in shapley_rows(games(run)) if all(row[name] == value for name, value in wanted.items())]


def rises(run: RunFiles, ablation: str, column: str) -> dict[frozenset[tuple[int, int]], float]:
    """By set of heads the mean of draws, from masks.csv; of one set under two names the first."""
    found: dict[frozenset[tuple[int, int]], tuple[str, list[float]]] = {}
    for row in run.masks[1:]:
        if row["ablation"] == ablation:
            name, values = found.setdefault(frozenset(run.heads[str(row["mask"])]), (str(row["mask"]), []))
            if name == row["mask"]:
                values.append(float(row[column]))
    return {heads: float(np.mean(values)) for heads, (_, values) in found.items()} | {frozenset(): 0.0}


def test_the_table_is_computed_again_from_the_files(run: RunFiles) -> None:
    again, table = shapley_rows(games(run)), run.table("shapley.csv")
    assert table is not None
    assert list(table) == list(again[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in again], err_msg=name)


@pytest.mark.parametrize("quantity", ["nll_rise", "drop_pp"])
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_a_head_is_worth_what_it_adds_along_the_orders(run: RunFiles, ablation: str, quantity: str) -> None:
    value = rises(run, ablation, quantity)
    samples = []
    for seed in range(6):
        order = random_order(HEADS, seed)
        each = []
        for way in (order, order[::-1]) if seed < 2 else (order,):
            added = {}
            for place, head in enumerate(way):
                added[head] = value[frozenset(way[: place + 1])] - value[frozenset(way[:place])]
            each.append([added[head] for head in EVERY])
        samples.append(np.mean(each, axis=0))
    found = rows_of(run, players="heads", ablation=ablation, quantity=quantity)
    assert [(row["layer"], row["head"]) for row in found] == EVERY
    np.testing.assert_allclose([float(row["value"]) for row in found], np.mean(samples, axis=0), atol=1e-12)
    errors = np.std(samples, axis=0, ddof=1) / np.sqrt(6)
    np.testing.assert_allclose([float(row["value_se_orders"]) for row in found], errors, atol=1e-12)
    assert {(row["orders"], row["reversed"], row["images"]) for row in found} == {(6, 2, IMAGES)}


@pytest.mark.parametrize("players", ["heads", "layers"])
@pytest.mark.parametrize("quantity", ["nll_rise", "drop_pp"])
def test_the_values_add_up_to_the_rise_of_all_heads_masked(run: RunFiles, players: str, quantity: str) -> None:
    for ablation in ("zero", "resample"):
        total = sum(float(row["value"]) for row in rows_of(run, players=players, ablation=ablation, quantity=quantity))
        assert total == pytest.approx(rises(run, ablation, quantity)[frozenset(EVERY)], abs=1e-9)


def test_layers_are_exact_the_mean_over_all_orders_of_layers(run: RunFiles) -> None:
    value = rises(run, "zero", "nll_rise")
    layers = [frozenset(head for head in EVERY if head[0] == layer) for layer in range(len(HEADS))]
    added = np.zeros((6, 3))
    for number, order in enumerate(permutations(range(3))):
        before: frozenset[tuple[int, int]] = frozenset()
        for layer in order:
            added[number, layer] = value[before | layers[layer]] - value[before]
            before |= layers[layer]
    found = rows_of(run, players="layers", ablation="zero", quantity="nll_rise")
    np.testing.assert_allclose([float(row["value"]) for row in found], added.mean(axis=0))
    assert all(np.isnan(float(row["head"])) and row["orders"] == 0 and row["value_se_orders"] == 0 for row in found)


def test_an_interval_joins_both_errors(run: RunFiles) -> None:
    for row in rows_of(run, players="heads", quantity="nll_rise"):
        value, low, high, orders, images = (float(row[name]) for name in COLUMNS)
        assert high - value == pytest.approx(value - low)
        least = np.hypot(orders, images)
        assert 1.96 * least < high - value <= 2.571 * least * (1 + 1e-9)  # t with 5 degrees, the fewest


@pytest.mark.parametrize("orders", [1, 4])
def test_fewer_than_five_samples_are_refused_in_words(tmp_path: Path, orders: int) -> None:
    run = load_files(write_run(tmp_path, [f"grow:random:0-{orders - 1}", f"keep:grow:random:0-{orders - 1}"]))
    assert shapley_rows(games(run)) == []
    assert run.table("shapley.csv") is None
    line = too_few_orders(games(run))
    assert line.startswith("no Shapley values of heads: they need 5 random orders or more, such as grow:random:0-9")
    assert line.endswith(f"got {orders}")


@pytest.mark.parametrize("specs", [["each:head"], ["random:2-6/2:0-4"], ["subsets:layer"]])
def test_runs_without_whole_orders_say_nothing_of_heads(tmp_path: Path, specs: list[str]) -> None:
    played = games(load_files(write_run(tmp_path, specs)))
    assert too_few_orders(played) == ""
    assert [row for row in shapley_rows(played) if row["players"] == "heads"] == []


def test_reversed_orders_alone_are_samples_too(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["keep:grow:random:0-4", "all"]))
    assert {(row["orders"], row["reversed"]) for row in rows_of(run, players="heads")} == {(5, 0)}


def test_a_set_of_layers_that_is_missing_leaves_no_values_of_layers(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:layer", "layer:0,1", "layer:0,2", "all"]))
    assert shapley_rows(games(run)) == []
    run = load_files(write_run(tmp_path / "all", ["each:layer", "layer:0,1", "layer:0,2", "layer:1,2", "all"]))
    assert len(rows_of(run, players="layers", quantity="nll_rise")) == 3


def test_one_image_has_values_without_intervals(tmp_path: Path) -> None:
    keep_one_group(write_run(tmp_path, ["grow:random:0-4", "subsets:layer"]))
    found = shapley_rows(games(load_files(tmp_path)))
    assert len(found) == 2 * (len(EVERY) + 3)
    assert np.isfinite([float(row["value"]) for row in found]).all()
    assert np.isnan([float(row["value_low"]) for row in found]).all()


def test_one_line_says_what_the_values_are_of(run: RunFiles) -> None:
    assert shapley_in_words(shapley_rows(games(run))) == (
        "shapley.csv: Shapley values of heads by 6 random orders, 2 of them with their reverse; of layers exactly, by "
        "all their sets"
    )
