"""What each head is like: statistics of its attention by layer, and the spectra of its outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headprobe.report.page.section import Section
from headprobe.report.page.sections.cells import SCRIPTS, of_runs
from headprobe.report.run_figures import TITLES, UNIFORM
from headprobe.run.importance import candidates_named
from headprobe.run.load import Columns, RunFiles

FURTHER = {
    "attention_distance_raw_px": ("Attention distance, not renormalised", "distance (pixels)"),
    "entropy_all_keys_nats": ("Attention entropy over all keys", "entropy (nats)"),
    "attention_distance_ratio": ("Attention distance over that of uniform attention", "ratio"),
    "entropy_ratio": ("Attention entropy over the largest possible", "ratio"),
    "rank": ("Directions in which the output varies", "dims"),
    "kept_dims": ("Directions that hold 99% of the output", "dims"),
    "high_frequency": ("Output at the highest frequency", "delta log amplitude"),
    "contribution_high_frequency": ("Contribution at the highest frequency", "delta log amplitude"),
}
"""Titles and axes of columns that have no PNG figure."""


def attention(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the columns of `heads.csv`, a dot for each head over the layers."""
    found = of_runs(runs, _attention)
    if found is None:
        return None
    names = {**TITLES, **FURTHER}
    return Section(
        key="attention",
        title="What heads look at, by depth",
        short="Attention",
        look_at=(
            "How far heads look as layers get deeper, and heads that stand apart from their layer; the dash is what "
            "attention that looks everywhere alike would have."
        ),
        definition=(
            "A dot per head, those of a layer in their order from the left: the mean over images of the statistic "
            "chosen, with the 95% interval of that mean; the line joins the means of the layers."
        ),
        link="describe_heads.md#headscsv",
        data={"runs": found, "titles": {name: list(words) for name, words in names.items()}},
        sources=("heads.csv", "heads_change.csv"),
        scripts=SCRIPTS,
    )


def _attention(run: RunFiles) -> dict[str, Any] | None:
    described = run.described("heads")
    models = {model: _statistics(columns) for model, columns in described.items()}
    if not any(one["values"] for one in models.values()):
        return None
    masked = described.get("masked", described.get("change"))
    return {"mask": "" if masked is None else str(masked["mask"][0]), "models": models}


def _statistics(columns: Columns) -> dict[str, Any]:
    """Return every column of `heads.csv` that has a value, its standard errors, and where uniform attention is."""
    names = [name for name in candidates_named(columns) if np.isfinite(columns[name]).any()]
    uniform = {}
    for name, ratio in UNIFORM.items():
        if name in names and ratio in columns:
            with np.errstate(divide="ignore", invalid="ignore"):
                uniform[name] = columns[name] / columns[ratio]
    return {
        "layer": columns["layer"],
        "head": columns["head"],
        "values": {name: columns[name] for name in names},
        "errors": {name: columns[f"{name}_se"] for name in names if f"{name}_se" in columns},
        "uniform": uniform,
    }


def spectra(runs: Sequence[RunFiles]) -> Section | None:
    """Return the section of the spectra, from `spectrum.csv`."""
    found = of_runs(runs, _spectra)
    if found is None:
        return None
    return Section(
        key="spectra",
        title="Which frequencies heads carry",
        short="Frequencies",
        look_at=(
            "How steeply lines fall: a low end on the right means smooth output, a high one finer detail. Choose heads "
            "to see their lines stand out."
        ),
        definition=(
            "Natural logarithm of the Fourier amplitude of patch tokens minus its value at frequency 0, mean over "
            "images and channels (Park & Kim, 2022)."
        ),
        link="describe_heads.md#spectrumcsv",
        data={"runs": found},
        sources=("spectrum.csv", "spectrum_change.csv"),
        scripts=SCRIPTS,
    )


def _spectra(run: RunFiles) -> dict[str, Any] | None:
    described = run.described("spectrum")
    models = {model: _lines(columns) for model, columns in described.items()}
    if not any(models.values()):
        return None
    masked = described.get("masked", described.get("change"))
    return {"mask": "" if masked is None else str(masked["mask"][0]), "models": models}


def _lines(columns: Columns) -> list[dict[str, Any]]:
    """Return the lines of each series, profile and layer: all heads of a layer share their frequencies."""
    found = []
    for series in dict.fromkeys(columns["series"].tolist()):
        for profile in dict.fromkeys(columns["profile"].tolist()):
            for layer in np.unique(columns["layer"]):
                rows = (columns["series"] == series) & (columns["profile"] == profile) & (columns["layer"] == layer)
                if np.isfinite(columns["delta_log_amplitude"][rows]).any():
                    key = {"series": series, "profile": profile, "layer": int(layer)}
                    found.append(key | _of_layer({name: values[rows] for name, values in columns.items()}))
    return found


def _of_layer(columns: Columns) -> dict[str, Any]:
    """Return the heads of a layer, -1 for the stream, its frequencies, and `[heads, frequencies]` of each number."""
    heads, frequencies = np.unique(columns["head"]), np.unique(columns["frequency"])
    shape = (len(heads), len(frequencies))
    place = np.searchsorted(heads, columns["head"]), np.searchsorted(frequencies, columns["frequency"])
    found: dict[str, Any] = {"heads": heads.astype(int).tolist(), "frequency": frequencies}
    for name, column in (("delta", "delta_log_amplitude"), ("error", "delta_se")):
        grid = np.full(shape, np.nan)
        grid[place] = columns[column]
        found[name] = np.round(grid, 4)
    return found
