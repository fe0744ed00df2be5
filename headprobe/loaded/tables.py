"""The tables of a run, or of several, as pandas frames: types and units by `headprobe.run.columns`."""

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from headprobe.errors import UsageError
from headprobe.run.columns import COLUMNS, MAY_BE_EMPTY, Kind, unit_of
from headprobe.run.load import naming

DESCRIBE = "--config configs/describe_heads.yaml"

MADE_BY: Mapping[str, str] = MappingProxyType(
    {
        "masks.csv": "every test",
        "ablations.csv": "a test of several ablations and a form of three masks or more, such as --ablation zero,mean "
        "--mask-spec each:head",
        "scores.csv": "a test with --score-heads",
        "importance.csv": "a test with --score-heads --mask-spec each:head",
        "curves.csv": "a test of nested masks, such as --mask-spec grow:random:0-9",
        "orders.csv": "a test of nested masks, such as --mask-spec grow:random:0-9",
        "index_null.csv": "a test with --mask-spec each:index --mask-spec one-per-layer:0-98",
        "interactions.csv": "a test of parts and of their unions, such as --mask-spec each:pair",
        "shapley.csv": "a test of five random orders or more, such as --mask-spec grow:random:0-9",
        "heads.csv": f"a test that describes heads, such as with {DESCRIBE}",
        "heads_change.csv": f"a test of one mask that describes heads, such as {DESCRIBE} --mask-spec layer:3",
        "spectrum.csv": f"a test with the callback HeadSpectrum, such as with {DESCRIBE}",
        "spectrum_change.csv": f"a test of one mask with HeadSpectrum, such as {DESCRIBE} --mask-spec layer:3",
        "classes.csv": "a test with --model.per_class true",
        "images.parquet": "a test with --records",
        "bad_images.csv": "a test in whose data some images cannot be used",
        "groups.npz": "every test",
        "similarity.npz": f"a test with the callback HeadSimilarity, such as with {DESCRIBE}",
        "offset_maps.npz": f"a test with the callback HeadAttention, such as with {DESCRIBE}",
    }
)
"""Every file of a run that is read as a table or as arrays, and what makes it."""

TABLES = tuple(name for name in MADE_BY if not name.endswith(".npz"))


class NotInRunError(UsageError, AttributeError):
    """A run has no such table or arrays. It is an AttributeError too: `hasattr(run, "scores")` is false then."""


def not_there(name: str, where: str) -> NotInRunError:
    """Return the message for a file that a run does not have."""
    made = MADE_BY.get(name)
    if made is None:
        return NotInRunError(f"a run's tables are {', '.join(TABLES)}, got {name!r}")
    return NotInRunError(f"there is no {name}: {made} makes it, got {where!r}")


def read_frame(path: Path) -> pd.DataFrame:
    """Read a table of a run.

    Text is pandas' own text type, empty where there is none; floats are those of the file to the last bit. Whole
    numbers are int64, and where cells may be empty pandas' Int64.

    Raises:
        RunError: It is cut off, or not headprobe's.
    """
    with naming(path):
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else _read_text(path)
        for name in frame.columns:
            frame[name] = _in_its_type(frame[name], path.name)
    frame.attrs = {"file": path.name, "units": {name: unit_of(name) for name in frame.columns}}
    return frame


def _read_text(path: Path) -> pd.DataFrame:
    """Read a CSV file as text: a mask may be called `none`, and a class `NA`, which pandas would take as missing."""
    with path.open(encoding="utf-8", newline="") as file:  # pandas fills up a row that is cut off
        widths = {len(row) for row in csv.reader(file) if row}
    if len(widths) > 1:
        raise ValueError(f"rows have {' and '.join(map(str, sorted(widths)))} cells")
    return pd.read_csv(path, encoding="utf-8", dtype="str", keep_default_na=False)


def empty_frame(columns: Sequence[str]) -> pd.DataFrame:
    """Return a table without rows, its columns in their types."""
    return pd.DataFrame({name: _in_its_type(pd.Series([], name=name, dtype="str"), "") for name in columns})


