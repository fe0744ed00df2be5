"""Orders heads by similarity: average linkage, and the lines of its tree."""

from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headprobe.report.style import FloatArray, IntArray


class Tree(NamedTuple):
    """Heads in the order of a tree's leaves."""

    order: IntArray  #: `[heads]`, places in the matrix; heads without similarity last
    lines: FloatArray  #: `[merges, 4, 2]`, corners (place in `order`, 1 - similarity) of each merge's bracket


def cluster(similarity: FloatArray) -> Tree:
    """Cluster heads by average linkage of 1 - similarity (Sokal & Michener, 1958).

    An asymmetric measure counts with the mean of its two entries. Pairs without a value count as similarity 0. Heads
    without similarity to themselves stay out of the tree.

    Args:
        similarity: `[heads, heads]`.
    """
    known = np.isfinite(similarity.diagonal())
    inside, outside = np.flatnonzero(known), np.flatnonzero(~known)
    if len(inside) < 2:
        return Tree(np.concatenate([inside, outside]), np.empty((0, 4, 2)))
    mean = (similarity + similarity.T)[np.ix_(inside, inside)] / 2
    distance = np.clip(1 - np.nan_to_num(mean, nan=0.0), 0, None)
    np.fill_diagonal(distance, 0)
    merges = np.asarray(linkage(squareform(distance, checks=False), method="average"), dtype=np.float64)
    leaves = np.asarray(leaves_list(merges), dtype=np.int64)
    return Tree(np.concatenate([inside[leaves], outside]), _brackets(merges, leaves))


def _brackets(merges: FloatArray, leaves: IntArray) -> FloatArray:
    """Return the corners of each merge; scipy's own drawing recurses, too deep for chains of a thousand heads."""
    heads = len(leaves)
    place, height = np.zeros(heads + len(merges)), np.zeros(heads + len(merges))
    place[leaves] = np.arange(heads)
    lines = np.empty((len(merges), 4, 2))
    for number, (first, second, distance, _) in enumerate(merges):
        left, right = sorted((int(first), int(second)), key=lambda node: place[node])
        new = heads + number
        place[new], height[new] = (place[left] + place[right]) / 2, distance
        lines[number] = [
            (place[left], height[left]),
            (place[left], distance),
            (place[right], distance),
            (place[right], height[right]),
        ]
    return lines
