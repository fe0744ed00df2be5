import itertools
import math
import random

import pytest

from headprobe.errors import RunError
from headprobe.units.tree import UnitTree


class Trace:
    """A sum that remembers in which pairs it was made."""

    def __init__(self, text: str) -> None:
        self.text = text


def merge(left: Trace, right: Trace) -> None:
    left.text = f"({left.text} {right.text})"


def tree(units: int) -> UnitTree[Trace]:
    return UnitTree(units, merge)


def whole(order: list[int]) -> str:
    grown = tree(len(order))
    for unit in order:
        grown.add(unit, Trace(str(unit)))
    found = grown.whole()
    assert found is not None
    return found.text


def test_neighbours_merge_first_and_the_left_one_stays_left() -> None:
    assert whole([0, 1, 2, 3, 4]) == "(((0 1) (2 3)) 4)"
    assert whole([0, 1, 2]) == "((0 1) 2)"
    assert whole([0]) == "0"
    assert whole(list(range(7))) == "(((0 1) (2 3)) ((4 5) 6))"


@pytest.mark.parametrize("units", range(1, 7))
def test_the_order_in_which_units_finish_does_not_matter(units: int) -> None:
    found = {whole(list(order)) for order in itertools.permutations(range(units))}
    assert len(found) == 1


@pytest.mark.parametrize("units", [5, 8, 21])
@pytest.mark.parametrize("processes", [2, 3])
def test_trees_of_several_processes_join_to_the_tree_of_one(units: int, processes: int) -> None:
    shares = [list(range(units))[units * p // processes : units * (p + 1) // processes] for p in range(processes)]
    random.Random(0).shuffle(shares)
    joined = tree(units)
    for share in shares:
        own = tree(units)
        for unit in share:
            own.add(unit, Trace(str(unit)))
        for node, metric in own.nodes.items():
            joined.add_node(node, metric)
    found = joined.whole()
    assert found is not None
    assert found.text == whole(list(range(units)))


@pytest.mark.parametrize("units", [100, 1000])
def test_few_metrics_are_kept_when_units_come_in_order(units: int) -> None:
    grown = tree(units)
    most = 0
    for unit in range(units):
        grown.add(unit, Trace(""))
        most = max(most, len(grown.nodes))
    assert most <= math.log2(units) + 1


def test_a_missing_unit_is_an_error() -> None:
    grown = tree(4)
    for unit in (0, 1, 3):
        grown.add(unit, Trace(str(unit)))
    with pytest.raises(RunError, match="1 of 4 units"):
        grown.whole()


@pytest.mark.parametrize("again", [0, 1, 4])
def test_a_unit_that_comes_twice_is_an_error(again: int) -> None:
    grown = tree(5)
    for unit in (0, 1, 2, 4):
        grown.add(unit, Trace(str(unit)))
    with pytest.raises(RunError, match="sent twice"):
        grown.add(again, Trace(""))


@pytest.mark.parametrize("unit", [-1, 5])
def test_a_unit_that_is_not_there_is_an_error(unit: int) -> None:
    with pytest.raises(RunError, match="none of the data set's"):
        tree(5).add(unit, Trace(""))


def test_a_data_set_without_units_has_no_metric() -> None:
    assert tree(0).whole() is None
