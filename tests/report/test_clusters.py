import numpy as np
import pytest
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from headprobe.metrics.arrays import FloatArray
from headprobe.report.matrices import cluster


def planted(groups: list[list[int]], heads: int, inside: float = 0.9, between: float = 0.1) -> FloatArray:
    values = np.full((heads, heads), between)
    for group in groups:
        values[np.ix_(group, group)] = inside
    np.fill_diagonal(values, 1)
    return values


def random_similarity(heads: int) -> FloatArray:
    values = np.random.default_rng(0).random((heads, heads))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def test_planted_groups_come_together() -> None:
    groups = [[0, 3, 6], [1, 4, 7], [2, 5]]
    order = cluster(planted(groups, 8)).order.tolist()
    for group in groups:
        places = [order.index(head) for head in group]
        assert max(places) - min(places) == len(group) - 1


@pytest.mark.parametrize("heads", [2, 3, 17])
def test_the_tree_is_the_one_that_scipy_draws(heads: int) -> None:
    values = random_similarity(heads)
    tree = cluster(values)
    merges = linkage(squareform(1 - values, checks=False), method="average")
    expected = dendrogram(merges, no_plot=True)
    assert tree.order.tolist() == expected["leaves"]
    ours = sorted((x.tolist(), y.tolist()) for x, y in zip(tree.lines[..., 0], tree.lines[..., 1], strict=True))
    icoord = [(np.array(x) - 5) / 10 for x in expected["icoord"]]
    theirs = sorted((x.tolist(), list(y)) for x, y in zip(icoord, expected["dcoord"], strict=True))
    np.testing.assert_allclose(np.array(ours), np.array(theirs))


def test_an_asymmetric_measure_counts_with_the_mean_of_both_entries() -> None:
    symmetric = random_similarity(9)
    tilt = np.triu(np.random.default_rng(1).uniform(-0.4, 0.4, (9, 9)), 1)
    np.testing.assert_allclose(cluster(symmetric + tilt - tilt.T).lines, cluster(symmetric).lines)


def test_heads_without_similarity_come_last_and_stay_out_of_the_tree() -> None:
    values = planted([[0, 2], [3, 4]], 6)
    values[[1, 5]] = values[:, [1, 5]] = np.nan
    tree = cluster(values)
    assert tree.order.tolist()[-2:] == [1, 5]
    assert tree.lines[..., 0].max() <= 3
    assert len(tree.lines) == 3


def test_pairs_that_were_not_compared_are_not_similar() -> None:
    values = planted([[0, 1], [2, 3]], 4)
    values[np.ix_([0, 1], [2, 3])] = values[np.ix_([2, 3], [0, 1])] = np.nan
    assert cluster(values).lines[-1, 1, 1] == pytest.approx(1)


@pytest.mark.parametrize("alive", [0, 1])
def test_fewer_than_two_heads_have_no_tree(alive: int) -> None:
    values = np.full((3, 3), np.nan)
    values[:alive, :alive] = 1
    tree = cluster(values)
    assert (tree.order.tolist(), len(tree.lines)) == ([0, 1, 2], 0)


def test_a_chain_of_a_thousand_heads_does_not_recurse_too_deep() -> None:
    heads = 1100
    similarity = 1 / (2.0 + np.maximum.outer(np.arange(heads), np.arange(heads)))
    np.fill_diagonal(similarity, 1)
    assert sorted(cluster(similarity).order.tolist()) == list(range(heads))
