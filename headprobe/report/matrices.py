"""How one matrix of similarities is drawn: its cells, the lines and numbers beside it, and the tree above it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.style import CHANGE_COLOURS, MISSING_CELL, VALUE_COLOURS, some

NUMBERED_CELL = 0.29
"""Inches: smallest cell that carries its number."""

PALE = 0.35
"""What is left of the colour of a cell at or below its noise floor."""

LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue look (ITU-R BT.601)."""


class Tree(NamedTuple):
    """Heads in the order of a tree's leaves."""

    order: IntArray  #: `[heads]`, rows of the matrix; heads without similarity last
    lines: FloatArray  #: `[merges, 4, 2]`, corners (position in `order`, 1 - similarity) of each merge's bracket


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
    """Return the corners of each merge; scipy's own drawing recurses, too deep for chains of a thousand heads.

    Args:
        merges: `[merges, 4]` as scipy gives them: two nodes, their distance, heads below. Nodes are heads first, then
            the merges in their order.
        leaves: `[heads]`, heads in the order of the leaves.
    """
    heads = len(leaves)
    x, height = np.zeros(heads + len(merges)), np.zeros(heads + len(merges))  # of each node
    x[leaves] = np.arange(heads)
    lines = np.empty((len(merges), 4, 2))
    for number, (first, second, distance, _) in enumerate(merges):
        left, right = sorted((int(first), int(second)), key=lambda node: x[node])
        new = heads + number
        x[new], height[new] = (x[left] + x[right]) / 2, distance
        lines[number] = [
            (x[left], height[left]),
            (x[left], distance),
            (x[right], distance),
            (x[right], height[right]),
        ]
    return lines


class Matrix(NamedTuple):
    """One matrix, its heads in the order in which they are drawn."""

    values: FloatArray  #: `[heads, heads]`, NaN where there is no value
    floor: FloatArray | None  #: `[heads, heads]`, what unrelated images score
    layer: IntArray  #: `[heads]`
    head: IntArray  #: `[heads]`, numbers in the layer
    tree: Tree | None = None  #: of a clustered matrix

    def of(self, rows: IntArray, tree: Tree | None = None) -> "Matrix":
        """Return the matrix of some heads, in the order of `rows`."""
        grid = np.ix_(rows, rows)
        floor = None if self.floor is None else self.floor[grid]
        return Matrix(self.values[grid], floor, self.layer[rows], self.head[rows], tree)

    def by_layer(self) -> list["Matrix"]:
        """Return the matrix of each layer alone."""
        return [self.of(np.flatnonzero(self.layer == number)) for number in np.unique(self.layer)]

    def clustered(self) -> "Matrix":
        """Return the matrix in the order of its tree."""
        tree = cluster(self.values)
        return self.of(tree.order, tree)


def colour_scale(values: FloatArray, diverging: bool) -> ScalarMappable:
    """Return colours from 0 to 1, or symmetric about 0 as far as the values go."""
    if not diverging:
        return ScalarMappable(Normalize(0, 1), VALUE_COLOURS)
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max(initial=0)) or 1.0
    return ScalarMappable(Normalize(-limit, limit), CHANGE_COLOURS)


def paint(axes: Axes, matrix: Matrix, scale: ScalarMappable, side: float) -> None:
    """Draw the cells, pale where at or below the floor, hatched where there is no value; numbers where they fit.

    Args:
        axes: Where.
        matrix: What.
        scale: In which colours.
        side: Inches of the matrix's side, about.
    """
    values = matrix.values
    colours = scale.to_rgba(np.ma.masked_invalid(values))  # [heads, heads, 4]
    colours[~np.isfinite(values)] = 0  # transparent: the hatch behind shows
    if matrix.floor is not None:
        low = values <= matrix.floor
        colours[low, :3] = 1 - PALE * (1 - colours[low, :3])

    axes.patch.set(**MISSING_CELL)
    axes.imshow(colours, interpolation="nearest")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    if side / len(values) >= NUMBERED_CELL:
        _write_numbers(axes, values, colours)


def _write_numbers(axes: Axes, values: FloatArray, colours: FloatArray) -> None:
    dark = colours[..., :3] @ LUMA < 0.55
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: a rounded -0.0 loses its sign
            colour = "white" if dark[row, column] else "0.1"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def mark_layers(axes: Axes, layer: IntArray, colour: str) -> None:
    """Draw thin lines between layers and their numbers beside them."""
    numbers, first, heads = np.unique(layer, return_index=True, return_counts=True)
    width = 0.9 if len(layer) < 200 else 0.4
    for draw in (axes.axvline, axes.axhline):
        for start in first[1:]:
            draw(start - 0.5, color=colour, linewidth=width)

    shown = list(some(len(numbers), 40))
    centres = first + (heads - 1) / 2
    labels = [str(number) for number in numbers[shown]]
    axes.set_xticks(centres[shown], labels)
    axes.set_yticks(centres[shown], labels)


def mark_heads(axes: Axes, names: Sequence[str], side: float) -> None:
    """Name heads beside the matrix, as many as there is room for."""
    shown = list(some(len(names), int(side / 0.15)))
    labels = [names[row] for row in shown]
    axes.set_xticks(shown, labels, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(shown, labels)
    axes.tick_params(labelsize=7)


def tallest(*matrices: Matrix) -> float:
    """Return the height of the highest of their trees, 1 where there is none."""
    trees = [matrix.tree for matrix in matrices if matrix.tree is not None]
    heights = [float(tree.lines[..., 1].max(initial=0)) for tree in trees]
    return max(heights, default=0) or 1.0


def draw_tree(axes: Axes, matrix: Matrix, top: float, ticks: bool) -> None:
    """Draw the tree that stands on a matrix; heights from 0, identical, to `top`."""
    lines = np.empty((0, 4, 2)) if matrix.tree is None else matrix.tree.lines
    axes.add_collection(LineCollection(list(lines), colors="0.25", linewidths=1.0 if len(lines) < 200 else 0.5))
    axes.set(xlim=(-0.5, len(matrix.head) - 0.5), ylim=(0, 1.03 * top))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_visible(ticks)
    axes.set_xticks([])
    if ticks:
        axes.yaxis.set_major_locator(MaxNLocator(3))
    else:
        axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.set_ylabel("1 - similarity" if ticks else "", fontsize=8)


def caption(*matrices: Matrix) -> str:
    """Say what hatched and pale cells mean, where there are any."""
    notes = []
    if any(not np.isfinite(matrix.values).all() for matrix in matrices):
        notes.append("Hatched: no similarity (a head that does not vary, or a pair that was not compared).")
    if any(matrix.floor is not None and (matrix.values <= matrix.floor).any() for matrix in matrices):
        notes.append("Pale: at or below the noise floor, which is what unrelated images score.")
    return " ".join(notes)
