"""Heads in the order of a column: of an earlier run's tables, or of the run's own calibration."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headprobe.errors import UsageError
from headprobe.masks.clauses import Clause, Member, Model
from headprobe.masks.draws import Head
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.pieces import Numbers, Piece
from headprobe.mixture import refuse_mixture, refuse_newer
from headprobe.text import counted

CALIBRATION = "calibration"
"""In place of a PATH: the scores of the run's own calibration. A folder of this name is ./calibration."""

SCORES = (
    "gradient_abs",
    "gradient_abs_l2",
    "gradient_fisher",
    "taylor_zero",
    "taylor_mean",
    "variance_after_projection",
    "residual_variance_after_projection",
    "stable_rank",
    "direct_logit",
)
"""Scores of heads in `scores.csv`, which a calibration computes; `headprobe.calibration.scores` defines them."""

SINGLE_HEAD = re.compile(r"head:(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
WHOLE_NUMBER = re.compile(r"(0|[1-9][0-9]{0,8})")

CsvRow = dict[str, str | None]

OTHER_WAY = "is large where a head does not matter, so that least and most would mislead"
NO_SIZE = "says how sure a change is, for better or worse, and not how large"
SAME = "does not differ between heads"
NO_ORDER = {
    **dict.fromkeys(("top1", "top1_count"), (OTHER_WAY, "drop_pp, which is the same order the other way round")),
    **dict.fromkeys(("top5", "top5_count"), (OTHER_WAY, "drop_pp or nll_rise")),
    "agreement": (OTHER_WAY, "kl_nats"),
    "wrong_to_right": ("is large where masking a head helps", "drop_pp, which counts losses against it"),
    **dict.fromkeys(("mcnemar_p", "bh_q", "log_e_value", "e_bh_q"), (NO_SIZE, "drop_pp or nll_rise")),
    **dict.fromkeys(("images", "heads_masked", "draw"), (SAME, "drop_pp or nll_rise")),
}
"""Columns of `masks.csv` that give no order of heads by importance: why, and which to take. In all others a larger
value means that the head matters more."""


@dataclass(frozen=True)
class Table:
    """A CSV file: its header and rows."""

    path: Path
    columns: tuple[str, ...]
    rows: list[CsvRow]


def order_by_column(path: Piece, column: Piece, model: Model, *, most_first: bool) -> list[Head]:
    """Every head of the model, sorted by the column's value; equal ones by (layer, head).

    Args:
        path: a `scores.csv`, `heads.csv`, `heads_change.csv` or `masks.csv`, or the folder of a run that holds one; or
            `calibration`, for the scores of the run's own calibration.
        column: the column to sort by.
        model: the heads to expect.
        most_first: whether the largest value comes first, not the smallest.

    Raises:
        MaskSpecError: under the column or the path: a file that cannot be read, a missing column (the others are
            listed), a column whose order would mislead, a cell that is no number, a head that is missing, given twice
            or not the model's.
    """
    if path.text == CALIBRATION:
        return order_of(_of_calibration(column, model), column, model.name, most_first=most_first)
    table = _open_table(path, column)
    values: dict[Head, float] = {}
    for line, head, row in _rows_of_heads(table, path, column):
        if head not in model.heads:
            reason = f"{table.path}, row {line}: {model.name} has no {_name(head)}: take a run of the same model"
            raise path.error(reason)
        if head in values:
            raise path.error(
                f"{table.path}, row {line}: expected one row per head, so a table of one ablation and one draw (or "
                f"scores.csv, heads.csv), got {_name(head)} twice"
            )
        values[head] = _value(row[column.text], head, f"{table.path}, row {line}", column)
    missing = sorted(model.heads - values.keys())
    if missing:
        few = ", ".join(map(_name, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise path.error(
            f"{table.path} lacks {len(missing)} of the {len(model.heads)} heads of {model.name}, got no {few}"
        )
    return order_of(values, column, model.name, most_first=most_first)


def order_of(values: Mapping[Head, float], column: Piece, model: str, *, most_first: bool, gone: int = 0) -> list[Head]:
    """Heads sorted by their values; equal ones by (layer, head).

    Args:
        values: of each head.
        column: what the values are, for messages.
        model: the model's name, for messages.
        most_first: whether the largest value comes first, not the smallest.
        gone: heads that were masked when the values were computed, for messages.

    Raises:
        MaskSpecError: under the column, where a head has no value.
    """
    without = sorted(head for head, value in values.items() if not math.isfinite(value))
    if without:
        every = len(without) == len(values)
        which = "the heads" if every else f"{counted(len(without), 'head')}, such as {_name(without[0])},"
        when = f" once {counted(gone, 'head')} {'is' if gone == 1 else 'are'} masked" if gone else ""
        reason = (
            f"{which} of {model} have no such score{when} (a run with --score-heads says why in run.json, undefined)"
        )
        raise column.error(f"{reason}: choose another one, got {column.text}")
    sign = -1 if most_first else 1
    return sorted(values, key=lambda head: (sign * values[head], head))


def rescored_order(column: Piece, direction: str, counts: Numbers, model: Model) -> Sequence[Head]:
    """The first heads of the model in the order of a score that the run's calibration computed anew step by step.

    Before the calibration all heads are alike, as their number counts then.

    Args:
        column: the score.
        direction: least or most.
        counts: how many heads are wanted.
        model: the heads to expect.

    Raises:
        MaskSpecError: under the score: there is no such score, or the calibration did not put so many heads in order.
    """
    if model.scores is None:
        return sorted(_of_calibration(column, model))
    order, most = model.orders.get((column.text, direction), ()), max(counts.values)
    if len(order) < most or len(set(order)) < len(order) or not model.heads.issuperset(order):
        got = counted(len(order), "head") if order else "none"
        raise column.error(
            f"the calibration re-scored {got} in the order {direction} {column.text}, where the masks need {most}: run "
            f"it anew without --calibration-file, got {column.text}"
        )
    return order


def _of_calibration(column: Piece, model: Model) -> Mapping[Head, float]:
    """The scores of the run's own calibration; before that has run, all heads alike, as their number counts then."""
    if column.text not in SCORES:
        raise column.error(f"expected a score of the run's own calibration: {', '.join(SCORES)}, got {column.text}")
    if model.scores is None:
        return dict.fromkeys(model.heads, 0.0)
    values = model.scores[column.text]
    return {head: values.get(head, math.nan) for head in model.heads}


def _open_table(path: Piece, column: Piece) -> Table:
    """The table with the column: the file itself, or the first of a run's tables that has it."""
    folder = Path(path.text)
    try:
        refuse_mixture(folder if folder.is_dir() else folder.parent)
    except UsageError as error:
        raise path.error(str(error)) from None
    files = [folder]
    if folder.is_dir():
        tables = ("scores.csv", "heads.csv", "masks.csv")
        files = [folder / table for table in tables if (folder / table).is_file()]
        if not files:
            raise path.error(f"expected a run's folder with {', '.join(tables[:2])} or {tables[2]}, got {folder}")
    have = []
    for file in files:
        table = _read_table(file, path)
        if column.text in table.columns:
            return table
        have.append(f"{file} has {', '.join(table.columns) or 'no columns'}")
    raise column.error(f"expected a column that is there: {'; '.join(have)}, got {column.text}")


def _read_table(file: Path, path: Piece) -> Table:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows: list[CsvRow] = list(reader)
            return Table(file, tuple(reader.fieldnames or ()), rows)
    except OSError as error:
        reason = (
            f"cannot read the table: {error.strerror or error}; give a run's folder, heads.csv or masks.csv, got {file}"
        )
        raise path.error(reason) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise path.error(f"expected a CSV table, got {file}, which is none: {error}") from None


def _rows_of_heads(table: Table, path: Piece, column: Piece) -> Iterator[tuple[int, Head, CsvRow]]:
    """The rows about a single head, in a table of heads those of one model, with their place in the file."""
    if {"layer", "head"} <= set(table.columns):
        return _rows_by_head(table, path)
    if "mask" not in table.columns:
        columns = ", ".join(table.columns)
        raise path.error(f"expected columns 'layer' and 'head', or 'mask', in {table.path}, got {columns}")
    if column.text in NO_ORDER:
        why, instead = NO_ORDER[column.text]
        raise column.error(f"{column.text} {why}: order by {instead}, got {column.text}")
    return _rows_by_mask(table)


def _rows_by_head(table: Table, path: Piece) -> Iterator[tuple[int, Head, CsvRow]]:
    """The rows of `heads.csv` about the baseline, or all of `heads_change.csv`, which is about one mask."""
    models = {row.get("mask") or "none" for row in table.rows}
    if "none" not in models and len(models) > 1:
        some = ", ".join(sorted(models)[:5])
        raise path.error(f"{table.path}: expected rows of the baseline, none, or of one mask, got {some}")
    for line, row in enumerate(table.rows, start=2):  # row 1 is the header
        if "none" in models and (row.get("mask") or "none") != "none":
            continue  # of a masked model
        head = _head_of_heads_row(row)
        if head is None:
            got = f"{row['layer']!r} and {row['head']!r}"
            raise path.error(f"{table.path}, row {line}: expected whole numbers for 'layer' and 'head', got {got}")
        yield line, head, row


def _rows_by_mask(table: Table) -> Iterator[tuple[int, Head, CsvRow]]:
    """The rows of `masks.csv` about masks of one head."""
    for line, row in enumerate(table.rows, start=2):
        head = _head_of_masks_row(row)
        if head is not None:
            yield line, head, row


def _head_of_heads_row(row: CsvRow) -> Head | None:
    layer, head = WHOLE_NUMBER.fullmatch(row["layer"] or ""), WHOLE_NUMBER.fullmatch(row["head"] or "")
    return (int(layer[0]), int(head[0])) if layer and head else None


def _head_of_masks_row(row: CsvRow) -> Head | None:
    found = SINGLE_HEAD.fullmatch(row["mask"] or "")
    return (int(found[1]), int(found[2])) if found else None


def _value(cell: str | None, head: Head, where: str, column: Piece) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise column.error(f"{where}: expected a finite number in {column.text!r} for {_name(head)}, got {cell!r}")
    return value


def _name(head: Head) -> str:
    return f"head:{head[0]}.{head[1]}"


# -- The clause for masks that come from a file: `file:PATH` --


@dataclass(frozen=True)
class SavedMask(Clause):
    """`file:PATH`: a mask as `HeadMask.to_json` writes it, or a run's `masks.json` with exactly one mask."""

    path: Piece

    @property
    def text(self) -> str:
        """The path as written."""
        return f"file:{self.path.text}"

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        try:
            data = _the_mask(_read(Path(self.path.text)), self.path.text)
            mask = HeadMask.from_json(data, model.heads_per_layer, f"{self.path.text} for {model.name}")
        except UsageError as error:
            raise self.path.error(str(error)) from None
        yield Member(self, mask.masked)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_refuse_repeats)
    except OSError as error:
        raise UsageError(f"cannot read the mask: {error.strerror or error}; give a file, got {path}") from None
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number or nesting beyond reason
        raise UsageError(f"expected a mask as JSON, got {path}, which is not: {error}") from None


def _refuse_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets a key stand twice, and Python keeps the last: half a mask would vanish."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UsageError(f"a key stands twice in the mask's JSON, got {next(k for k in keys if keys.count(k) > 1)!r}")
    return data


def _the_mask(data: object, where: str) -> object:
    """The data of the one mask of a `masks.json` (its baseline, `none`, aside), or the data as they are."""
    if not isinstance(data, Mapping) or "masked_heads" in data or not data:
        return data
    refuse_newer(data.get("schema"), Path(where))
    data = {name: entry for name, entry in data.items() if name != "schema"}
    if not all(isinstance(entry, Mapping) and "masked_heads" in entry for entry in data.values()):
        return data
    names = [name for name in data if name != "none"]
    if len(names) != 1:
        few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UsageError(f"{where} holds {len(names)} masks: expected exactly one; write its name instead, got {few}")
    return data[names[0]]
