"""Shapley values: the oracles are brute force over all orders, and shapiq where it is there; coverage is simulated."""

from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest
from numpy.typing import NDArray

from headprobe.metrics.accuracy.shapley import along_order, exact_interactions, exact_values, exactly, mean_of_samples

Array = NDArray[np.float64]

GROUPS = 64


def members(number: int, players: int) -> frozenset[int]:
    return frozenset(player for player in range(players) if number >> player & 1)


def number_of(players: frozenset[int]) -> int:
    return sum(1 << player for player in players)


def by_all_orders(values: Array, players: int) -> Array:
    """The definition: the mean over all orders of what a player adds when it comes."""
    found = np.zeros((players, *values.shape[1:]))
    for order in permutations(range(players)):
        for place, player in enumerate(order):
            before = number_of(frozenset(order[:place]))
            found[player] += values[before | 1 << player] - values[before]
    return found / factorial(players)


def by_all_sets(values: Array, players: int) -> Array:
    """Grabisch and Roubens' definition, with its factorials."""
    found = []
    for one, other in combinations(range(players), 2):
        rest = [player for player in range(players) if player not in (one, other)]
        total = np.zeros(values.shape[1:])
        for size in range(len(rest) + 1):
            for chosen in combinations(rest, size):
                base = number_of(frozenset(chosen))
                both = values[base | 1 << one | 1 << other] - values[base | 1 << one] - values[base | 1 << other]
                weight = factorial(players - size - 2) * factorial(size) / factorial(players - 1)
                total = total + weight * (both + values[base])
        found.append(total)
    return np.array(found)


def game(rng: np.random.Generator, players: int, groups: int = GROUPS) -> Array:
    values = rng.normal(size=(2**players, groups))
    values[0] = 0
    return values


@pytest.mark.parametrize("players", [2, 3, 5])
def test_exact_values_are_the_mean_over_all_orders(players: int) -> None:
    values = game(np.random.default_rng(0), players)
    np.testing.assert_allclose(exact_values(values), by_all_orders(values, players), atol=1e-12)


@pytest.mark.parametrize("players", [2, 3, 5])
def test_exact_interactions_are_grabisch_and_roubens(players: int) -> None:
    values = game(np.random.default_rng(1), players)
    np.testing.assert_allclose(exact_interactions(values), by_all_sets(values, players), atol=1e-12)


def test_exact_numbers_are_shapiqs() -> None:
    shapiq = pytest.importorskip("shapiq", reason="shapiq, an optional oracle, is not installed")
    players = 6
    values = game(np.random.default_rng(2), players, 1)[:, 0]

    def play(coalitions: NDArray[np.bool_]) -> Array:
        return np.array([values[int((row * 2 ** np.arange(players)).sum())] for row in coalitions])

    computer = shapiq.ExactComputer(n_players=players, game=play)
    singles, pairs = computer("SV", order=1), computer("SII", order=2)
    ours = exact_values(values[:, None])[:, 0], exact_interactions(values[:, None])[:, 0]
    np.testing.assert_allclose(ours[0], [singles[(player,)] for player in range(players)], atol=1e-9)
    np.testing.assert_allclose(ours[1], [pairs[pair] for pair in combinations(range(players), 2)], atol=1e-9)


def test_values_add_up_to_the_loss_of_all_exactly_and_along_every_order() -> None:
    rng = np.random.default_rng(3)
    values = game(rng, 6)
    np.testing.assert_allclose(exact_values(values).sum(axis=0), values[-1], atol=1e-12)
    order = rng.permutation(6).tolist()
    sets = [number_of(frozenset(order[:count])) for count in range(7)]
    np.testing.assert_allclose(along_order(values[sets], order).sum(axis=0), values[-1], atol=1e-12)


def test_a_player_without_effect_is_worth_nothing_and_equal_players_are_worth_the_same() -> None:
    rng = np.random.default_rng(4)
    smaller = game(rng, 3)
    values = np.array([smaller[number & 0b111] for number in range(16)])  # player 3 changes nothing
    found = exactly(exact_values(values), np.full(GROUPS, 10))
    assert found.value[3] == 0
    assert np.isnan([found.low[3], found.high[3]]).all()
    size = np.array([[len(members(number, 4)) ** 2] for number in range(16)], dtype=np.float64) @ np.ones((1, GROUPS))
    assert exact_values(size)[:, 0].tolist() == pytest.approx([4] * 4)


def test_of_every_order_the_mean_is_exact() -> None:
    values, players = game(np.random.default_rng(5), 4), 4
    images = np.full(GROUPS, 3)
    found = mean_of_samples(np.stack([marginals(values, order) for order in permutations(range(players))]), images)
    np.testing.assert_allclose(found.value, exact_values(values).sum(axis=1) / images.sum())


def marginals(values: Array, order: tuple[int, ...]) -> Array:
    sets = [number_of(frozenset(order[:count])) for count in range(len(order) + 1)]
    return along_order(values[sets], order)


