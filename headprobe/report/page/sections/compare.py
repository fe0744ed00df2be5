"""The same masks in one run and in another: what they cost, how sure the difference is, whether they rank alike."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.agreement import FEWEST_ORDERED
from headprobe.report.page.first import names_of
from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import SCRIPTS, by_column, head_name, short
from headprobe.run.comparison.names import names_of_runs
from headprobe.run.comparison.pairs import Measured, Pair, measured, pair_of
from headprobe.run.comparison.tables import LEVEL, first_family, mask_rows, rank_rows
from headprobe.run.load import Row, RunFiles
from headprobe.run.results import FAMILIES_JOINED

QUANTITIES = {
    "nll_rise": {"name": "NLL rise", "unit": "nats"},
    "drop_pp": {"name": "top-1 drop", "unit": "pp"},
    "feature_distance": {"name": "feature distance", "unit": ""},
    "feature_cosine": {"name": "feature cosine", "unit": ""},
}
"""What is compared, and its unit."""

SHOWN = (
    *("mask", "ablation", "quantity"),
    *(f"{name}{end}" for name in ("value_a", "value_b", "b_minus_a") for end in ("", "_low", "_high")),
    *("p", "bh_q"),
)
"""Columns of `compare.csv` that the page draws."""

RANKS = (
    *("test_family", "ablation", "quantity", "masks", "masks_differing"),
    *("spearman", "spearman_low", "spearman_high", "ceiling"),
)

MOST_MASKS = 200
"""Forms of more masks, such as all pairs of heads, are left to `headprobe compare`."""

MOST_NAMED = 2
"""Masks of so many heads at most are marked with them."""


def compare(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of every two runs that can be compared, from `masks.csv` and `groups.npz`."""
    # Shorter than the page's names, and by data where these are what tells the runs apart.
    names = names_of_runs(runs)
    on_page = dict(zip(names, names_of(runs), strict=True))
    found = [own for run, name in zip(runs, names, strict=True) if (own := _measured(run, name))]
    pairs, refused = [], []
    for one, other in combinations(found, 2):
        try:
            pair = pair_of(one, other)
        except UsageError as error:
            refused.append(f"{one.name} and {other.name} are not compared: {str(error).partition(';')[0]}.")
            continue
        if shown := _pair(pair):
            called = [f"{name} is {on_page[name]}" for name in (one.name, other.name) if name not in on_page[name]]
            pairs.append({"a": one.name, "b": other.name, **shown, "said": [*called, *pair.said]})
        else:
            refused.append(f"{one.name} and {other.name} share no form of {FEWEST_ORDERED} to {MOST_MASKS} masks.")
    if not pairs:
        return None
    return Section(
        key="compare",
        title="The same masks in one run and in another",
        short="Compare",
        look_at=(
            "Dots far from the diagonal: masks that cost one run more than the other. Rings: the difference is "
            f"significant at q of at most {LEVEL}, of all masks of the form."
        ),
        definition=(
            "Differences are means over images with 95% intervals from 64 groups of images: paired where both runs "
            "judged the very same images, else Welch's; Spearman's rank correlation has an interval over images."
        ),
        link="compare.md#comparecsv",
        data={"pairs": pairs, "quantities": QUANTITIES, "refused": refused, "level": LEVEL},
        sources=("masks.csv", "groups.npz", "run.json"),
        scripts=SCRIPTS,
    )


def _measured(run: RunFiles, name: str) -> Measured | None:
    """Return what a run measured; None where it has nothing to compare."""
    try:
        return measured(run, name)
    except UsageError:
        return None


def _pair(pair: Pair) -> dict[str, Any] | None:
    """Return what the page shows of two runs; None without a form of masks."""
    rows = mask_rows(pair)
    ranks = rank_rows(pair, rows)
    families = {
        family: masks
        for family in dict.fromkeys(str(row["test_family"]) for row in ranks)
        if 0 < len(masks := _members(rows, family)) <= MOST_MASKS
    }
    if not families:
        return None
    drawn = {mask for masks in families.values() for mask in masks}
    shown = [row for row in rows if row["mask"] in drawn]
    first = first_family(shown)
    table = by_column(shown, SHOWN)
    return {
        "test": pair.test,
        "why": pair.other_rows,
        "first": first if first in families else next(iter(families)),
        "families": [{"family": family, "masks": masks, **_places(pair, masks)} for family, masks in families.items()],
        "rows": {name: short(values) if _is_number(name) else values for name, values in table.items()},
        "ranks": by_column([row for row in ranks if row["test_family"] in families], RANKS),
    }


def _is_number(name: str) -> bool:
    return name not in ("mask", "ablation", "quantity")


def _members(rows: Sequence[Row], family: str) -> list[str]:
    """Return the masks of a form."""
    return list(
        dict.fromkeys(str(row["mask"]) for row in rows if family in str(row["test_family"]).split(FAMILIES_JOINED))
    )


def _places(pair: Pair, masks: Sequence[str]) -> dict[str, Any]:
    """Return the layer of each mask, None of several, and the heads of small ones."""
    heads = [pair.first.run.heads[mask] for mask in masks]
    layers = [{layer for layer, _ in own} for own in heads]
    few = all(len(own) <= MOST_NAMED for own in heads)
    return {
        "layers": [next(iter(own)) if len(own) == 1 else None for own in layers],
        "heads": [" ".join(head_name(*head) for head in own) for own in heads] if few else None,
    }
