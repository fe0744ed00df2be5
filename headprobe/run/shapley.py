"""What each head or layer is worth as one of all: `shapley.csv`, from a run's files."""

import re
from collections.abc import Sequence

import numpy as np

from headprobe.masks.draws import Head, random_order
from headprobe.metrics.accuracy.shapley import (
    FEWEST_SAMPLES,
    Estimates,
    along_order,
    exact_values,
    exactly,
    mean_of_samples,
)
from headprobe.run.games import Game, Heads
from headprobe.run.load import Row
from headprobe.text import counted

HEADS, LAYERS = "heads", "layers"

RANDOM_ORDER = re.compile(r"(keep:)?random:\d+:(\d+)")
"""Names of masks along a random order, or along its reverse."""

Sample = list[tuple[tuple[Head, ...], list[int]]]
"""An order of the heads, or that and its reverse; with the rows of what is masked on its way, from nothing to all."""


def shapley_rows(games: Sequence[Game]) -> list[Row]:
    """Return the rows of `shapley.csv`: Shapley values of heads by random orders, and of layers by all their sets.

    Args:
        games: Of a run, `headprobe.run.games.games(run)`.
    """
    found: list[Row] = []
    with np.errstate(invalid="ignore"):  # infinite minus infinite NLL: not defined
        for game in games:
            samples = samples_of(game)
            if len(samples) >= FEWEST_SAMPLES:
                found += _of_heads(game, samples)
            if sets := game.sets_of_layers:
                found += _of_layers(game, sets)
    return found


def too_few_orders(games: Sequence[Game]) -> str:
    """Return one line for a run with random orders that are too few for Shapley values; nothing for others."""
    counts = {len(samples_of(game)) for game in games}
    few = max(counts, default=0)
    if not 0 < few < FEWEST_SAMPLES:
        return ""
    return (
        f"no Shapley values of heads: they need {FEWEST_SAMPLES} random orders or more, such as grow:random:0-9 and "
        f"keep:grow:random:0-9 (an order and its reverse count as one), got {few}"
    )


def shapley_in_words(rows: Sequence[Row]) -> str:
    """Return one line about the rows of `shapley.csv`; nothing where there are none."""
    said = []
    if heads := [row for row in rows if row["players"] == HEADS]:
        orders, pairs = (max(int(row[column]) for row in heads) for column in ("orders", "reversed"))
        said.append(f"of heads by {counted(orders, 'random order')}, {pairs} of them with their reverse")
    if any(row["players"] == LAYERS for row in rows):
        said.append("of layers exactly, by all their sets")
    return f"shapley.csv: Shapley values {'; '.join(said)}" if said else ""


def samples_of(game: Game) -> list[Sample]:
    """Return the random orders of which every mask was scored, each together with its reverse where that was too."""
    matches = (RANDOM_ORDER.fullmatch(name) for name in game.masks.values())
    seeds = sorted({int(match[2]) for match in matches if match})
    samples: list[Sample] = []
    for seed in seeds:
        order = random_order(game.heads_per_layer, seed)
        directions = (order, order[::-1])
        tries = [(way, game.rows_of(Heads(way[:count]) for count in range(len(way) + 1))) for way in directions]
        if sample := [(way, rows) for way, rows in tries if rows is not None]:
            samples.append(sample)
    return samples


def _of_heads(game: Game, samples: Sequence[Sample]) -> list[Row]:
    heads = [(layer, head) for layer, count in enumerate(game.heads_per_layer) for head in range(count)]
    numbers = {head: number for number, head in enumerate(heads)}
    found: list[Row] = []
    for quantity in game.sums:
        added = [
            np.mean([along_order(game.table(quantity, rows), [numbers[head] for head in way]) for way, rows in one], 0)
            for one in samples
        ]
        estimates = mean_of_samples(np.stack(added), game.images)
        about: Row = {"players": HEADS, "ablation": game.ablation, "quantity": quantity}
        counts: Row = {
            "images": int(game.images.sum()),
            "orders": len(samples),
            "reversed": sum(len(sample) == 2 for sample in samples),
        }
        places: list[Row] = [{"layer": layer, "head": head} for layer, head in heads]
        found += _rows(about, places, counts, estimates, game.calibration)
    return found


def _of_layers(game: Game, sets: Sequence[int]) -> list[Row]:
    found: list[Row] = []
    for quantity in game.sums:
        estimates = exactly(exact_values(game.table(quantity, sets)), game.images)
        about: Row = {"players": LAYERS, "ablation": game.ablation, "quantity": quantity}
        places: list[Row] = [{"layer": layer, "head": float("nan")} for layer in range(len(game.layers))]
        counts: Row = {"images": int(game.images.sum()), "orders": 0, "reversed": 0}
        found += _rows(about, places, counts, estimates, game.calibration)
    return found


def _rows(about: Row, places: Sequence[Row], counts: Row, found: Estimates, calibration: str) -> list[Row]:
    """Return a row per player."""
    columns = ("value", "value_low", "value_high", "value_se_orders", "value_se_images")
    return [
        {**about, **place, **counts, **dict(zip(columns, map(float, cells), strict=True)), "calibration": calibration}
        for place, *cells in zip(places, *found, strict=True)
    ]
