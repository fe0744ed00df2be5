"""The map of heads, coloured by any column, and the card of each head."""

from collections.abc import Sequence

from headprobe.report.page.section import Section
from headprobe.run.load import RunFiles


def section(runs: Sequence[RunFiles]) -> Section | None:
    """Return the map of the heads of every run."""
    data = {"runs": [{"heads_per_layer": run.record["model"]["heads_per_layer"]} for run in runs]}
    return Section(
        key="heads",
        title="Every head",
        look_at="Dark cells are heads that cost much when they alone are masked; click a head for its card.",
        definition="What the model loses with one head masked, against the same model on the same images.",
        link="results.md#maskscsv",
        data=data,
        sources=["masks.csv"],
    )
