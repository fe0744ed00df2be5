"""What heads and layers are worth together: Shapley values, and interactions of two."""

from collections.abc import Sequence
from typing import Any

from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import QUANTITIES, SCRIPTS, coded, columns_of, of_runs, short
from headprobe.run.interactions import CLEAR_Q
from headprobe.run.load import Columns, RunFiles

VALUES = (
    *("players", "ablation", "quantity", "layer", "head", "images", "orders", "reversed"),
    *("value", "value_low", "value_high", "value_se_orders", "value_se_images"),
)

TOGETHER = ("kind", "ablation", "quantity", "rise_both", "interaction", "interaction_low", "interaction_high", "bh_q")

SHAPLEY, INTERACTIONS = "shapley.csv", "interactions.csv"


def worth(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of Shapley values and interactions, from `shapley.csv` and `interactions.csv`."""
    found = of_runs(runs, _worth)
    if found is None:
        return None
    return Section(
        key="worth",
        title="What heads are worth together",
        short="Together",
        look_at=(
            "Heads whose share is large though the model hardly misses them alone, and pairs that cost more together "
            "than their sum: one stands in for the other."
        ),
        definition=(
            "A Shapley value is the mean, over orders of removal, of what the loss rises when this head goes; the "
            "values add up to the loss of all heads. An interaction is the rise without both minus both single rises. "
            "Heads of a layer stand in their order from the left. Intervals are 95%; a clear interaction has q below "
            f"{CLEAR_Q}."
        ),
        link="results.md#shapleycsv",
        data={"runs": found, "quantities": QUANTITIES, "clear_q": CLEAR_Q},
        sources=(SHAPLEY, INTERACTIONS),
        scripts=SCRIPTS,
    )


def _worth(run: RunFiles) -> dict[str, Any] | None:
    values, together = run.table(SHAPLEY), run.table(INTERACTIONS)
    if not values and not together:
        return None
    return {
        "values": columns_of(values, VALUES) if values else None,
        "together": _pairs(together) | columns_of(_shorter(together), TOGETHER) if together else None,
    }


def _shorter(table: Columns) -> Columns:
    """Return the table with fewer digits: heads of a layer have many pairs."""
    return {name: short(values) if values.dtype.kind == "f" else values for name, values in table.items()}


def _pairs(table: Columns) -> dict[str, Any]:
    """Return which two parts each row is of, coded: `3.1|3.2` of heads, `3|4` of layers, else the masks' names."""
    names = ("mask_a", "layer_a", "head_a", "mask_b", "layer_b", "head_b")
    cells = zip(*(table[name].tolist() for name in names), strict=True)
    pairs = [[_part(*row[:3]), _part(*row[3:])] for row in cells]
    first, second = (coded(own) for own in zip(*pairs, strict=True))
    return {"a": first, "b": second}


def _part(mask: str, layer: float, head: float) -> str:
    """Return what the page calls a part: of a head `3.1`, of a whole layer `3`, of any other set the mask's name."""
    if layer != layer:  # NaN
        return mask
    return f"{int(layer)}" if head != head else f"{int(layer)}.{int(head)}"
