"""A run with sets of heads from end to end: its files, what it says, and the sampler against exact values of layers."""

from itertools import combinations

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from headprobe.metrics.accuracy.shapley import along_order, exact_values, mean_of_samples
from headprobe.run.games import games
from headprobe.run.interactions import interaction_rows
from headprobe.run.load import RunFiles, load_files
from headprobe.run.shapley import shapley_rows
from tests.cli_runs import QUICK, Ended, command

LAYERS = 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("sets")
    (folder / "run.yaml").write_text("mask_spec: ['subsets:layer', 'grow:random:0']\n")
    return command(folder, "test", "--config", "run.yaml", *QUICK)


@pytest.fixture(scope="module")
def run(ended: Ended) -> RunFiles:
    assert ended.code == 0, ended.err
    return load_files(ended.directory())


def test_the_files_are_those_made_from_the_run_later(run: RunFiles) -> None:
    for name, rows in (("interactions.csv", interaction_rows(games(run))), ("shapley.csv", shapley_rows(games(run)))):
        table = run.table(name)
        assert table is not None
        for column, values in table.items():
            np.testing.assert_array_equal(values, [row[column] for row in rows], err_msg=column)


def test_the_run_says_what_it_wrote_and_what_it_did_not(ended: Ended) -> None:
    said = " ".join(ended.out.split())
    assert "interactions.csv: 15 pairs of heads or other parts" in said
    assert "shapley.csv: Shapley values of layers exactly, by all their sets" in said
    assert "no Shapley values of heads: they need 5 random orders or more" in said
    assert "got 1" in said


def test_a_run_without_sets_writes_and_says_nothing_of_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = command(tmp_path_factory.mktemp("plain"), "test", "--mask-spec", "each:layer", *QUICK)
    assert {"interactions.csv", "shapley.csv"} & {path.name for path in plain.directory().iterdir()} == set()
    assert "Shapley" not in plain.out
    assert "interactions" not in plain.out


def test_values_of_layers_add_up_to_the_rise_of_all_heads(run: RunFiles) -> None:
    for column in ("nll_rise", "drop_pp"):
        rows = [row for row in shapley_rows(games(run)) if row["quantity"] == column]
        (everything,) = [float(row[column]) for row in run.masks if row["mask"] == "layer:0-5"]
        assert sum(float(row["value"]) for row in rows) == pytest.approx(everything, abs=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_sampler_finds_the_exact_values_of_layers_within_its_intervals(run: RunFiles, reverse: bool) -> None:
    """The sampled orders are drawn again and again: 95% of the intervals over orders should hold the exact values."""
    (game,) = games(run)
    assert game.sets_of_layers is not None
    values = game.table("nll_rise", game.sets_of_layers)
    exact = exact_values(values).sum(axis=1) / game.images.sum()
    rng = np.random.default_rng(0)
    inside, errors = [], []
    for _ in range(100):
        samples = []
        for _ in range(10):
            order = rng.permutation(LAYERS).tolist()
            ways = (order, order[::-1]) if reverse else (order,)
            rows = [[sum(1 << layer for layer in way[:count]) for count in range(LAYERS + 1)] for way in ways]
            samples.append(
                np.mean([along_order(values[row], way) for row, way in zip(rows, ways, strict=True)], axis=0)
            )
        found = mean_of_samples(np.stack(samples), game.images)
        inside.append(np.abs(found.value - exact) <= 2.262 * found.se_orders)  # t with 9 degrees
        errors.append(np.abs(found.value - exact))
    assert np.mean(inside) >= 0.9
    assert np.mean(errors) < 0.2 * np.abs(exact).max()


def test_tensorboard_has_figures_and_no_curve_of_sets_that_share_a_step(ended: Ended) -> None:
    events = EventAccumulator(str(ended.directory()), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert {"shapley/nll_rise_layers", "interactions/layers", "interactions/shapley_layers"} <= set(tags["images"])
    shared = {4 * size for size in range(2, LAYERS) if len(list(combinations(range(LAYERS), size))) > 1}
    drawn = {event.step for event in events.Scalars("nll_rise/heads_masked")}
    assert not drawn & shared
