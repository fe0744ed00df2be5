"""Runs of any number of heads with every file that describes them, made of random numbers: nothing is scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headprobe.masks.tables import SCORES
from headprobe.metrics.similarity.measures import MEASURES
from headprobe.run.load import load_files, read_files
from headprobe.run.results import write_arrays, write_pruned, write_rows
from tests.run import small_runs

WITH_ERROR = (
    "attention_distance_px",
    "attention_distance_raw_px",
    "entropy_nats",
    "entropy_all_keys_nats",
    "mutual_information",
    "confidence",
    "class_mass",
    "self_mass",
    "sink_mass",
    "value_weighted_attention",
    "output_norm_ratio",
    "attention_distance_ratio",
    "entropy_ratio",
    "high_frequency",
    "contribution_high_frequency",
)
"""Columns of `heads.csv` that have a standard error; the others have none."""

WITHOUT_ERROR = ("rank", "kept_dims", *(f"{measure}_mean" for measure in MEASURES))


def write_whole_run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    heads: Sequence[int] = (2, 2, 3),
    specs: Sequence[str] = ("each:head", "each:layer", "each:index", "grow:random:0-4"),
    ablations: Sequence[str] = ("zero", "mean"),
    grid: int = 14,
    images: int = 4,
    **record: Any,
) -> Path:
    """Write a run of a model with these heads per layer: masks, scores, and all that describes heads."""
    monkeypatch.setattr(small_runs, "HEADS", tuple(heads))
    small_runs.write_run(folder, specs, ablations, **record)
    write_descriptions(folder, heads, grid)
    write_examples(folder, heads, grid, images)
    return folder


def write_descriptions(folder: Path, heads: Sequence[int], grid: int = 14) -> None:
    """Write `scores.csv`, `heads.csv`, `similarity.npz`, `spectrum.csv` and `offset_maps.npz` of random numbers."""
    random = np.random.default_rng(1)
    places = [(layer, head) for layer, number in enumerate(heads) for head in range(number)]
    columns: dict[str, Any] = {}
    for name in WITH_ERROR:
        columns |= {name: random.uniform(0.1, 5, len(places)), f"{name}_se": random.uniform(0.01, 0.1, len(places))}
    columns |= {name: random.uniform(0.1, 5, len(places)) for name in WITHOUT_ERROR}
    columns |= {name: random.integers(1, 17, len(places)) for name in ("rank", "kept_dims")}
    small_runs.write_heads(folder, columns)
    write_rows(
        folder / "scores.csv",
        [
            {"layer": layer, "head": head, "images": 30, **{name: random.normal() for name in SCORES}}
            for layer, head in places
        ],
    )
    layer, head = np.array(places).T
    same_layer = layer[:, None] == layer[None, :]
    arrays: dict[str, Any] = {"layer": layer, "head": head, "scope": np.array("within"), "images": np.array(40)}
    arrays |= {"sampling": np.array("tokens"), "mask": np.array(""), "samples": np.full(len(places), 600)}
    for measure in MEASURES:
        values = np.where(same_layer, random.uniform(0, 1, same_layer.shape), np.nan)
        arrays |= {measure: values, f"{measure}_floor": values / 2, f"{measure}_above_floor": values > 0.5}
        arrays |= {f"{measure}_{end}": values * factor for end, factor in (("low", 0.9), ("high", 1.1), ("se", 0.05))}
    write_arrays(folder / "similarity.npz", arrays)
    write_rows(
        folder / "spectrum.csv",
        [
            {
                "mask": "none",
                "layer": layer,
                "series": series,
                "head": head,
                "profile": "diagonal",
                "frequency": step / 8,
                "images": 40,
                "log_amplitude": 1.0,
                "delta_log_amplitude": -step * random.uniform(0.1, 0.5),
                "delta_se": 0.01,
            }
            for layer, number in enumerate(heads)
            for series, head in (
                *(("head", head) for head in range(number)),
                *(("contribution", head) for head in range(number)),
                ("stream_before", -1),
                ("stream_after", -1),
            )
            for step in range(8)
        ],
    )
    write_arrays(
        folder / "offset_maps.npz",
        {
            f"layer_{layer:03d}": _maps(random, (number, 2 * grid - 1, 2 * grid - 1))
            for layer, number in enumerate(heads)
        },
    )


def _maps(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return maps that each sum to 1."""
    values = random.uniform(size=shape)
    return np.asarray(values / values.sum(axis=(1, 2), keepdims=True))