def _in_its_type(column: "pd.Series[Any]", file: str) -> "pd.Series[Any]":
    """Return a column in its documented type; of a user's own statistic floats, where all cells are numbers."""
    name = str(column.name)
    kind = COLUMNS[name].kind if name in COLUMNS else None
    if kind is Kind.TEXT:
        return column.fillna("").astype("str")
    try:
        numbers = _floats(column)
    except ValueError:
        if kind is None:
            return column
        raise
    if kind is not Kind.INTEGER:
        return numbers
    empty = name in MAY_BE_EMPTY.get(file, ()) or numbers.isna().any()
    return numbers.astype("Int64" if empty else "int64")


def _floats(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return the numbers of a column, NaN for an empty cell: Python's own reading is exact, older pandas' was not."""
    cells = [math.nan if cell is None or cell == "" else float(cell) for cell in column]
    return pd.Series(cells, index=column.index, name=column.name, dtype="float64")


class Tables(ABC):
    """The tables by name. One that is not there is a `NotInRunError` that says what makes it."""

    @abstractmethod
    def frame(self, name: str) -> pd.DataFrame:
        """Return a table by the name of its file; a second call returns the same frame, with what you changed.

        Raises:
            NotInRunError: It is not there.
        """

    @property
    def masks(self) -> pd.DataFrame:
        """`masks.csv`: a row per variant (mask, ablation, draw), the baseline first."""
        return self.frame("masks.csv")

    @property
    def heads(self) -> pd.DataFrame:
        """`heads.csv`: what each head is like, a row per mask, layer and head."""
        return self.frame("heads.csv")

    @property
    def heads_change(self) -> pd.DataFrame:
        """`heads_change.csv`: the same of the only mask minus the baseline."""
        return self.frame("heads_change.csv")

    @property
    def scores(self) -> pd.DataFrame:
        """`scores.csv`: every importance score, a row per head, of the images that calibrate."""
        return self.frame("scores.csv")

    @property
    def importance(self) -> pd.DataFrame:
        """`importance.csv`: how well each score predicts what single heads cost."""
        return self.frame("importance.csv")

    @property
    def ablations(self) -> pd.DataFrame:
        """`ablations.csv`: two ablations against each other, for the masks of each test family."""
        return self.frame("ablations.csv")

    @property
    def curves(self) -> pd.DataFrame:
        """`curves.csv`: what is lost as heads go one after the other, in each order."""
        return self.frame("curves.csv")

    @property
    def orders(self) -> pd.DataFrame:
        """`orders.csv`: a row per order: area under its curve, heads that can go."""
        return self.frame("orders.csv")

    @property
    def index_null(self) -> pd.DataFrame:
        """`index_null.csv`: each head index beside random heads of the same layers."""
        return self.frame("index_null.csv")

    @property
    def interactions(self) -> pd.DataFrame:
        """`interactions.csv`: what two heads or layers cost together beyond the sum of each."""
        return self.frame("interactions.csv")

    @property
    def shapley(self) -> pd.DataFrame:
        """`shapley.csv`: what each head or layer is worth as one of all."""
        return self.frame("shapley.csv")

    @property
    def spectrum(self) -> pd.DataFrame:
        """`spectrum.csv`: log amplitudes of heads and of the residual stream, by frequency."""
        return self.frame("spectrum.csv")

    @property
    def spectrum_change(self) -> pd.DataFrame:
        """`spectrum_change.csv`: the same of the only mask minus the baseline."""
        return self.frame("spectrum_change.csv")

    @property
    def classes(self) -> pd.DataFrame:
        """`classes.csv`: a row per variant and class."""
        return self.frame("classes.csv")

    @property
    def images(self) -> pd.DataFrame:
        """`images.parquet`: which file each image is."""
        return self.frame("images.parquet")

    @property
    def bad_images(self) -> pd.DataFrame:
        """`bad_images.csv`: images that could not be used; no row where all could."""
        return self.frame("bad_images.csv")
