"""How the files of two runs differ: counts one by one, floats by the largest difference."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

COUNTS = ("images", "top1_count", "top5_count", "right_to_wrong", "wrong_to_right", "nonfinite")


def runs(one: Path, other: Path) -> dict[str, Any]:
    """Return how two runs differ: in `masks.csv`, and in whatever else both have that is compared here."""
    found: dict[str, Any] = masks(one / "masks.csv", other / "masks.csv")
    for name in ("heads.csv", "spectrum.csv", "scores.csv"):
        if (one / name).exists() and (other / name).exists():
            found[name] = tables(one / name, other / name)
    for name in ("calibration.safetensors", "similarity.npz", "offset_maps.npz"):
        if (one / name).exists() and (other / name).exists():
            found[name] = arrays(one / name, other / name)
    return found


def masks(one: Path, other: Path) -> dict[str, Any]:
    """Return how two tables of masks differ: bits, counts, and by ablation the largest difference of NLL in nats."""
    mine, theirs = rows(one), rows(other)
    if [row["mask"] for row in mine] != [row["mask"] for row in theirs]:
        raise SystemExit(f"{one} and {other} have other masks")
    pairs = list(zip(mine, theirs, strict=True))
    nll: dict[str, float] = {}
    for row, twin in pairs:
        kind = row["ablation"]
        nll[kind] = max(nll.get(kind, 0.0), abs(float(row["nll"]) - float(twin["nll"])))
    return {
        "same_bytes": one.read_bytes() == other.read_bytes(),
        "counts": len(pairs) * len(COUNTS),
        "counts_differ": sum(row[name] != twin[name] for row, twin in pairs for name in COUNTS),
        "largest_count_difference": max(
            abs(int(row[name]) - int(twin[name])) for row, twin in pairs for name in COUNTS
        ),
        "largest_nll_difference": nll,
    }


def rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def tables(one: Path, other: Path) -> float:
    """Return the largest difference of any number of two tables, relative to the largest number of its column."""
    mine, theirs = rows(one), rows(other)
    if len(mine) != len(theirs) or (mine and mine[0].keys() != theirs[0].keys()):
        raise SystemExit(f"{one} and {other} have other rows or columns")
    worst = 0.0
    for name in mine[0] if mine else ():
        columns = [np.array([number(row[name]) for row in table]) for table in (mine, theirs)]
        worst = max(worst, apart(*columns))
    return worst


def number(cell: str) -> float:
    """Return a cell as a number, NaN where it is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def arrays(one: Path, other: Path) -> dict[str, float]:
    """Return the largest difference of the arrays of two files, relative to the largest number, by the name's end."""
    mine, theirs = read(one), read(other)
    if mine.keys() != theirs.keys():
        raise SystemExit(f"{one} and {other} hold other arrays")
    found: dict[str, float] = {}
    for name, value in mine.items():
        if value.dtype.kind == "f":
            short = name.rsplit(".", 1)[-1]
            found[short] = max(found.get(short, 0.0), apart(value, theirs[name]))
    return found


def read(file: Path) -> dict[str, Any]:
    """Return the arrays of a file."""
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    with np.load(file, allow_pickle=False) as content:
        return dict(content)


def apart(one: Any, other: Any) -> float:
    """Return the largest difference relative to the largest number; infinite where NaN stands in only one of them."""
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return float("inf")
    known = ~np.isnan(one)
    if not known.any():
        return 0.0
    one, other = one[known].astype(np.float64), other[known].astype(np.float64)
    equal = one == other  # infinities among them
    largest = float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) or 1.0
    return float(np.abs(one[~equal] - other[~equal]).max(initial=0.0)) / largest
