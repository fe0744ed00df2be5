"""What the figures have in common: colours, sizes, titles and how a grid of panels is laid out."""

import math
import textwrap
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

VALUE_COLOURS = "viridis"
CHANGE_COLOURS = "RdBu_r"  # diverging: red above 0, blue below

BASELINE_COLOUR = "#0f5fa6"
MASKED_COLOUR = "#d95f02"

HEAD_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
"""Ten colours that the colour-blind can distinguish (Petroff, 2021, https://arxiv.org/abs/2107.02270)."""

HEAD_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
"""Line styles of heads 0-9, 10-19, 20-29, 30-39; then colours and styles begin anew."""

MISSING_CELL: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.7", "hatch": "//////"}

MOST_INCHES = 38.0
"""Longest side of a figure: 5,700 pixels at the 150 dots per inch that runs save."""

TITLE_SIZE, SMALL_TITLE_SIZE, CAPTION_SIZE = 11.0, 9.0, 8.5

LETTER = 0.57
"""Width of a letter as a part of its font's size, a little more than the mean of matplotlib's default font."""


FIGURES: ContextVar[Callable[..., Figure]] = ContextVar("FIGURES", default=Figure)
"""What makes an empty figure. Where a notebook is to show it, pyplot does, which keeps it until it is closed."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; `width` and `height` in inches, cut at `MOST_INCHES`."""
    return FIGURES.get()(figsize=(min(max(width, 4.5), MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")


def one_axes(given: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Return a new figure of this size with one axes; or the axes that were given, with their figure."""
    if given is None:
        figure = new_figure(width, height)
        return figure, figure.add_subplot()
    return figure_of(given), given


def figure_of(axes: Axes) -> Figure:
    """Return the whole figure that axes are in, also those of a subfigure."""
    figure: Any = axes.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


def write_title(figure: Figure, title: str, caption: str, given: Axes | None = None) -> None:
    """Write the title above and the caption below, both from the left edge and broken into lines that fit.

    Above axes that were given stands their own title alone: the rest of the figure is not ours.
    """
    if given is not None:
        width = given.get_position().width * figure.get_size_inches()[0]
        given.set_title(_wrapped(title, max(width, 2.5), SMALL_TITLE_SIZE), loc="left", fontsize=SMALL_TITLE_SIZE)
        return
    width, _ = figure.get_size_inches()
    size = TITLE_SIZE * zoom(figure)
    figure.suptitle(_wrapped(title, width, size), x=0.01, ha="left", fontsize=size)
    if caption:
        size = CAPTION_SIZE * zoom(figure)
        text = _wrapped(caption, width, size)
        figure.supxlabel(text, x=0.01, ha="left", multialignment="left", fontsize=size, color="0.3")


def zoom(figure: Figure, given: Axes | None = None) -> float:
    """Return the factor of font sizes: larger in a wide figure of ours, which will be shown smaller."""
    if given is not None:
        return 1.0
    width, _ = figure.get_size_inches()
    return float(np.clip(width / 10, 1, 1.8))


def panel_grid(count: int) -> tuple[int, int]:
    """Return rows and columns for `count` panels: somewhat wider than high, with few places left empty."""
    least = max(math.ceil(math.sqrt(count)), 1)
    widths = range(least, math.ceil(1.7 * least) + 1)
    columns = min(widths, key=lambda wide: (-count % wide, wide))  # fewest empty places, then narrowest
    return math.ceil(count / columns), columns


def some(count: int, most: int) -> range:
    """Return at most `most` evenly spaced numbers below `count`, from 0 on."""
    return range(0, count, max(math.ceil(count / most), 1))


def say_nothing_there(axes: Axes, text: str) -> None:
    """Write in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="0.4", wrap=True)


def _wrapped(text: str, width: float, size: float) -> str:
    """Break lines so that they fit into a width in inches, at a font size in points (72 an inch)."""
    letters = int(width * 0.97 * 72 / (size * LETTER))
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())
