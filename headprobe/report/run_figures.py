"""Every figure of a run, made from its files: on the day of the run or later, on a machine without torch or the model.

```python
run = headprobe.load_run("lightning_logs/version_0")
for name, figure in run.figures():
    figure.savefig(f"{name.replace('/', '_')}.png", dpi=150)
```
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.masks.ablations import FITTED, ZERO
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.similarity.measures import MEASURES, Measure, samples_in_words, title
from headprobe.report.agreement_figures import agreement_figures
from headprobe.report.curve_figures import curve_figures
from headprobe.report.head_figures import by_layer, change_by_layer
from headprobe.report.importance_figures import importance_figures
from headprobe.report.mask_figures import index_figures, mask_figures
from headprobe.report.offset_figures import offset_grid
from headprobe.report.set_figures import set_figures
from headprobe.report.similarity_figures import similarity_by_layer, similarity_clustered
from headprobe.report.spectrum_figures import DELTA, spectra_by_layer, stream_spectra
from headprobe.run.load import Columns, RunFiles
from headprobe.text import counted

TITLES = {
    "attention_distance_px": ("Mean attention distance", "distance (pixels)"),
    "entropy_nats": ("Attention entropy between patches", "entropy (nats)"),
    "mutual_information": ("Normalised mutual information of query and key", "mutual information"),
    "confidence": ("Confidence: the largest weight of a query", "confidence"),
    "class_mass": ("Attention of patches to the class token", "class mass"),
    "register_mass": ("Attention of patches to registers", "register mass"),
    "self_mass": ("Attention of patches to themselves", "self mass"),
    "sink_mass": ("Largest key's share of attention", "sink mass"),
    "value_weighted_attention": ("Attention weighted by the size of the values", "over uniform attention"),
    "output_norm_ratio": ("Head output relative to the residual stream", "norm ratio"),
}
"""Titles and axes of the figures by layer; a column that is not here is called by its name."""

WITHOUT_FIGURE = {
    "mask",
    "layer",
    "head",
    "images",
    "attention_distance_raw_px",
    "entropy_all_keys_nats",
    "attention_distance_ratio",
    "entropy_ratio",
    "rank",
    "kept_dims",
    *(f"{measure}_mean" for measure in MEASURES),
    "high_frequency",
    "contribution_high_frequency",
}
"""Columns of `heads.csv` that get no figure by layer: no statistics, or shown by another figure already."""

UNIFORM = {"attention_distance_px": "attention_distance_ratio", "entropy_nats": "entropy_ratio"}
"""Statistics with a value under uniform attention, and the column that is divided by it."""

DRAWN_MEASURES = ("svcca", "cka_unbiased")
"""Measures of similarity that get figures; where there is neither, the first that was computed does."""

SPECTRA = {"head": "head outputs", "contribution": "contributions of heads after W_O"}
"""Series of `spectrum.csv` that belong to heads, in words."""


def run_figures(run: RunFiles) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of all that the run's files allow: of the masks' drops, then of described heads.

    One by one, so that only one figure at a time takes memory. Names are TensorBoard's, such as `drop_pp/by_layer`.
    """
    if len(run.masks) > 2:  # a single mask has no figure
        yield from mask_figures(run)
        yield from agreement_figures(run)
        yield from curve_figures(run)
        yield from index_figures(run)
        yield from set_figures(run)
    if (run.path / "importance.csv").is_file():
        yield from importance_figures(run)
    heads, about = run.described("heads"), about_heads(run)
    yield from _statistics(heads, about)
    yield from _offset_maps(run, _names(heads), about)
    yield from _similarities(run, about)
    yield from _spectra(run, about)


def about_heads(run: RunFiles) -> str:
    """Return what titles of described heads say of the run: its model and images, and the only mask's ablation."""
    heads = run.described("heads")
    images = heads["baseline"]["images"][0] if heads else run.masks[0]["images"]
    return f"{about_model(run)}, {counted(int(images), 'image')}{_of_described_mask(run)}"


def _of_described_mask(run: RunFiles) -> str:
    """Return what titles of described heads say of the only mask's ablation, and of the images that fitted it."""
    if len(run.masks) != 2 or run.masks[1]["ablation"] == ZERO:
        return ""
    kind = str(run.masks[1]["ablation"])
    fitted = f", {run.fitted_in_words}" if kind in FITTED and run.fitted_in_words else ""
    return f", {kind} ablation{fitted}"


def about_model(run: RunFiles) -> str:
    """Return what titles call the model: they say if its weights were random. Runs of before have only a name."""
    model = run.record["model"]
    return str(model.get("title", model["name"]))


# -- described heads --


def _names(described: dict[str, Columns]) -> dict[str, str]:
    """Return what `baseline`, `masked` and `change` are called in titles."""
    names = {"baseline": "baseline"}
    masked = described.get("masked", described.get("change"))
    if masked is not None:
        mask = masked["mask"][0]
        names |= {"masked": mask, "change": f"{mask} minus baseline"}
    return names


def _statistics(heads: dict[str, Columns], about: str) -> Iterator[tuple[str, Figure]]:
    """Yield for every column of `heads.csv` its values by layer and, with a mask, its change."""
    baseline, change = (heads.get(model, {}) for model in ("baseline", "change"))
    names = _names(heads)
    for column, values in baseline.items():
        if column in WITHOUT_FIGURE or column.endswith("_se") or not np.isfinite(values).any():
            continue  # run.json says why a statistic has no value

        heading, axis = TITLES.get(column, (column, column))
        axes = (baseline["layer"], baseline["head"])  # the change has its heads in the same order
        yield f"{column}/by_layer", statistic(heads, column, about)
        if column in change:
            changed = f"{heading}: {names['change']}\n{about}"
            errors = change.get(f"{column}_se")
            yield f"{column}/change", change_by_layer(*axes, change[column], errors, changed, f"change of {axis}")


