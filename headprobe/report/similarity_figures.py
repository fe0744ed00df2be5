"""Matrices of head similarity: by layer, or clustered; of the whole model, or within each layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.report.matrices import Matrix, caption, colour_scale, draw_tree, mark_heads, mark_layers, paint, tallest
from headprobe.report.style import figure_of, new_figure, one_axes, panel_grid, say_nothing_there, write_title, zoom

DEPTH_COLOURS = "Greys"


def similarity_by_layer(
    values: FloatArray,
    layer: IntArray,
    head: IntArray,
    title: str,
    label: str,
    floor: FloatArray | None = None,
    diverging: bool = False,
    given: Axes | None = None,
) -> Figure:
    """Draw the similarity of every pair of heads, heads in order of (layer, head).

    Where no pair of two layers has a value, one small matrix per layer is drawn instead (`similarity_within`).

    Args:
        values: `[heads, heads]`, NaN where a pair has no similarity or was not compared.
        layer: `[heads]`, number of each head's layer.
        head: `[heads]`, its number in the layer.
        title: What is shown, of which model, on how many images.
        label: The measure, beside the colour bar.
        floor: `[heads, heads]`, what unrelated images score; entries at or below it are drawn pale.
        diverging: The values are differences: colours symmetric about 0 instead of from 0 to 1.
        given: Draw into these axes, not into a figure of its own; for one matrix.
    """
    if not _between_layers(values, layer):
        return similarity_within(values, layer, head, title, label, floor, diverging, given)

    matrix = _in_order(values, layer, head, floor)
    scale = colour_scale(values, diverging)
    side = _side(len(layer))
    figure, axes = one_axes(given, side + 1.7, side + 1.35)
    paint(axes, matrix, scale, side)
    mark_layers(axes, matrix.layer, "0.6" if diverging else "white")
    axes.set_xlabel("layer (its heads in order)", fontsize=10 * zoom(figure, given))
    axes.set_ylabel("layer (its heads in order)", fontsize=10 * zoom(figure, given))

    bar = figure.colorbar(scale, ax=axes, fraction=0.045, pad=0.02, extend=_extend(scale, values))
    bar.set_label(label, size=10 * zoom(figure, given))
    write_title(figure, title, caption(matrix), given)
    return figure


def similarity_within(
    values: FloatArray,
    layer: IntArray,
    head: IntArray,
    title: str,
    label: str,
    floor: FloatArray | None = None,
    diverging: bool = False,
    given: Axes | None = None,
) -> Figure:
    """Draw the similarity of heads of the same layer: a small matrix per layer, all with the same colours.

    Takes what `similarity_by_layer` takes; values between layers are not shown.
    """
    return _small_matrices(_in_order(values, layer, head, floor).by_layer(), title, label, diverging, given)


def similarity_clustered(
    values: FloatArray,
    layer: IntArray,
    head: IntArray,
    title: str,
    label: str,
    floor: FloatArray | None = None,
) -> Figure:
    """Draw the similarity of every pair of heads, similar heads side by side under the tree that joins them.

    Average linkage of 1 - similarity; of an asymmetric measure such as PWCCA the mean of both entries. Heads without
    similarity come last. Where no pair of two layers has a value, each layer is clustered in a matrix of its own.

    Takes what `similarity_by_layer` takes.
    """
    whole = _in_order(values, layer, head, floor)
    if _between_layers(values, layer):
        return _clustered_whole(whole.clustered(), title, label)
    return _small_matrices([matrix.clustered() for matrix in whole.by_layer()], title, label, diverging=False)


def _clustered_whole(matrix: Matrix, title: str, label: str) -> Figure:
    """Draw the tree, a strip of the heads' layers, and the matrix below each other."""
    side = _side(len(matrix.head))
    figure = new_figure(side + 2.3, 1.2 * side + 1.3)
    tree, strip, axes = figure.subplots(3, 1, height_ratios=(0.17, 0.025, 1))

    scale = colour_scale(matrix.values, diverging=False)
    paint(axes, matrix, scale, side)
    axes.set_aspect("auto")  # the three share their columns; the figure's shape makes the cells almost square
    mark_heads(axes, [f"{a}.{b}" for a, b in zip(matrix.layer, matrix.head, strict=True)], side)
    axes.set_xlabel("layer.head", fontsize=10 * zoom(figure))
    axes.set_ylabel("layer.head", fontsize=10 * zoom(figure))

    first, last = int(matrix.layer.min()), int(matrix.layer.max())
    shades = Normalize(first - 0.2 * (last - first), last)  # the first layer is not quite white
    depths = strip.imshow(matrix.layer[None], cmap=DEPTH_COLOURS, norm=shades, aspect="auto", interpolation="nearest")
    strip.set_axis_off()
    draw_tree(tree, matrix, tallest(matrix), ticks=True)

    bar = figure.colorbar(scale, ax=axes, fraction=0.045, pad=0.02, extend=_extend(scale, matrix.values))
    bar.set_label(label, size=10 * zoom(figure))
    layers = figure.colorbar(depths, ax=axes, fraction=0.045, pad=0.02)
    layers.set_label("layer (grey strip)", size=10 * zoom(figure))
    layers.ax.set_ylim(first, last)
    layers.set_ticks([float(number) for number in range(first, last + 1, max(1, (last - first) // 12))])
    write_title(figure, title, f"Order and tree: average linkage of 1 - similarity. {caption(matrix)}")
    return figure


def _small_matrices(
    matrices: Sequence[Matrix], title: str, label: str, diverging: bool, given: Axes | None = None
) -> Figure:
    """Draw a matrix per layer, and the tree above it where it is clustered; one matrix also into axes of others."""
    most = max(len(matrix.head) for matrix in matrices)
    if most < 2:
        return _nothing(title, "Every layer has a single head: within layers there is nothing to compare.")

    rows, columns = panel_grid(len(matrices))
    clustered = any(matrix.tree is not None for matrix in matrices)
    side = float(np.clip(0.32 * most, 1.5, 2.2))  # inches
    high = 1.22 * side + 0.6 if clustered else side + 0.55
    figure = figure_of(given) if given else new_figure(columns * (side + 0.35) + 1.3, rows * high + 1.1)

    # Trees have rows of axes of their own: constrained layout misjudges what is inset.
    heights = [0.22, 1] if clustered else [1]
    grid = (
        np.array([[given]])
        if given
        else figure.subplots(rows * len(heights), columns, squeeze=False, height_ratios=heights * rows)
    )
    # [rows * heights, columns] -> [panels, heights]
    panels = grid.reshape(rows, len(heights), columns).transpose(0, 2, 1).reshape(-1, len(heights))

    values = np.concatenate([matrix.values.ravel() for matrix in matrices])
    scale = colour_scale(values, diverging)
    for (*above, axes), matrix in zip(panels, matrices, strict=False):
        paint(axes, matrix, scale, side)
        mark_heads(axes, [str(number) for number in matrix.head], side)
        for tree in above:
            axes.set_aspect("auto")
            draw_tree(tree, matrix, tallest(*matrices), ticks=False)
        topmost = above[0] if above else axes
        topmost.set_title(f"layer {matrix.layer[0]}", fontsize=9 * zoom(figure, given), pad=4)
    for axes in panels[len(matrices) :].flat:
        axes.set_axis_off()

    bar = figure.colorbar(scale, ax=list(grid.flat), fraction=0.03, pad=0.02, aspect=30, extend=_extend(scale, values))
    bar.set_label(label, size=10 * zoom(figure, given))
    about = "Rows and columns: heads of the layer"
    if clustered:
        about += f", in order of average linkage of 1 - similarity (trees: 0 to {tallest(*matrices):.2f})"
    if given:
        title = f"{title}, {topmost.get_title()}"
        topmost.set_title("")
    write_title(figure, title, f"{about}. {caption(*matrices)}", given)
    return figure


def _nothing(title: str, why: str) -> Figure:
    """Return a figure that says why it is empty."""
    figure = new_figure(6, 2)
    axes = figure.add_subplot()
    axes.set_axis_off()
    say_nothing_there(axes, why)
    write_title(figure, title, "")
    return figure


def _in_order(values: FloatArray, layer: IntArray, head: IntArray, floor: FloatArray | None) -> Matrix:
    """Return the matrix of all heads in order of (layer, head)."""
    return Matrix(values, floor, layer, head).of(np.lexsort((head, layer)))


def _side(heads: int) -> float:
    """Return the inches of a whole model's matrix."""
    return float(np.clip(0.31 * heads, 3.6, 10.5))


def _extend(scale: ScalarMappable, values: FloatArray) -> str:
    """Return whether the colour bar is to show that some values lie below its end."""
    lowest = scale.norm.vmin or 0
    return "min" if (values[np.isfinite(values)] < lowest).any() else "neither"


def _between_layers(values: FloatArray, layer: IntArray) -> bool:
    """Return whether any pair of heads of two layers has a value."""
    different = layer[:, None] != layer  # [heads, heads]
    return bool(np.isfinite(values[different]).any())