def test_an_order_and_its_reverse_cancel_interactions_of_pairs() -> None:
    """Of a game without interactions of three, one pair of reversed orders is exact: there is no error over orders."""
    rng = np.random.default_rng(6)
    players = 5
    single, pair = rng.normal(size=(players, GROUPS)), rng.normal(size=(players, players, GROUPS))
    sets = [sorted(members(number, players)) for number in range(2**players)]
    values = np.array(
        [single[own].sum(axis=0) + sum((pair[a, b] for a, b in combinations(own, 2)), np.zeros(GROUPS)) for own in sets]
    )
    orders = [tuple(rng.permutation(players).tolist()) for _ in range(5)]
    samples = np.stack([(marginals(values, way) + marginals(values, way[::-1])) / 2 for way in orders])
    found = mean_of_samples(samples, np.ones(GROUPS, dtype=np.int64))
    assert found.se_orders.max() < 1e-12
    np.testing.assert_allclose(found.value, exact_values(values).sum(axis=1) / GROUPS)


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_fewer_groups_give_wider_intervals_and_one_gives_none(groups: int) -> None:
    values = game(np.random.default_rng(7), 4)
    values[:, groups:] = 0
    images = np.where(np.arange(GROUPS) < groups, 5, 0)
    found = exactly(exact_values(values), images)
    assert np.isfinite(found.value).all()
    assert np.isfinite(found.low).all() == (groups > 1)
    assert (found.high[np.isfinite(found.high)] > found.value[np.isfinite(found.high)]).all()


# -- coverage: planted effects, images with long tails ----------------------------------------------------------------

PLAYERS = 6


def planted(rng: np.random.Generator) -> Array:
    """True values of all sets `[sets]`: rises that saturate, so that marginals depend on what is masked already."""
    weight = 0.3 * np.exp(rng.normal(size=PLAYERS))
    sums = np.array([sum(weight[player] for player in members(number, PLAYERS)) for number in range(2**PLAYERS)])
    backed_up = np.array([{0, 1} <= members(number, PLAYERS) for number in range(2**PLAYERS)])
    return np.asarray(2 * np.log1p(sums**1.5) + 0.4 * backed_up)


def on_images(rng: np.random.Generator, truth: Array, images: int) -> tuple[Array, NDArray[np.int64]]:
    """Sums by group `[sets, groups]` of images that differ in how much each player matters, with long tails."""
    size = np.exp(rng.normal(size=(images, 1)) - 0.5)  # mean 1
    own = rng.normal(size=(images, PLAYERS)) * size  # noise of players, which all sets that hold them share
    held = np.array([[player in members(number, PLAYERS) for player in range(PLAYERS)] for number in range(len(truth))])
    values = size * truth + 0.3 * own @ held.T + 0.1 * size * rng.normal(size=(images, len(truth))) * (truth > 0)
    groups = rng.integers(0, GROUPS, images)
    sums = np.zeros((GROUPS, len(truth)))
    np.add.at(sums, groups, values)
    return sums.T, np.bincount(groups, minlength=GROUPS).astype(np.int64)


def coverage(images: int, orders: int, reverse: bool, runs: int) -> dict[str, float]:
    rng = np.random.default_rng(8)
    covered: dict[str, list[NDArray[np.bool_]]] = {"sampled": [], "exact": [], "index": [], "pair": []}
    for _ in range(runs):
        truth = planted(rng)
        values, of_groups = on_images(rng, truth, images)
        worth, index = exact_values(truth[:, None])[:, 0], exact_interactions(truth[:, None])[:, 0]
        ways = [tuple(rng.permutation(PLAYERS).tolist()) for _ in range(orders)]
        samples = [
            (marginals(values, way) + marginals(values, way[::-1])) / 2 if reverse else marginals(values, way)
            for way in ways
        ]
        pairs = [(1 << one, 1 << other) for one, other in combinations(range(PLAYERS), 2)]
        plain = np.array([values[one | other] - values[one] - values[other] for one, other in pairs])
        of_truth = np.array([truth[one | other] - truth[one] - truth[other] for one, other in pairs])
        for name, found, true in (
            ("sampled", mean_of_samples(np.stack(samples), of_groups), worth),
            ("exact", exactly(exact_values(values), of_groups), worth),
            ("index", exactly(exact_interactions(values), of_groups), index),
            ("pair", exactly(plain, of_groups), of_truth),
        ):
            covered[name].append((found.low <= true) & (true <= found.high))
    return {name: float(np.mean(each)) for name, each in covered.items()}


@pytest.mark.parametrize(("orders", "reverse"), [(5, False), (10, False), (5, True), (10, True)])
def test_intervals_cover_planted_values_at_about_their_nominal_rate(orders: int, reverse: bool) -> None:
    found = coverage(1000, orders, reverse, runs=200)
    assert min(found.values()) >= 0.93
    assert max(found["exact"], found["index"], found["pair"]) <= 0.97