def statistic(heads: dict[str, Columns], column: str, about: str, given: Axes | None = None) -> Figure:
    """Draw a column of `heads.csv` by layer, of the baseline and the masked model where there is one.

    Args:
        heads: The described heads of each model.
        column: The column.
        about: The model and its images, for the title.
        given: Draw into these axes, not into a figure of its own.
    """
    baseline, heading = heads["baseline"], TITLES.get(column, (column, column))
    return by_layer(
        baseline["layer"],
        baseline["head"],
        baseline[column],
        baseline.get(f"{column}_se"),
        f"{heading[0]}\n{about}",
        heading[1],
        uniform=_uniform(baseline, column),
        masked=heads.get("masked", {}).get(column),
        masked_name=_names(heads).get("masked", ""),
        given=given,
    )


def _uniform(columns: Columns, column: str) -> FloatArray | None:
    """Return a statistic's value under uniform attention, from the ratio to it."""
    if UNIFORM.get(column) not in columns:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(columns[column] / columns[UNIFORM[column]], dtype=np.float64)


def _offset_maps(run: RunFiles, names: dict[str, str], about: str) -> Iterator[tuple[str, Figure]]:
    """Yield each model's maps; also where no layer has one, with the reason, if they were wanted."""
    arrays = run.arrays("offset_maps.npz")
    if not arrays and "offset_maps" not in run.record.get("undefined", {}):
        return
    layers = len(run.record["model"]["heads_per_layer"])  # a layer without a map has no array
    for model, prefix in (("baseline", ""), ("masked", "masked_")):
        if model in names:
            maps = [arrays.get(f"{prefix}layer_{layer:03d}") for layer in range(layers)]
            heading = f"Where each head looks, by offset: {names[model]}\n{about}"
            yield f"offset_maps/{model}", offset_grid(maps, heading)


def _similarities(run: RunFiles, about: str) -> Iterator[tuple[str, Figure]]:
    """Yield each model's matrices ordered by layer and clustered, and the matrix of the differences."""
    arrays = run.arrays("similarity.npz")
    if not arrays:
        return
    sampling, mask = str(arrays["sampling"]), str(arrays["mask"])
    note = samples_in_words(arrays["samples"], int(arrays["images"]), sampling)
    axes: tuple[NDArray[Any], NDArray[Any]] = (arrays["layer"], arrays["head"])
    measures = measures_of(arrays)
    drawn = [name for name in DRAWN_MEASURES if name in measures] or measures[:1]
    for measure in drawn:
        label = title(measure, sampling)
        models = {"baseline": ("", "baseline")} | ({"masked": ("masked_", mask)} if mask else {})
        for model, (prefix, name) in models.items():
            values, floor = arrays[prefix + measure], arrays.get(f"{prefix}{measure}_floor")
            heading = f"{label} of heads: {name}\n{about}, {note}"
            yield f"{measure}/by_layer_{model}", similarity_by_layer(values, *axes, heading, label, floor)
            yield f"{measure}/clustered_{model}", similarity_clustered(values, *axes, heading, label, floor)
        if mask:
            heading = f"{label} of heads: {mask} minus baseline\n{about}, {note}"
            change = arrays[f"change_{measure}"]
            yield f"{measure}/change", similarity_by_layer(change, *axes, heading, "change", diverging=True)


def measures_of(arrays: dict[str, NDArray[Any]]) -> list[Measure]:
    """Return the measures of a `similarity.npz`, in the order that they were asked for, which is the file's."""
    return sorted((measure for measure in MEASURES if measure in arrays), key=list(arrays).index)


def similarity(
    arrays: dict[str, NDArray[Any]], measure: Measure, layers: list[int], about: str, given: Axes | None = None
) -> Figure:
    """Draw a measure of the baseline's heads of some layers.

    Args:
        arrays: A run's `similarity.npz`.
        measure: The measure.
        layers: The layers.
        about: The model and its images, for the title.
        given: Draw into these axes, not into a figure of its own; for one matrix.
    """
    rows = np.flatnonzero(np.isin(arrays["layer"], layers))
    grid = np.ix_(rows, rows)
    floor, sampling = arrays.get(f"{measure}_floor"), str(arrays["sampling"])
    note = samples_in_words(arrays["samples"], int(arrays["images"]), sampling)
    label = title(measure, sampling)
    heading = f"{label} of heads: baseline\n{about}, {note}"
    places = (arrays["layer"][rows], arrays["head"][rows])
    own_floor = None if floor is None else floor[grid]
    return similarity_by_layer(arrays[measure][grid], *places, heading, label, own_floor, given=given)


def _spectra(run: RunFiles, about: str) -> Iterator[tuple[str, Figure]]:
    """Yield the spectra of heads, of their contributions and of the stream, for each model; and the heads' changes."""
    described = run.described("spectrum")
    names = _names(described)
    for model, columns in described.items():
        ylabel = f"change of {DELTA}" if model == "change" else DELTA
        for series, what in SPECTRA.items():
            if np.isfinite(columns["delta_log_amplitude"][columns["series"] == series]).any():
                heading = f"Spectra of {what}: {names[model]}\n{about}"
                yield f"spectrum/{series}_{model}", spectra_by_layer(columns, heading, series, ylabel=ylabel)
        if model != "change":
            heading = f"Spectra of the residual stream: {names[model]}\n{about}"
            yield f"spectrum/stream_{model}", stream_spectra(columns, heading)
