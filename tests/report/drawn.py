"""Saves figures as runs do, so that tests can look at what came out."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

Colour = tuple[int, int, int]

RUN_DPI = 150  # of the PNG files that runs leave
TEST_DPI = 60  # the layout is the same, and drawn sooner


@dataclass(frozen=True)
class Drawn:
    """A saved figure."""

    png: bytes
    misplaced: list[str]  # what leaves the figure's edges, and axes that touch the title or the caption


def drawn(figure: Figure) -> Drawn:
    """Save a figure, any warning being an error, and look for what is out of its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=TEST_DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    written = [text for text in figure.texts if text.get_text()]
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in written}
    for number, axes in enumerate(figure.axes):
        box = axes.get_tightbbox(renderer)
        if box is not None:
            boxes[f"axes {number}"] = box
    edges = figure.bbox.padded(2)
    names = [name for name, box in boxes.items() if not (edges.containsx(box.x0) and edges.containsx(box.x1))]
    names += [name for name, box in boxes.items() if not (edges.containsy(box.y0) and edges.containsy(box.y1))]
    around = [boxes[text] for text in (figure.get_suptitle(), figure.get_supxlabel()) if text]
    names += [name for name, box in boxes.items() if name.startswith("axes") and box.count_overlaps(around)]
    return Drawn(file.getvalue(), names)


def pixels(figure: Figure) -> int:
    """Return the longer side of the PNG that a run would save, without drawing it."""
    return int(max(figure.get_size_inches()) * RUN_DPI)


def near(colour: Colour, other: Colour) -> bool:
    """Say whether two colours are the same but for rounding."""
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= 2


def is_grey(colour: Colour) -> bool:
    """Say whether a colour belongs to the hatched background."""
    return max(colour) - min(colour) < 4 and 150 < colour[0] < 250


def pixel(figure: Figure, x: float, y: float, axes: int = 0) -> Colour:
    """Return the colour drawn at data coordinates of one of the figure's axes, 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    column, row = figure.axes[axes].transData.transform((x, y))
    rgba = np.asarray(canvas.buffer_rgba())
    red, green, blue, _ = rgba[rgba.shape[0] - 1 - round(row), round(column)].tolist()
    return red, green, blue


def texts(figure: Figure) -> list[str]:
    """Return all texts of a figure."""
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def caption(figure: Figure) -> str:
    """Return the text below a figure, in one line."""
    return figure.get_supxlabel().replace("\n", " ")
