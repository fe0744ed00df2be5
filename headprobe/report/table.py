"""The tables that `test` prints: what each mask costs, and what the heads of each layer are like."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headprobe.masks.ablations import ZERO
from headprobe.masks.spec import NONE
from headprobe.run.ablations import NLL_RISE, main_quantity, with_limits
from headprobe.run.index_null import FEWEST_DRAWS, lacking
from headprobe.run.load import JUDGED_ON_SAME, SAME, Cell, Row, main_cost
from headprobe.run.order_areas import DROPS
from headprobe.text import counted

MOST_ROWS = 40
"""A longer table shows the masks with the largest drops; all of them are in `masks.csv`."""

FEW_IMAGES = 200
"""With fewer images the intervals of the NLL may be too narrow: docs/results.md says how much."""

MOST_SCORES = 5
"""A run shows so many scores under each ablation, the best; all of them are in `importance.csv`."""

SMALLEST_P = 1e-300
"""A p below it, which a float may round to 0, is shown as below it."""

WIDTH_OF_FILES = 120
"""Columns of a line where the output is no terminal."""

console = Console(highlight=False)
if not console.is_terminal:
    console.width = WIDTH_OF_FILES


def masks_table(rows: Sequence[Row], model: str, width: int | None = None) -> Table:
    """Return the printable form of `masks.csv`; of more than `MOST_ROWS` rows those with the largest drops.

    A mask has a line for each ablation. Of several draws the line is draw 0's, and says how the drops of all spread.

    Args:
        rows: Rows of `masks.csv`, the baseline first.
        model: The model's name.
        width: Columns of the terminal; where the table is wider, the numbers of heads and top-5 are left out.
    """
    of_masks = _by_mask(rows)
    title = f"{model}, {counted(int(rows[0]['images']), 'image')}"
    if sum(map(len, of_masks)) >= MOST_ROWS:
        total, several = len(of_masks), any(len(lines) > 1 for lines in of_masks)
        of_masks = _largest_drops(of_masks)
        under = " under any ablation" if several else ""
        cost = "drops" if "drop_pp" in rows[0] else "distances"
        title += f" (the {len(of_masks)} largest {cost} of {total:,} masks{under})"
    if any(row.get("calibration") == SAME for row in rows):
        title += f", {JUDGED_ON_SAME}"
    shown = [rows[0], *(row for lines in of_masks for row in lines)]

    left_out = set() if any(row["test_family"] for row in rows) else {"q (BH)"}
    if with_top1 := "top1" in rows[0]:
        left_out |= {"cosine", "distance [95%]"}
    if all(row["ablation"] == ZERO for row in rows[1:]):
        left_out.add("ablation")
    spreads = _spreads(rows)
    table = _table(title, shown, spreads, left_out)
    if console.measure(table).maximum > (width or console.width):
        table = _table(title, shown, spreads, left_out | {"heads", "top-5 %", "cosine"})
    spread_of = "drop" if with_top1 else "distance"
    notes = [f"{spread_of} of draws: mean and standard deviation over draws; all else is of draw 0"] if spreads else []
    if not with_top1:
        notes.append("of the pooled feature, masked against unmasked: mean cosine, and mean distance over its length")
    if int(rows[0]["images"]) < FEW_IMAGES and len(rows) > 1 and with_top1:
        notes.append(f"under {FEW_IMAGES} images the intervals of nll_rise may be too narrow")
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def agreement_table(rows: Sequence[Row]) -> Table:
    """Return a line for each two ablations of a test family, from the rows of `ablations.csv`."""
    main = main_quantity({row["quantity"] for row in rows})
    what = "NLL rise, and what the rises sum to, in nats" if main == NLL_RISE else "how far the feature moves"
    table = plain_table(f"kinds of ablation: how the same masks rank by {what}")
    if any(row.get("calibration") == SAME for row in rows):
        table.caption, table.caption_justify = JUDGED_ON_SAME, "left"
    for heading in ("ablations", "masks"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Spearman [95%]", "sums", "difference [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["quantity"] != main:
            continue
        table.add_row(
            f"{row['ablation_a']}, {row['ablation_b']}",
            f"{row['masks']} of {row['test_family']}",
            with_limits(row, "spearman", "+.2f"),
            f"{float(row['sum_a']):.3f}, {float(row['sum_b']):.3f}",
            with_limits(row, "b_minus_a", "+.3f"),
        )
    return table


def importance_table(rows: Sequence[Row]) -> Table:
    """Return for each ablation the scores that predict best what single heads cost, from the rows of `importance.csv`.

    Each line also has the score's correlation within layers; the last line of an ablation has the ceilings.
    """
    main = main_quantity({row["target"] for row in rows})
    rises = [row for row in rows if row["target"] == main]
    best = [row for row in rises if row["scope"] == "all"]
    inside = {(row["ablation"], row["score"], row["rows"]): row for row in rises if row["scope"] != "all"}
    scores = len({(row["score"], row["rows"]) for row in best})
    judged = counted(int(best[0]["images_judged"]), "image")
    measured = max(int(row["heads"]) + int(row["heads_without_score"]) for row in best)
    what = "the NLL rise" if main == NLL_RISE else "how far the feature moves"
    title = f"which score of a head predicts {what} without it: {measured} heads, judged on {judged}"
    table = plain_table(title)
    for heading in ("ablation", "score"):
        table.add_column(heading, no_wrap=True)
    for heading in ("chosen on", "Spearman [95%]", "within layers [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ablation in dict.fromkeys(str(row["ablation"]) for row in best):
        own = [row for row in best if row["ablation"] == ablation]
        for row in own[:MOST_SCORES]:
            within = inside[ablation, row["score"], row["rows"]]
            numbers = (with_limits(one, "spearman", "+.2f") for one in (row, within))
            table.add_row(ablation, str(row["score"]), _chosen_on(row), *numbers)
        ceilings = (_ceiling(row) for row in (own[0], inside[ablation, own[0]["score"], own[0]["rows"]]))
        table.add_row(ablation, "(ceiling: the true order itself)", "", *ceilings, style="dim")
    notes = []
    if scores > MOST_SCORES:
        notes.append(
            f"the best {MOST_SCORES} of {scores} scores under each ablation; the rest, tau-b and drops: importance.csv"
        )
    if rows[0]["calibration"] == SAME:
        notes.append("all scores are of the same images as the rises, whose noise they may share")
    elif any(row["rows"] == "judged" for row in best):
        notes.append("judged: of the same images as the rises, whose noise such a score may share")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _chosen_on(row: Row) -> str:
    """Return on which images a score was computed, as a cell."""
    return f"{row['images_chosen']:,} {row['rows']}" if row["rows"] else "nothing"


def _ceiling(row: Row) -> str:
    return "unknown" if math.isnan(float(row["ceiling"])) else f"{float(row['ceiling']):.2f}"


def orders_table(rows: Sequence[Row]) -> Table:
    """Return a line for each order of removal, from the rows of `orders.csv`; random orders have one for their mean."""
    with_top1 = "area" in rows[0]
    under = "accuracy curve, and heads removed until the drop is larger" if with_top1 else "mean cosine of the feature"
    table = plain_table(f"orders of removal: area under the {under}")
    kinds = {str(row["ablation"]) for row in rows}
    table.add_column("order", overflow="fold")
    if len(kinds) > 1:
        table.add_column("ablation")
    columns = DROPS if with_top1 else ()
    for heading in ("area [95%]", "minus random [95%]", *(f"{most} pp (surely)" for most in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    means = {str(row["order"]) for row in rows if int(row["orders"]) > 1}
    for row in rows:
        if any(str(row["order"]).startswith(f"{mean}_seed_") for mean in means):
            continue
        name = f"{row['order']}, mean of {row['orders']}" if int(row["orders"]) > 1 else str(row["order"])
        begins = "" if with_top1 else "feature_"
        minus = with_limits(row, f"{begins}minus_random", "+.4f").replace("not defined", "")
        cells = [with_limits(row, f"{begins}area", ".4f"), minus, *(_removable(row, most) for most in columns)]
        table.add_row(Text(name), *([str(row["ablation"])] * (len(kinds) > 1)), *cells)
    return table


def _removable(row: Row, most: float) -> str:
    surely = float(row[f"removable_{most}pp_surely"])
    return f"{row[f'removable_{most}pp']}" + ("" if math.isnan(surely) else f" ({surely:.0f})")


def index_table(rows: Sequence[Row], layers: int) -> Table:
    """Return a line for each head index beside random heads of its layers, from the rows of `index_null.csv`.

    Args:
        rows: The rows.
        layers: How many layers the model has.
    """
    table = plain_table("the same index in every layer, beside one random head of each of these layers")
    for heading in ("mask", "ablation", "draws"):
        table.add_column(heading, no_wrap=True)
    for heading in ("", "mask's", "draws' [95% of them]", "percentile", "p", "q (BH)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        middle, low, high = (float(row[f"draws_{name}"]) for name in ("mean", "low", "high"))
        form = "+.2f" if row["quantity"] == "drop_pp" else "+.3f"
        table.add_row(
            str(row["mask"]),
            str(row["ablation"]),
            f"{row['draws']} over layers {row['layers']}",
            {"drop_pp": "drop pp", "nll_rise": "NLL rise"}.get(str(row["quantity"]), "distance"),
            f"{float(row['value']):{form}}",
            f"{middle:{form}} [{low:{form}}, {high:{form}}]" if int(row["draws"]) else "",
            f"{float(row['percentile']):.1f}" if int(row["draws"]) else "",
            p_value(float(row["p"])),
            p_value(float(row["bh_q"])),
        )
    table.caption, table.caption_justify = "\n".join(_about_p(rows, layers)), "left"
    return table


def _about_p(rows: Sequence[Row], layers: int) -> list[str]:
    """Return what the p of `index_null.csv` can and cannot be."""
    notes = []
    if enough := [row for row in rows if int(row["draws"]) >= FEWEST_DRAWS]:
        smallest, indices = max(float(row["p_smallest"]) for row in enough), len({row["mask"] for row in enough})
        q = f"a single index out of {indices} can have q {min(1, smallest * indices):.3f}"
        notes.append(f"smallest p that so many draws allow: {smallest:.3f}; {q}")
    if few := lacking(rows, layers):
        notes.append(f"no p with fewer than {FEWEST_DRAWS} draws; add {', '.join(few)} to the mask specs")
    return notes


def plain_table(title: str) -> Table:
    """Return a table without lines, at least as wide as its title, which would be folded."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1),
        min_width=len(title),
    )


