"""The tables that `compare` prints: the runs, whether masks rank alike, and what each mask costs in each run."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from headprobe.report.table import MOST_ROWS, p_value, plain_table
from headprobe.run.ablations import DROP_PP, NLL_RISE, with_limits
from headprobe.run.comparison.pairs import Pair
from headprobe.run.load import Row, RunFiles

WORDS = {
    NLL_RISE: ("NLL rise", "nats", "+.3f"),
    DROP_PP: ("top-1 drop", "percentage points", "+.2f"),
    "feature_distance": ("feature distance", "relative", ".3f"),
    "feature_cosine": ("feature cosine", "", ".4f"),
}
"""What a quantity is called, its unit, and how it is written."""


def runs_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Return a line for each run: its model, its data, and the whole model's accuracy."""
    table = plain_table("runs")
    for heading in ("run", "model", "data"):
        table.add_column(heading, overflow="fold")
    for heading in ("images", "classes", "top-1 %", "NLL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run, name in zip(runs, names, strict=True):
        model, data, baseline = run.record["model"], run.record.get("data") or {}, run.masks[0]
        where = " ".join(str(data[key]) for key in ("path", "split") if data.get(key))
        among = data.get("chosen_among")
        scores = [f"{100 * float(baseline['top1']):.2f}", f"{float(baseline['nll']):.4f}"] if "top1" in baseline else []
        cells = [str(model.get("title", model["name"])), where, f"{int(baseline['images']):,}"]
        cells += [f"{among:,}" if isinstance(among, int) else "", *scores]
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


def ranks_table(rows: Sequence[Row]) -> Table:
    """Return a line for each form of masks of each two runs, from the rows of `compare_ranks.csv`."""
    table = plain_table("do masks rank alike")
    several = len({(row["run_a"], row["run_b"]) for row in rows}) > 1
    for heading in (*(["runs"] if several else []), "masks"):
        table.add_column(heading, overflow="fold")
    for heading in ("ablation", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Spearman [95%]", "ceiling", "Kendall [95%]", "differ"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ceiling = float(row["ceiling"])
        table.add_row(
            *([Text(f"{row['run_a']} | {row['run_b']}")] if several else []),
            Text(f"{row['masks']} of {row['test_family']}" if row["test_family"] else f"{row['masks']} single"),
            str(row["ablation"]),
            WORDS[str(row["quantity"])][0],
            with_limits(row, "spearman", "+.2f"),
            "" if math.isnan(ceiling) else f"{ceiling:.2f}",
            with_limits(row, "kendall", "+.2f"),
            "" if math.isnan(float(row["masks_differing"])) else f"{row['masks_differing']} of {row['masks']}",
        )
    table.caption_justify = "left"
    table.caption = "differ: masks with q (BH) of at most 0.05\nceiling: what the noise of two samples allows"
    return table


def masks_table(pairs: Sequence[Pair], rows: Sequence[Row], quantity: str) -> Table:
    """Return a line for each mask: what it costs in each run, and the difference of two runs that is surest.

    Of more than `MOST_ROWS` lines those with the smallest p.

    Args:
        pairs: Every two runs.
        rows: The rows of `compare.csv` of all pairs.
        quantity: Which quantity to show.
    """
    of_masks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["quantity"] == quantity:
            of_masks.setdefault((str(row["mask"]), str(row["ablation"])), []).append(row)
    surest = {key: min(own, key=_sureness) for key, own in of_masks.items()}
    shown = sorted(surest, key=lambda key: _sureness(surest[key]))[:MOST_ROWS] if len(surest) > MOST_ROWS else surest
    what, unit, form = WORDS[quantity]
    of_unit = f" in {unit}" if unit else ""
    cut = f" (the {MOST_ROWS} with the smallest p of {len(surest):,})" if len(surest) > MOST_ROWS else ""
    table = plain_table(f"{what}{of_unit}, masks side by side{cut}")
    names = list(dict.fromkeys(str(row[side]) for row in rows for side in ("run_a", "run_b")))
    table.add_column("mask", overflow="fold")
    table.add_column("ablation", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_column("difference [95%]", justify="right", no_wrap=True)
    if len(pairs) > 1:
        table.add_column("between", overflow="fold")
    for heading in ("test", "p", "q (BH)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in shown:
        values = {
            str(row[f"run_{side}"]): with_limits(row, f"value_{side}", form) for row in of_masks[key] for side in "ab"
        }
        if len(names) > 2:  # limits go below their value, to leave room
            values = {name: value.replace(" [", "\n[") for name, value in values.items()}
        row = surest[key]
        cells = [*(values.get(name, "") for name in names), with_limits(row, "b_minus_a", "+" + form.lstrip("+"))]
        cells += [f"{row['run_b']} - {row['run_a']}"] if len(pairs) > 1 else []
        table.add_row(Text(key[0]), key[1], *(Text(cell) for cell in cells), str(row["test"]), *_tested(row))
    return table


def _tested(row: Row) -> tuple[str, str]:
    return p_value(float(row["p"])), p_value(float(row["bh_q"]))


def _sureness(row: Row) -> tuple[float, float]:
    """Return what the surest difference is the smallest of: p, and of equal ones the larger difference."""
    p, difference = float(row["p"]), float(row["b_minus_a"])
    return 2.0 if math.isnan(p) else p, 0.0 if math.isnan(difference) else -abs(difference)
