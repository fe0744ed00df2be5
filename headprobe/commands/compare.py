"""`compare`: the same masks in several finished runs, from their files alone; needs no torch."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headprobe.commands.parser import Parser
from headprobe.commands.report import BROKEN, broken, load_run
from headprobe.errors import RunError, UsageError
from headprobe.files import shown, write_bytes, write_text
from headprobe.mixture import SCHEMA
from headprobe.report.comparison.tables import masks_table, ranks_table, runs_table
from headprobe.report.table import console
from headprobe.run.comparison.names import names_of_runs
from headprobe.run.comparison.pairs import LIMITS, Pair
from headprobe.run.comparison.tables import mask_rows, pairs_of, rank_rows
from headprobe.run.load import Row, RunFiles
from headprobe.run.results import write_rows

FOLDER = "compare"

ABOUT, MASKS, RANKS, FIGURE = "compare.json", "compare.csv", "compare_ranks.csv", "compare.png"

DESCRIPTION = (
    "Compare what the same masks cost in several finished runs: on other data, such as ImageNet and -R, -A, Sketch, "
    "or in other weights of a model. Prints the drops side by side, whether masks rank alike, and which masks differ "
    "(docs/compare.md)."
)


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: The runs cannot be compared, one is not finished, or the folder holds something else.
        RunError: The files of a run are broken, or nothing can be written.
    """
    parser = Parser(prog="headprobe compare", description=DESCRIPTION)
    parser.add_argument(
        "runs", type=str, nargs="+", help="Folders of two runs or more, such as lightning_logs/version_0."
    )
    parser.add_argument("--output", type=str, default=FOLDER, help="Folder of the tables and the figure.")
    parser.add_argument(
        "--quantity",
        type=str,
        default="",
        help=f"What the screen and the figure show: {', '.join(LIMITS)} [drop_pp; without labels feature_distance].",
    )
    options = parser.parse_args(words)
    runs = [load_run(path) for path in options.runs]
    names = names_of_runs(runs)
    folder = _folder(options.output)
    try:
        pairs = pairs_of(runs, names)
        quantity = _quantity(options.quantity, pairs)
        masks = [mask_rows(pair) for pair in pairs]
        ranks = [row for pair, own in zip(pairs, masks, strict=True) for row in rank_rows(pair, own)]
    except BROKEN as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(broken(", ".join(options.runs), error)) from error
    rows = [row for own in masks for row in own]
    _print(runs, names, pairs, rows, ranks, quantity)
    _write(folder, pairs, rows, ranks, quantity, _about(runs, names, pairs))
    sys.stdout.write(f"\nResults: {shown((folder / MASKS).absolute())}  (all files: {shown(folder.absolute())})\n")


def _folder(given: str) -> Path:
    """Return the folder to write to.

    Raises:
        UsageError: It is a file, or holds anything but an earlier comparison.
    """
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output must be a folder such as {FOLDER}, got the file {given!r}")
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if there - {ABOUT, MASKS, RANKS, FIGURE} or (there and ABOUT not in there):
        raise UsageError(
            f"--output must be a new folder or one of an earlier comparison, which is replaced; name another, got "
            f"{given!r} with {sorted(there)[0]!r} in it"
        )
    return folder


def _quantity(given: str, pairs: Sequence[Pair]) -> str:
    """Return what the screen and the figure show.

    Raises:
        UsageError: Not all runs have it.
    """
    common = [name for name in LIMITS if all(name in pair.quantities for pair in pairs)]
    if not common:
        raise UsageError("these runs have no quantity in common: some have labels, some features alone; compare fewer")
    usual = next(name for name in ("drop_pp", *common) if name in common)
    if given and given not in common:
        raise UsageError(f"--quantity must be one that all runs have ({', '.join(common)}), got {given!r}")
    return given or usual


def _print(
    runs: Sequence[RunFiles],
    names: Sequence[str],
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    ranks: Sequence[Row],
    quantity: str,
) -> None:
    console.print(runs_table(runs, names))
    for pair in pairs:
        about = f"\n{pair.first.name} | {pair.second.name}: {_test_in_words(pair)}"
        console.print("\n  ".join([about, *pair.said]), soft_wrap=True, markup=False)
    if ranks:
        console.print()
        console.print(ranks_table(ranks))
    console.print()
    console.print(masks_table(pairs, rows, quantity))


def _test_in_words(pair: Pair) -> str:
    """Return which test compares two runs, and why."""
    if pair.other_rows:
        return f"two-sample tests (Welch over image groups), since {pair.other_rows}"
    return "paired tests over image groups: both judged the very same images"


def _about(runs: Sequence[RunFiles], names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return what was compared and what differed, for `compare.json`."""
    return {
        "schema": SCHEMA,
        "runs": [
            {
                "name": name,
                "path": str(run.path),
                "key": run.record.get("key"),
                "model": run.record["model"].get("title", run.record["model"]["name"]),
                "weights_sha256": run.record["model"].get("weights_sha256"),
                "data": {key: (run.record.get("data") or {}).get(key) for key in ("path", "split", "chosen_among")},
                "images": int(run.masks[0]["images"]),
            }
            for run, name in zip(runs, names, strict=True)
        ],
        "pairs": [
            {**pair.names, "test": pair.test, "why": pair.other_rows or "the very same images", "differ": pair.said}
            for pair in pairs
        ],
    }


def _write(
    folder: Path, pairs: Sequence[Pair], rows: Sequence[Row], ranks: Sequence[Row], quantity: str, about: dict[str, Any]
) -> None:
    """Write the tables and the figure; what an earlier comparison left and this one has not is removed."""
    from headprobe.report.comparison.figure import comparison_figure  # matplotlib takes its time

    image = io.BytesIO()
    comparison_figure(pairs, rows, ranks, quantity).savefig(image, format="png", dpi=150)
    write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    write_rows(folder / MASKS, rows)
    if ranks:
        write_rows(folder / RANKS, ranks)
    else:
        (folder / RANKS).unlink(missing_ok=True)
    write_bytes(folder / FIGURE, image.getvalue())
