"""The tables that `test` prints: what each mask costs, and what the heads of each layer are like."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headprobe.masks.spec import NONE
from headprobe.run.load import Row
from headprobe.text import counted

MOST_ROWS = 40
"""A longer table shows the masks with the largest drops; all of them are in `masks.csv`."""

FEW_IMAGES = 200
"""With fewer images the intervals of the NLL may be too narrow: docs/results.md says how much."""

SMALLEST_P = 1e-300
"""A p below it, which a float may round to 0, is shown as below it."""

WIDTH_OF_FILES = 120
"""Columns of a line where the output is no terminal."""

console = Console(highlight=False)
if not console.is_terminal:
    console.width = WIDTH_OF_FILES


def masks_table(rows: Sequence[Row], model: str, width: int | None = None) -> Table:
    """Return the printable form of `masks.csv`; of more than `MOST_ROWS` rows those with the largest drops.

    Args:
        rows: Rows of `masks.csv`, the baseline first.
        model: The model's name.
        width: Columns of the terminal; where the table is wider, the numbers of heads and top-5 are left out.
    """
    shown = list(rows)
    title = f"{model}, {counted(int(rows[0]['images']), 'image')}"
    if len(rows) > MOST_ROWS:
        worst = sorted(rows[1:], key=lambda row: -float(row["drop_pp"]))[: MOST_ROWS - 1]
        shown = [rows[0], *worst]
        title += f" (the {len(worst)} largest drops of {len(rows) - 1:,} masks)"

    tested = any(row["test_family"] for row in rows)
    table = _table(title, shown, tested, narrow=False)
    if console.measure(table).maximum > (width or console.width):
        table = _table(title, shown, tested, narrow=True)
    if int(rows[0]["images"]) < FEW_IMAGES and len(rows) > 1:
        table.caption = f"under {FEW_IMAGES} images the intervals of nll_rise may be too narrow"
        table.caption_justify = "left"
    return table


def layers_table(heads_per_layer: Sequence[int], columns: Mapping[str, ArrayLike]) -> Table:
    """Return one line per layer, each number a mean over its heads.

    Args:
        heads_per_layer: Heads of each layer.
        columns: By heading one number per layer, NaN where it is not defined.
    """
    title = "heads of the unmasked model, means by layer"
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1),
        min_width=len(title),  # a narrow table would fold its title
    )
    values = {heading: np.asarray(numbers, dtype=np.float64) for heading, numbers in columns.items()}
    for heading in ("layer", "heads", *values):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, heads in enumerate(heads_per_layer):
        table.add_row(str(layer), str(heads), *(_short(float(numbers[layer])) for numbers in values.values()))
    return table


def _short(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _table(title: str, rows: Sequence[Row], tested: bool, narrow: bool) -> Table:
    """Lay out the rows; without heads and top-5 where it must be narrow, without q where no test family is tested."""
    left_out = set()
    if narrow:
        left_out |= {"heads", "top-5 %"}
    if not tested:
        left_out.add("q (BH)")

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    cells = [_cells(row) for row in rows]
    for heading in (name for name in cells[0] if name not in left_out):
        first = heading == "mask"
        # a mask is looked up in masks.csv by its whole name: names are folded, never cut
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in cells:
        table.add_row(*(cell for name, cell in row.items() if name not in left_out))
    return table


def _cells(row: Row) -> dict[str, str | Text]:
    baseline = row["mask"] == NONE
    return {
        "mask": Text("baseline" if baseline else str(row["mask"]), style="dim" if baseline else ""),
        "heads": "" if baseline else str(row["heads_masked"]),
        "top-1 %": f"{100 * float(row['top1']):.2f}",
        "top-5 %": f"{100 * float(row['top5']):.2f}",
        "NLL": f"{float(row['nll']):.4f}",
        "drop pp [95%]": "" if baseline else _interval(row),
        "p": _p_value(float(row["mcnemar_p"])),
        "q (BH)": _p_value(float(row["bh_q"])),
    }


def _interval(row: Row) -> str:
    drop, low, high = (float(row[name]) for name in ("drop_pp", "drop_low_pp", "drop_high_pp"))
    return f"{drop:+.2f} [{low:+.2f}, {high:+.2f}]"


def _p_value(value: float) -> str:
    if math.isnan(value):
        return ""
    if value < SMALLEST_P:
        return f"<{SMALLEST_P:.0e}"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