def write_examples(folder: Path, heads: Sequence[int], grid: int = 14, images: int = 4, name: str = "cat") -> None:
    """Write `examples.npz`: noise as thumbnails, which no format of images makes smaller."""
    random = np.random.default_rng(2)
    arrays: dict[str, Any] = {
        "unit": np.zeros(images, dtype=np.int64),
        "row": np.arange(images),
        "label": np.arange(images),
        "prediction": np.zeros(images, dtype=np.int64),
        "label_name": np.array([f"{name} {number}" for number in range(images)]),
        "prediction_name": np.array([f"{name} 0"] * images),
        "source": np.array([f"{name}/{number}.png" for number in range(images)]),
        "thumbnail": random.integers(0, 256, (images, 112, 112, 3), dtype=np.uint8),
        "kind": np.array(["class"] * len(heads)),
    }
    for layer, number in enumerate(heads):
        arrays[f"layer_{layer:03d}"] = random.integers(0, 256, (images, number, grid, grid), dtype=np.uint8)
        arrays[f"layer_{layer:03d}_max"] = random.uniform(size=(images, number)).astype(np.float32)
    write_arrays(folder / "examples.npz", arrays)


LATENCIES = [
    {"batch": 1, "before": [0.004, 0.006, 0.005], "after": [0.002, 0.006, 0.004], "passes": 3},
    {"batch": 64, "before": [0.3, 0.2, 0.25, 0.4], "after": [0.1, 0.2, 0.2, 0.3]},
]


def write_made(folder: Path, masked: Mapping[str, list[int]], ablation: str = "zero", **more: Any) -> Path:
    """Write `pruned.json` of these heads and made latencies beside a run that is there already."""
    heads = read_files(folder).record["model"]["heads_per_layer"]
    mask = {"spec": "made", "heads_per_layer": heads, "masked_heads": masked}
    cost = {"parameters": [900, 600], "multiply_adds": [9e6, 8e6], "latencies": LATENCIES, "device": "cpu, 1 thread"}
    proof = {"difference": 1e-7, "tolerance": 1e-5, "images": 4, "real_images": 0}
    own = {"mask": mask, "ablation": ablation, "calibration": None, "cost": cost, "proof": proof, "curve": {}}
    write_pruned(folder, {**own, **more})
    return folder


def write_chosen(folder: Path) -> Path:
    """Write a run of nested sets, of which the third was chosen by what it keeps of top-1; the fifth failed."""
    run = load_files(small_runs.write_run(folder, ["grow:random:3"]))
    masked: dict[str, list[int]] = {}
    for layer, head in run.heads[str(run.masks[3]["mask"])]:
        masked.setdefault(str(layer), []).append(head)
    heads = [float(len(run.heads[str(row["mask"])])) for row in run.masks[1:]]
    curve = {"heads": heads, "limit_pp": [2.5 + one for one in heads], "tested": [1.0] * 5 + [0.0] * 2}
    return write_made(folder, masked, chosen_by={"keep_top1_pp": 6.0}, curve=curve)


def write_fast(folder: Path) -> Path:
    """Write a run of one set that was chosen by its speed, under linear, refitted."""
    small_runs.write_run(folder, ["head:0.0+head:2.1"], ["linear"])
    name = "speed_batch_64"
    curve = {"heads": [1.0, 2.0], name: [1.1, 1.3], f"{name}_least": [0.9, 1.2], f"{name}_most": [1.4, 1.5]}
    more: dict[str, Any] = {"chosen_by": {"speed": 1.2, "batch": 64}, "curve": curve}
    return write_made(folder, {"0": [0], "2": [1]}, "linear", calibration={"images": 30, "refitted": True}, **more)
