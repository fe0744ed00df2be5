"""The table that `test` prints: what each mask costs, with its interval and p-value."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headprobe.run.results import BASELINE, Row

MOST_ROWS = 40
"""A longer table shows the masks with the largest drops; all of them are in `masks.csv`."""

console = Console(highlight=False)


def masks_table(rows: Sequence[Row], model: str) -> Table:
    """Return the printable form of `masks.csv`; of more than `MOST_ROWS` rows those with the largest drops."""
    shown = list(rows)
    if len(rows) > MOST_ROWS:
        worst = sorted(rows[1:], key=lambda row: -_number(row["drop_pp"]))[: MOST_ROWS - 1]
        shown = [rows[0], *worst]
    families = any(row["family"] for row in rows)
    title = f"{model}, {rows[0]['images']:,} images"
    if len(shown) < len(rows):
        title += f" (the {len(shown) - 1} largest drops of {len(rows) - 1:,} masks)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    for heading in (
        "mask",
        "heads",
        "top-1 %",
        "top-5 %",
        "NLL",
        "drop pp [95%]",
        "p",
        *(["q (BH)"] if families else []),
    ):
        table.add_column(heading, justify="left" if heading == "mask" else "right", no_wrap=heading != "mask")
    for row in shown:
        table.add_row(*_cells(row, families))
    return table


def _cells(row: Row, families: bool) -> list[str | Text]:
    baseline = row["mask"] == BASELINE
    cells: list[str | Text] = [
        Text("baseline" if baseline else str(row["mask"]), style="dim" if baseline else ""),
        "" if baseline else str(row["heads_masked"]),
        f"{100 * _number(row['top1']):.2f}",
        f"{100 * _number(row['top5']):.2f}",
        f"{_number(row['nll']):.4f}",
        "" if baseline else _interval(row),
        _p_value(row["mcnemar_p"]),
    ]
    return [*cells, _p_value(row["bh_q"])] if families else cells


def _interval(row: Row) -> str:
    low, high = _number(row["drop_low_pp"]), _number(row["drop_high_pp"])
    return f"{_number(row['drop_pp']):+.2f} [{low:+.2f}, {high:+.2f}]"


def _p_value(cell: Any) -> str:
    value = _number(cell)
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _number(cell: Any) -> float:
    return float(cell)
