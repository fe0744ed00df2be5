"""A finished run for Python and notebooks: `headprobe.load_run`."""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headprobe.loaded.plots import Plots
from headprobe.loaded.tables import TABLES, Tables, empty_frame, not_there, read_frame
from headprobe.report.run_figures import run_figures
from headprobe.run.load import Row, RunFiles, load_files, main_cost
from headprobe.text import counted

MOST_DROPS = 5
"""Masks that a notebook shows of a run: those with the largest drops."""

BAD_COLUMNS = ("unit", "row", "source", "reason")


class Run(Tables):
    """A finished run: its tables as pandas frames, matrices as arrays, plots.

    Args:
        files: The files of the run; code of headprobe that works on files takes them.
    """

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._frames: dict[str, pd.DataFrame] = {}

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.files.path

    @property
    def meta(self) -> dict[str, Any]:
        """`run.json`: model, weights, data, versions, times, decisions; without `schema` it is of version 0."""
        return self.files.record

    @property
    def masked_heads(self) -> dict[str, list[tuple[int, int]]]:
        """For every mask but the baseline its heads as (layer, head)."""
        return self.files.heads

    @property
    def tables(self) -> tuple[str, ...]:
        """The files of the tables that are there."""
        return tuple(name for name in TABLES if (self.path / name).is_file())

    def frame(self, name: str) -> pd.DataFrame:
        """Return a table by the name of its file; a second call returns the same frame, with what you changed.

        Raises:
            NotInRunError: It is not there.
        """
        if name not in self._frames:
            if name in self.tables:
                frame = read_frame(self.path / name)
            elif name == "bad_images.csv":
                frame = empty_frame(BAD_COLUMNS)
                frame.attrs = {"file": name, "units": dict.fromkeys(BAD_COLUMNS, "")}
            else:
                raise not_there(name, str(self.path))
            frame.attrs |= {"run": str(self.path), "schema": self.meta.get("schema", 0)}
            self._frames[name] = frame
        return self._frames[name]

    @property
    def similarity(self) -> dict[str, NDArray[Any]]:
        """`similarity.npz`: matrices `[heads, heads]` of each measure, with their floors and limits."""
        return self._arrays("similarity.npz")

    @property
    def offset_maps(self) -> dict[str, NDArray[Any]]:
        """`offset_maps.npz`: for each layer `[heads, 2h - 1, 2w - 1]`, mean attention by offset of key from query."""
        return self._arrays("offset_maps.npz")

    @property
    def groups(self) -> dict[str, NDArray[Any]]:
        """`groups.npz`: what each row of `masks` scores on each of 64 groups of images, for intervals of your own."""
        return self._arrays("groups.npz")

    def _arrays(self, name: str) -> dict[str, NDArray[Any]]:
        found = self.files.arrays(name)
        if not found:
            raise not_there(name, str(self.path))
        return found

    @property
    def plot(self) -> Plots:
        """Figures of the run, each as `(fig, ax)`."""
        return Plots(self.files)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield every figure that the run's files allow, by its name, such as `drop_pp/by_layer`."""
        return run_figures(self.files)

    def __repr__(self) -> str:
        rows = counted(len(self.files.masks) - 1, "row")
        return f"Run({str(self.path)!r}: {self._model}, {rows} beside the baseline)"

    @property
    def _model(self) -> str:
        model = self.meta.get("model") or {}
        return str(model.get("title", model.get("name", "?")))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the model, its data, the baseline, the largest drops, and what is in it."""
        about = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self._about())
        rows = sorted(self.files.masks[1:], key=lambda row: -float(row[main_cost(row)]))[:MOST_DROPS]
        drops = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows)
        names: tuple[str, ...] = ("largest drops", "heads", "ablation", "points [95%]", "q")
        if not self.files.labelled:
            names = ("largest distances", "heads", "ablation", "of the feature's length [95%]")
        heading = "".join(f"<th>{name}</th>" for name in names)
        table = f"<table><tr>{heading}</tr>{drops}</table>" if rows else ""
        return f"<div><table>{about}</table>{table}</div>"

    def _about(self) -> Iterator[tuple[str, str]]:
        baseline, data = self.files.masks[0], self.meta.get("data") or {}
        yield "run", str(self.path)
        if self.meta.get("status") != "done":
            yield "status", f"{self.meta.get('status')}: not as a run that ended well"
        yield "model", self._model
        named = [str(data[key]) for key in ("path", "name", "split") if data.get(key)]
        yield "data", f"{' '.join(named) or '?'}, {counted(int(baseline['images']), 'image')}"
        if self.files.fitted_in_words:
            yield "calibration", self.files.fitted_in_words
        if self.meta.get("bad_images"):
            yield "bad images", f"{self.meta['bad_images']:,} (run.bad_images)"
        if not self.files.labelled:
            yield "baseline", "no classifier and no labels: features are compared"
        else:
            scores = f"top-1 {_percent(baseline['top1'])}, top-5 {_percent(baseline['top5'])}"
            yield "baseline", f"{scores}, NLL {float(baseline['nll']):.4g} nats"
        yield "masks", f"{counted(len(self.masked_heads), 'mask')}, {counted(len(self.files.masks) - 1, 'row')}"
        yield "tables", ", ".join(name.partition(".")[0] for name in self.tables)


def _percent(share: object) -> str:
    return f"{100 * float(str(share)):.2f}%"


def _cells(row: Row) -> tuple[str, ...]:
    what = str(row["mask"]), str(row["heads_masked"]), str(row["ablation"])
    if "drop_pp" not in row:
        moved, low, high = (f"{float(row[f'feature_distance{end}']):.3f}" for end in ("", "_low", "_high"))
        return *what, f"{moved} [{low}, {high}]"
    drop, low, high = (f"{float(row[name]):+.2f}" for name in ("drop_pp", "drop_low_pp", "drop_high_pp"))
    q = float(row["bh_q"])
    return *what, f"{drop} [{low}, {high}]", "" if math.isnan(q) else f"{q:.2g}"


def load_run(path: str | Path) -> Run:
    """Read a finished run, as in `lightning_logs/version_0`: neither torch nor the model is needed.

    Raises:
        UsageError: There is no finished run, its files do not belong together, or a newer headprobe wrote them.
    """
    return Run(load_files(path))