def _by_mask(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the lines of each mask, one for each ablation: of several draws the first."""
    found: dict[str, list[Row]] = {}
    for row in rows[1:]:
        if not row["draw"]:
            found.setdefault(str(row["mask"]), []).append(row)
    return list(found.values())


def _largest_drops(of_masks: Sequence[list[Row]]) -> list[list[Row]]:
    """Return the masks with the largest drops under any of their ablations, as many as have room; at least one."""
    ordered = sorted(of_masks, key=lambda lines: -max(float(row[main_cost(row)]) for row in lines))
    return ordered[: max(1, (MOST_ROWS - 1) // max(map(len, of_masks)))]


def _spreads(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Return by mask and ablation the drops of its draws in short, where it has several."""
    drops: dict[tuple[str, str], list[float]] = {}
    for row in rows[1:]:
        drops.setdefault((str(row["mask"]), str(row["ablation"])), []).append(float(row[main_cost(row)]))
    several = {key: own for key, own in drops.items() if len(own) > 1}
    form = "+.2f" if "drop_pp" in rows[0] else ".3f"
    return {
        key: f"{np.mean(own):{form}} ± {np.std(own, ddof=1):{form.strip('+')}} ({len(own)})"
        for key, own in several.items()
    }


def layers_table(heads_per_layer: Sequence[int], columns: Mapping[str, ArrayLike]) -> Table:
    """Return one line per layer, each number a mean over its heads.

    Args:
        heads_per_layer: Heads of each layer.
        columns: By heading one number per layer, NaN where it is not defined.
    """
    title = "heads of the unmasked model, means by layer"
    table = plain_table(title)
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


def _table(title: str, rows: Sequence[Row], spreads: Mapping[tuple[str, str], str], left_out: set[str]) -> Table:
    """Lay out the rows without some of the columns; with how draws spread, where there are several."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    cells = [_cells(row) for row in rows]
    for row, own in zip(rows, cells, strict=True) if spreads else ():
        name = "drop of draws" if "drop_pp" in row else "distance of draws"
        own[name] = spreads.get((str(row["mask"]), str(row["ablation"])), "")
    for heading in (name for name in cells[0] if name not in left_out):
        # a mask is looked up in masks.csv by its whole name: names are folded, never cut
        left = heading in ("mask", "ablation")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "mask", overflow="fold")
    for own in cells:
        table.add_row(*(cell for name, cell in own.items() if name not in left_out))
    return table


def _cells(row: Row) -> dict[str, str | Text]:
    baseline = row["mask"] == NONE
    key: dict[str, str | Text] = {
        "mask": Text("baseline" if baseline else str(row["mask"]), style="dim" if baseline else ""),
        "ablation": "" if baseline else str(row["ablation"]),
        "heads": "" if baseline else str(row["heads_masked"]),
    }
    moved: dict[str, str | Text] = {
        "cosine": "" if baseline else _number(row.get("feature_cosine"), ".4f"),
        "distance [95%]": "" if baseline or "feature_distance" not in row else _distance(row),
    }
    if "top1" not in row:
        return key | moved
    scores: dict[str, str | Text] = {
        "top-1 %": f"{100 * float(row['top1']):.2f}",
        "top-5 %": f"{100 * float(row['top5']):.2f}",
        "NLL": f"{float(row['nll']):.4f}",
        "drop pp [95%]": "" if baseline else _interval(row),
        "p": p_value(float(row["mcnemar_p"])),
        "q (BH)": p_value(float(row["bh_q"])),
    }
    return key | scores


def _number(value: Cell | None, form: str) -> str:
    return "" if value is None or math.isnan(float(value)) else f"{float(value):{form}}"


def _distance(row: Row) -> str:
    middle, low, high = (float(row[f"feature_distance{end}"]) for end in ("", "_low", "_high"))
    return "" if math.isnan(middle) else f"{middle:.4f} [{low:.4f}, {high:.4f}]"


def _interval(row: Row) -> str:
    drop, low, high = (float(row[name]) for name in ("drop_pp", "drop_low_pp", "drop_high_pp"))
    return f"{drop:+.2f} [{low:+.2f}, {high:+.2f}]"


def p_value(value: float) -> str:
    """Return a p-value or q as a cell, empty where there is none."""
    if math.isnan(value):
        return ""
    if value < SMALLEST_P:
        return f"<{SMALLEST_P:.0e}"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
